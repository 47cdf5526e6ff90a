// RMS and layer norm: what the binding hands to the kernels. No torch header here. The formula
// stands in bigkernel/ops/norm/reference.py.
#pragma once
#include <cstdint>

#include "common/dtypes.h"
#include "cpu/isa.h"

namespace bigkernel {

// Rows [N, dim]. Strides are from row to row, in elements; what has none is contiguous.
struct NormArgs {
  const void* x;
  const void* residual;  // null: none
  void* sum;             // x + residual; null without residual
  const float* scale;    // [dim], offset + weight; null: 1
  const float* bias;     // [dim]; null: none
  void* y;
  float* rstd;  // [N]
  float* mean;  // [N]; null: not centred (RMS norm)
  int64_t dim, x_stride, residual_stride;
  DType x_type, residual_type, sum_type, y_type;  // sum_type: of x where there is no residual
  float eps;
  bool round_first;  // to sum_type, before the multiplication by scale
};

struct NormGradArgs {
  const void* dy;
  const void* dsum;  // a gradient that reached x + residual from elsewhere; null: none
  const void* h;     // x, or x + residual
  const float* scale;
  const float* rstd;
  const float* mean;
  void* dh;
  int64_t dim, dy_stride, dsum_stride, h_stride;
  DType h_type, dy_type;  // dsum and dh are of h_type
};

// Rows whose products are added up before they join the sum of their chunk.
constexpr int64_t kNormRun = 32;

BK_DECLARE_PER_ISA(
    // Rows begin..end.
    void norm_forward(const NormArgs& args, int64_t begin, int64_t end);
    // Rows begin..end. Adds their sums to dscale and dbias [dim], where these are not null; `run`
    // is scratch of 2 * dim.
    void norm_backward(const NormGradArgs& args, int64_t begin, int64_t end, float* dscale,
                       float* dbias, float* run);
    // result[i] = offset + weight[i]
    void norm_widen(const void* weight, DType type, float offset, int64_t n, float* result))

}  // namespace bigkernel
