// What the CUDA binding of bias_act hands to its launcher. No torch header here.
#pragma once
#include <cstdint>

#include "bias_act/bias_act.h"

namespace bigkernel {

// As BiasActArgs, all contiguous, with the rows that there are.
struct BiasActCudaArgs {
  BiasActArgs args;
  int64_t rows;
  float* partials;  // [bias_act_chunks(rows), dim], scratch; null: no gradient of bias is wanted
  float* dbias;     // [dim]
};

// The blocks that rows are cut into, by their number alone: so is the order of the sums.
int64_t bias_act_chunks(int64_t rows);

// Launches on `stream` (a cudaStream_t) of `device` and returns at once. Throws std::runtime_error,
// naming the kernel, the grid and CUDA's message.
void launch_bias_act(const BiasActCudaArgs& args, int device, void* stream);

}  // namespace bigkernel
