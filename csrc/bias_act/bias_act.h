// A bias and the activation after it: what the binding hands to the kernels. No torch header here.
// The formula stands in bigkernel/ops/bias_act/reference.py.
#pragma once
#include <cstdint>

#include "common/dtypes.h"
#include "cpu/isa.h"

namespace bigkernel {

// Rows [N, dim], x, dy and y of one type. Strides are from row to row, in elements.
struct BiasActArgs {
  const void* x;
  const void* dy;     // null: forward
  const float* bias;  // [dim]; null: none
  void* y;            // forward: the result; backward: the gradient of x. Contiguous
  int64_t dim, x_stride, dy_stride;
  DType type;
  int64_t activation;
};

// Rows whose gradients are added up before they join the sum of their chunk.
constexpr int64_t kBiasActRun = 32;

BK_DECLARE_PER_ISA(
    // Rows begin..end.
    void bias_act_forward(const BiasActArgs& args, int64_t begin, int64_t end);
    // Rows begin..end. Adds the gradients of x to dbias [dim], unless that is null; `run` is
    // scratch of dim zeros.
    void bias_act_backward(const BiasActArgs& args, int64_t begin, int64_t end, float* dbias,
                           float* run))

}  // namespace bigkernel
