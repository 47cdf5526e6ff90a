// Sums over the threads of a block.
#pragma once

namespace bigkernel {

// The sum over the block, in every thread; always in the same order.
template <int kThreads>
__device__ double block_sum(double x) {
  __shared__ double warp_sum[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kThreads / 32; ++w) sum += warp_sum[w];
  __syncthreads();
  return sum;
}

}  // namespace bigkernel
