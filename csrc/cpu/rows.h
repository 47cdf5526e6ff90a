// What kernels that go through memory row by row share: loads and sums of any length. Included by
// an op's cpu_body.h, so everything lives in the namespace of an instruction set.
#pragma once

#include "cpu/vec.h"

#define BK_LAMBDA __attribute__((always_inline))  // after a lambda's parameters

namespace bigkernel::BK_ISA {

// To T and to memory. Where the processor has it, bf16 is rounded by its own instruction, which
// takes a tenth of the time; it writes results below 2^-126 as 0.
template <class T>
BK_INLINE void put(T* p, VecF v) {
#if defined(BK_ISA_AVX512_BF16)
  if constexpr (std::is_same_v<T, bf16>)
    return _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
#endif
  store<T>(p, v);
}

// v as a T would hold it.
template <class T>
BK_INLINE VecF rounded_to(VecF v) {
  if constexpr (std::is_same_v<T, float>) return v;
#if defined(BK_ISA_AVX512_BF16)
  if constexpr (std::is_same_v<T, bf16>)
    return (VecF)((VecU)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)) << 16);
#endif
  if constexpr (std::is_same_v<T, bf16>) return (VecF)(bf16_bits(v) << 16);
  T tmp[kLanes];
  store<T>(tmp, v);
  return load<T>(tmp);
}

// All lanes or the first n. In most calls n is a constant, and the choice costs nothing.
template <class T>
BK_INLINE VecF load_some(const T* p, int n) {
  return n == kLanes ? load<T>(p) : load_n<T>(p, n);
}
template <class T>
BK_INLINE void store_some(T* p, VecF v, int n) {
  if (n == kLanes) return put<T>(p, v);
  T tmp[kLanes];
  put<T>(tmp, v);
  for (int i = 0; i < n; ++i) p[i] = tmp[i];
}

// Calls f with a value of the element type, which is one of float, bf16 and fp16.
template <class F>
BK_INLINE void with_type(DType type, const F& f) {
  if (type == DType::kFloat32) return f(float{});
  if (type == DType::kBFloat16) return f(bf16{});
  f(fp16{});
}

// Calls f(i, count) for n elements, kLanes at a time.
template <class F>
BK_INLINE void for_elements(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, int(n - i));
}

// K sums over n elements in an order that n alone decides: f(i, count, sums) adds what the elements
// i .. i + count - 1 give. Four chains of additions, each cut after 16, so that the error stays
// near that of a pairwise sum.
template <int K, class F>
BK_INLINE void sum_elements(int64_t n, float (&result)[K], const F& f) {
  constexpr int kChains = 4, kCut = 16;
  VecF total[K] = {};
  int64_t i = 0;
  while (i + kChains * kLanes <= n) {
    VecF part[kChains][K] = {};
    const int64_t cut = i + int64_t{kCut} * kChains * kLanes;
    for (const int64_t stop = cut < n ? cut : n; i + kChains * kLanes <= stop;)
      for (int j = 0; j < kChains; ++j, i += kLanes) f(i, kLanes, part[j]);
    for (int k = 0; k < K; ++k) total[k] += (part[0][k] + part[1][k]) + (part[2][k] + part[3][k]);
  }
  VecF rest[K] = {};
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes, rest);
  if (i < n) f(i, int(n - i), rest);
  for (int k = 0; k < K; ++k) result[k] = reduce_sum(total[k] + rest[k]);
}

}  // namespace bigkernel::BK_ISA
