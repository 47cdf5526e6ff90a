// Gated linear units: what the binding hands to the kernels. No torch header here. The formula
// stands in bigkernel/ops/glu/reference.py.
#pragma once
#include <cstdint>

#include "common/dtypes.h"
#include "cpu/isa.h"

namespace bigkernel {

// Rows [N, dim], all of one type. Strides are from row to row, in elements.
struct GluArgs {
  const void *gate, *up;
  const void* dy;     // backward
  void* y;            // forward; contiguous
  void *dgate, *dup;  // backward; of stride grad_stride
  int64_t dim, gate_stride, up_stride, dy_stride, grad_stride;
  DType type;
  int64_t activation;
};

BK_DECLARE_PER_ISA(
    // Rows begin..end.
    void glu_forward(const GluArgs& args, int64_t begin, int64_t end);
    void glu_backward(const GluArgs& args, int64_t begin, int64_t end))

}  // namespace bigkernel
