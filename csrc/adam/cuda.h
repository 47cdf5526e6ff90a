// What the CUDA binding of Adam hands to its launchers. No torch header here.
#pragma once
#include <cstdint>
#include <vector>

#include "adam/adam.h"

namespace bigkernel {

// A one-element float32 or float64 tensor on the device; data is null where there is none.
struct DeviceScalar {
  const void* data;
  int32_t is_double;
};

struct AdamDeviceGroup {
  AdamGroup host;
  DeviceScalar lr;  // counts instead of host.lr unless null
};

// What the kernels tell each other: every decision is taken on the device.
struct AdamControl {
  int32_t skip;
};

struct AdamDeviceCall {
  DeviceScalar grad_scale, found_inf, total_norm;
  const int64_t* seed;   // null: no stochastic rounding
  double max_norm;       // negative: no clipping
  float* norm;           // [1], written if clipping
  AdamControl* control;  // [1]
  double* partials;      // [adam_partial_count(...)], sums of squares
  int32_t partial_count;
  AdamScalars* scalars;  // [number of tensors], in the list's order
};

// Number of partial sums that launch_adam_norm leaves for these tensors.
int64_t adam_partial_count(const std::vector<AdamTensor>& tensors);

// All launches go to `stream` (a cudaStream_t) of `device` and return at once. They throw
// std::runtime_error, naming the kernel, the grid and CUDA's message.
//   launch_adam_norm:    partials[i] <- sum of squares of some chunks of the gradients
//   launch_adam_finish:  norm <- sqrt(sum of partials) / grad_scale
//   launch_adam_step:    advances the step counts, then updates every tensor, unless skipped
void launch_adam_norm(const std::vector<AdamTensor>& tensors, double* partials, int device,
                      void* stream);
void launch_adam_finish(const AdamDeviceCall& call, int device, void* stream);
void launch_adam_step(const std::vector<AdamTensor>& tensors,
                      const std::vector<AdamDeviceGroup>& groups, const AdamDeviceCall& call,
                      int device, void* stream);

}  // namespace bigkernel
