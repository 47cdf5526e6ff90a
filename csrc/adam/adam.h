// Adam over a list of tensors: what the binding hands to the kernels. No torch header here.
// The formula stands in bigkernel/ops/adam/reference.py.
#pragma once
#include <cstdint>
#include <vector>

#include "common/dtypes.h"
#include "cpu/isa.h"

namespace bigkernel {

// Bits of a group's flags; the same in bigkernel/ops/adam/reference.py.
enum AdamFlag : int32_t { kAmsgrad = 1, kMaximize = 2, kDecoupled = 4 };

// One tensor of the list. All its arrays have numel elements in the same order.
struct AdamTensor {
  void* param;           // float32, bfloat16 or float16
  const void* grad;      // float32, bfloat16 or float16
  void* exp_avg;         // float32 or bfloat16, m
  void* exp_avg_sq;      // the same type, v
  void* max_exp_avg_sq;  // the same type; null without amsgrad
  float* master;         // null where the parameter is its own master
  float* step;           // one element: steps done so far
  int64_t numel;
  DType param_type, grad_type, moment_type;
  int32_t group;
  uint32_t index;  // position in the list, for the random numbers
};

struct AdamGroup {
  int32_t flags;
  double lr, beta1, beta2, eps, weight_decay;
};

struct AdamGradient {
  const void* data;
  int64_t numel;
  DType type;
};

// What is the same for every element of one tensor in one step, in the names of the formula.
struct AdamScalars {
  float grad_factor;  // clip coefficient / grad_scale, negative to maximise
  float weight1;      // 1 - beta1
  float weight2;      // 1 - beta2
  float step_size;    // lr * r / (1 - beta1^t)
  float eps;          // eps * r
  float l2;           // weight_decay of L2 decay, else 0
  float decay;        // lr * weight_decay of decoupled decay, else 0
  bool amsgrad;
  bool stochastic;  // round a bfloat16 parameter without a master stochastically
  uint32_t step;    // t, a word of the random numbers' counter
  uint64_t seed;
};

// Elements are handled in units of this many, whatever the tensor; a unit's arrays stay in the
// first-level cache while 16-bit ones are widened to fp32.
constexpr int64_t kAdamUnit = 512;

BK_DECLARE_PER_ISA(
    // Elements begin..end of one tensor; begin is a multiple of kAdamUnit.
    void adam_update(const AdamTensor& t, const AdamScalars& s, int64_t begin, int64_t end);
    // Sum of squares of elements begin..end, in fp64.
    double adam_square_sum(const void* grad, DType type, int64_t begin, int64_t end);
    // The memory traffic of an update without its arithmetic: adds zero * g to x, m and v.
    void adam_stream(float* x, const float* g, float* m, float* v, int64_t n, float zero);
    // The memory traffic of the norm: returns something that depends on all n elements.
    float adam_read(const float* g, int64_t n))

}  // namespace bigkernel
