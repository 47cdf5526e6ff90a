// What common/activations.h asks of an instruction set, for a CUDA thread: vectors of one float.
#pragma once

#define BK_ISA device
#define BK_INLINE __device__ __forceinline__

namespace bigkernel::BK_ISA {

using VecF = float;

BK_INLINE VecF set1(float x) { return x; }
BK_INLINE VecF fma(VecF a, VecF b, VecF c) { return fmaf(a, b, c); }
BK_INLINE VecF vabs(VecF x) { return fabsf(x); }
BK_INLINE VecF vexp(VecF x) { return expf(x); }
// To 1 ulp, of x below 2^126: larger ones give 0.
BK_INLINE VecF reciprocal(VecF x) { return __fdividef(1.0f, x); }

}  // namespace bigkernel::BK_ISA
