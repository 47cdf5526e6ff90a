// Rotary position embedding: what the binding hands to the kernels. No torch header here. The
// formula stands in bigkernel/ops/rope/reference.py.
#pragma once
#include <cstdint>

#include "common/dtypes.h"
#include "cpu/isa.h"

namespace bigkernel {

// [B, H, S, D] with a contiguous last dimension; strides in elements.
struct RopeTensor {
  const void* x;
  void* out;  // may be x
  int64_t heads;
  int64_t x_batch, x_head, x_row;
  int64_t out_batch, out_head, out_row;
};

struct RopeArgs {
  RopeTensor tensors[2];  // q and k, or one of them
  int count;
  const void *cos, *sin;  // [B or 1, S, rotary], contiguous last dimension
  int64_t cos_batch, cos_row, sin_batch, sin_row;
  int64_t batch, length, dim, rotary;
  DType type, table_type;
  bool interleaved, transposed;
};

BK_DECLARE_PER_ISA(
    // Positions begin..end of batch * length; `scratch` is 2 * rotary floats.
    void rope_rotate(const RopeArgs& args, int64_t begin, int64_t end, float* scratch))

}  // namespace bigkernel
