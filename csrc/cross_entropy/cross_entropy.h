// Cross-entropy over given logits: what the binding hands to the kernels. No torch header here. The
// formula stands in bigkernel/ops/cross_entropy/reference.py.
#pragma once
#include <cstdint>

#include "common/dtypes.h"
#include "cpu/isa.h"

namespace bigkernel {

struct CrossEntropyArgs {
  const void* logits;     // [N, classes] of type; rows `stride` elements apart
  const int64_t* labels;  // [N]; null: soft labels
  const void* soft;       // [N, classes] of soft_type, rows `soft_stride` apart: probabilities
  const float* weight;    // [classes]; null: 1
  float* losses;          // [N], forward
  float* peak;            // [N]: the largest (capped) logit of a row,
  float* spread;          // [N]: and the logarithm of the sum of exp(logit - peak)
  const float* scale;     // [N], backward: the gradient of a row's loss
  void* dlogits;          // backward: of type, rows `grad_stride` apart; may be logits
  int64_t classes, stride, grad_stride, soft_stride, ignore_index;
  DType type, soft_type;
  float smoothing, z_loss, softcap;  // softcap 0: none
  float weight_sum;                  // of all classes
};

BK_DECLARE_PER_ISA(
    // Rows begin..end; labels are in range.
    void cross_entropy_forward(const CrossEntropyArgs& args, int64_t begin, int64_t end);
    void cross_entropy_backward(const CrossEntropyArgs& args, int64_t begin, int64_t end))

}  // namespace bigkernel
