// Kernels of test_memory.py: one per thing that the emulator must get right.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#define K extern "C" __global__ void
#define I (blockIdx.x * blockDim.x + threadIdx.x)

K vectors(const float4* a, const uint2* b, const unsigned char* c, const short* d, float4* o,
          uint2* p, unsigned char* q, int* r) {
  o[I] = __ldg(&a[I]);
  p[I] = __ldcs(&b[I]);
  q[I] = c[I] + 1;
  r[I] = d[I] * 2;
  __stcs(&o[I + 64], a[I]);
  __stwt(&p[I + 64], b[I]);
}
K index_3d(int* o) {
  unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  unsigned t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  unsigned n = blockDim.x * blockDim.y * blockDim.z;
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  o[b * n + t] = (t % 32 == lane) ? b * 1000 + t : -1;
}
struct Pair {
  float* out;
  int n[4];
  double scale;
};
__device__ int table[4] = {10, 20, 30, 40};
__constant__ float weights[3] = {1.f, 0.5f, 0.25f};
__device__ __noinline__ float helper(float x, int* whole) {
  *whole = (int)x;
  return x * 2.f;
}
__device__ __noinline__ float twice(float x) {
  int w;
  return helper(x, &w) + helper(x + 1.f, &w) + w;
}
K structs(Pair p, const __grid_constant__ Pair q, int k) {
  int i = threadIdx.x;
  p.out[i] =
      twice(i) * weights[i % 3] + p.n[(i + k) & 3] + q.n[i & 3] + table[i & 3] + (float)q.scale;
}
K bump_table() { atomicAdd(&table[threadIdx.x & 3], 1); }
K local_array(const int* x, int* o) {
  int a[16];
  for (int j = 0; j < 16; j++) a[j] = x[I] * j;
  int s = 0;
  for (int j = 0; j < 4; j++) s += a[(x[I] >> j) & 15];
  o[I] = s;
}
K generic(int* o, int where) {
  __shared__ int s[64];
  int l[2] = {7, 8};
  int* p = where == 0 ? &o[I] : where == 1 ? &s[threadIdx.x] : &l[threadIdx.x & 1];
  if (threadIdx.x % 3 == 0) p = &s[threadIdx.x];
  *p = threadIdx.x;
  __syncwarp();
  o[I + 64] = *p;
  o[I + 128] = __isShared(p) + 2 * __isLocal(p) + 4 * __isGlobal(p);
}
K loops(const int* n, int* o) {  // lanes leave at different times and meet again
  int s = 0;
  for (int j = 0; j < n[I]; j++) {
    if (j % 3 == 1) continue;
    if (j > 40) break;
    s += j;
  }
  o[I] = s + __popc(__activemask());
}
K jumps(const int* x, int* o) {
  switch (x[I]) {
    case 0:
      o[I] = 5;
      break;
    case 1:
      o[I] = o[I] * 3 + 1;
      break;
    case 2:
      o[I] = x[I] << 4;
      break;
    case 3:
      o[I] -= 9;
      break;
    case 4:
      o[I] = 77;
      return;
    case 5:
      o[I] ^= 0x55;
      break;
    case 6:
      o[I] = __clz(x[I]);
      break;
    default:
      o[I] = -1;
  }
  o[I] += 1;
}
K early_return(const float* x, float* o, int n) {
  if ((int)I >= n) return;
  o[I] = x[I] + 1.f;
}
K reduce(const float* x, float* o) {
  __shared__ float s[256];
  int t = threadIdx.x;
  s[t] = x[I];
  for (int k = 128; k; k >>= 1) {
    __syncthreads();
    if (t < k) s[t] += s[t + k];
  }
  if (t == 0) o[blockIdx.x] = s[0];
}
K counts(const int* x, int* o) {
  int t = threadIdx.x;
  int c = __syncthreads_count(x[t] > 0), a = __syncthreads_and(x[t] > -9),
      r = __syncthreads_or(x[t] > 90);
  o[t] = c * 100 + a * 10 + r;
}
K named(const float* x, float* o) {  // half of the block produces, the other consumes
  __shared__ float s[64];
  int t = threadIdx.x;
  if (t < 64) {
    s[t] = x[t] * 2.f;
    asm volatile("bar.arrive 1, 128;" ::: "memory");
  } else {
    asm volatile("bar.sync 1, 128;" ::: "memory");
    o[t - 64] = s[127 - t];
  }
}
K warp_exchange(const float* x, float* o) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  o[threadIdx.x] = s[threadIdx.x ^ 31];
}
K odd_block(const float* x, float* o) {  // threads that fill no whole warp
  __shared__ float s[50];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  o[threadIdx.x] = s[49 - threadIdx.x];
}
K static_and_dynamic(int* o, int n) {
  __shared__ short a[5];
  extern __shared__ int w[];
  if (threadIdx.x < 5) a[threadIdx.x] = -(int)threadIdx.x;
  w[threadIdx.x] = threadIdx.x * n;
  __syncthreads();
  o[threadIdx.x] = w[31 - threadIdx.x] + a[threadIdx.x % 5];
}
K pipeline(const float4* x, float4* o, int tiles) {  // two stages
  __shared__ float4 s[2][64];
  int t = threadIdx.x;
  __pipeline_memcpy_async(&s[0][t], &x[t], 16);
  __pipeline_commit();
  for (int j = 0; j < tiles; j++) {
    if (j + 1 < tiles) __pipeline_memcpy_async(&s[(j + 1) & 1][t], &x[64 * (j + 1) + t], 16);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    o[64 * j + t] = s[j & 1][63 - t];
    __syncthreads();
  }
}
K zero_fill(const float4* x, float4* o, int n) {
  __shared__ float4 s[64];
  int t = threadIdx.x;
  unsigned to = (unsigned)__cvta_generic_to_shared(&s[t]);
  int bytes = min(16, max(0, n - 16 * t));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(x + t), "r"(bytes));
  asm volatile("cp.async.wait_all;" ::: "memory");
  o[t] = s[t];
}
K small_copies(const int* x, int* o) {
  __shared__ int s[64];
  int t = threadIdx.x;
  if (t % 2 == 0) __pipeline_memcpy_async(&s[t], &x[t], 8);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  o[t] = s[63 - t];
}
#define ATOMIC(NAME, T, CALL)                 \
  K atomic_##NAME(const T* x, T* o, T* old) { \
    T v = x[I];                               \
    T* p = &o[threadIdx.x % 5];               \
    old[I] = CALL;                            \
  }
ATOMIC(add, int, atomicAdd(p, v));
ATOMIC(min, int, atomicMin(p, v));
ATOMIC(max, int, atomicMax(p, v));
ATOMIC(and, int, atomicAnd(p, v));
ATOMIC(or, int, atomicOr(p, v));
ATOMIC(xor, int, atomicXor(p, v));
ATOMIC(exch, int, atomicExch(p, v));
ATOMIC(inc, unsigned, atomicInc(p, v));
ATOMIC(dec, unsigned, atomicDec(p, v));
ATOMIC(cas, int, atomicCAS(p, 3, v));
ATOMIC(fadd, float, atomicAdd(p, v));
ATOMIC(dadd, double, atomicAdd(p, v));
K red(const int* x, int* o, const float* y, float* f) {
  atomicAdd(&o[I % 3], x[I]);
  atomicMax(&o[3], x[I]);
  atomicAdd(f, y[I]);
}
K red_half(const __half2* x, __half2* o, const __nv_bfloat162* y, __nv_bfloat162* p) {
  atomicAdd(o, x[I]);
  atomicAdd(p, y[I]);
}
K histogram(const unsigned char* x, int* o) {
  __shared__ int s[16];
  if (threadIdx.x < 16) s[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&s[x[I] % 16], 1);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&o[threadIdx.x], s[threadIdx.x]);
}
K last_block(const float* x, float* partial, unsigned* ticket, float* o) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[I] + x[I + 1];
    __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float s = 0;
    for (int b = 0; b < gridDim.x; b++) s += partial[b];
    *o = s;
  }
}
K coalesced(const float* x, float* o) { o[I] = x[I]; }
K strided(const float* x, float* o) { o[I] = x[I * 8]; }
K broadcast(const float* x, float* o) { o[I] = x[blockIdx.x]; }
K banks(float* o, int stride) {
  extern __shared__ float s[];
  s[threadIdx.x * stride] = 1.f;
  __syncthreads();
  o[I] = s[threadIdx.x * stride];
}
K banks_wide(float4* o, int swizzle) {
  extern __shared__ float4 v[];
  for (int j = threadIdx.x; j < 256; j += 32) v[j] = make_float4(j, 0, 0, 0);
  __syncwarp();
  int row = threadIdx.x % 8, column = threadIdx.x / 8;
  o[threadIdx.x] = v[row * 8 + (swizzle ? column ^ row : column)];
}
K wide_integers(const unsigned long long* a, unsigned long long* o) {
  typedef unsigned __int128 Wide;
  Wide x = a[I], y = a[I + 1], total = x * y + (x << 64 | y), rest = (y << 64 | x) - x * y;
  unsigned long long* p = o + 4 * I;
  p[0] = (unsigned long long)total;
  p[1] = (unsigned long long)(total >> 64);
  p[2] = (unsigned long long)rest;
  p[3] = (unsigned long long)(rest >> 64);
}
