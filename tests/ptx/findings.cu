// Kernels of test_findings.py, each with one mistake.
#include <cuda_pipeline.h>
#define K extern "C" __global__ void

K past_end(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i] = x[i];  // <= is the mistake
}
K before_start(const float* x, float* y) { y[threadIdx.x] = x[(int)threadIdx.x - 1]; }
K wild_pointer(float* y) { y[threadIdx.x + (1LL << 40)] = 1.f; }
K past_shared(float* y) {
  extern __shared__ float s[];
  s[threadIdx.x + 1] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + 1];
}
K misaligned_global(const float* x, float4* y) {
  y[threadIdx.x] = *reinterpret_cast<const float4*>(x + threadIdx.x);
}
K misaligned_shared(float4* y) {
  extern __shared__ float s[];
  for (int j = 0; j < 4; j++) s[4 * threadIdx.x + j] = j;
  __syncthreads();
  y[threadIdx.x] = *reinterpret_cast<float4*>(s + threadIdx.x);
}
K race_read_after_write(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[63 - threadIdx.x];  // no __syncthreads()
}
K race_write_after_read(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  float v = s[63 - threadIdx.x];
  s[threadIdx.x] = v;  // others may not have read yet
  y[threadIdx.x] = v;
}
K race_write_write(float* y) {
  __shared__ float s[64];
  s[threadIdx.x / 2] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x / 2];
}
K race_within_warp(float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[31 - threadIdx.x];  // no __syncwarp()
}
K race_behind_named_barrier(float* y) {
  __shared__ float s[128];
  s[threadIdx.x] = threadIdx.x;
  asm volatile("bar.sync %0, 64;" ::"r"(1 + (int)threadIdx.x / 64) : "memory");
  y[threadIdx.x] = s[127 - threadIdx.x];  // written by the other half
}
K never_written(float* y) {
  __shared__ float s[64];
  if (threadIdx.x < 63) s[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
K barrier_in_branch(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  if (threadIdx.x < 40) __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
K barrier_after_return(float* y, int n) {
  if ((int)threadIdx.x >= n) return;
  __syncthreads();
  y[threadIdx.x] = 1.f;
}
K barrier_in_two_places(float* y) {
  if (threadIdx.x % 2) {
    __syncthreads();
    y[threadIdx.x] = 1.f;
  } else {
    y[threadIdx.x] = 2.f;
    __syncthreads();
    y[threadIdx.x] += 2.f;
  }
}
K shuffle_in_branch(float* y) {
  float v = y[threadIdx.x];
  if (threadIdx.x < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  y[threadIdx.x] = v;
}
K missing_wait(const float4* x, float4* y) {
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);
  __pipeline_commit();
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}
K wait_for_too_few(const float4* x, float4* y) {
  __shared__ float4 s[2][64];
  for (int j = 0; j < 2; j++) {
    __pipeline_memcpy_async(&s[j][threadIdx.x], &x[64 * j + threadIdx.x], 16);
    __pipeline_commit();
  }
  __pipeline_wait_prior(1);  // the second group is still under way
  __syncthreads();
  y[threadIdx.x] = s[1][63 - threadIdx.x];
}
K wait_without_barrier(const float4* x, float4* y) {
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[threadIdx.x] = s[63 - threadIdx.x];
}
K refill_too_early(const float4* x, float4* y) {
  __shared__ float4 s[64];
  for (int j = 0; j < 2; j++) {
    __pipeline_memcpy_async(&s[threadIdx.x], &x[64 * j + threadIdx.x], 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    y[64 * j + threadIdx.x] = s[63 - threadIdx.x];  // then the next copy overwrites it
  }
}
K copy_past_end(const float4* x, float4* y) {
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x + 1], 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[threadIdx.x] = s[threadIdx.x];
}
K gives_up(float* y) {
  if (y[threadIdx.x] > 0.f) __trap();
}
K endless(volatile float* y) {
  while (y[threadIdx.x] == 0.f) {
  }
}
