// Element types to and from fp32, by the instructions for it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtypes.h"

namespace bigkernel {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(uint8_t x) { return float(x); }
__device__ __forceinline__ float widen(bf16 x) { return to_float(x); }
__device__ __forceinline__ float widen(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ fp16 narrow<fp16>(float x) {
  return fp16{__half_as_ushort(__float2half_rn(x))};
}

}  // namespace bigkernel
