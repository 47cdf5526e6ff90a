// common/philox.h on short vectors: the same words, for kLanes counters at once.
#pragma once

#include "cpu/vec.h"

namespace bigkernel::BK_ISA {

// High and low words of a * b, lane by lane.
BK_INLINE void multiply_wide(VecU a, uint32_t b, VecU& high, VecU& low) {
#if defined(BK_AVX512)
  const __m512i factor = _mm512_set1_epi64(int64_t(b));
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  low = (VecU)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high = (VecU)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(BK_AVX2)
  const __m256i factor = _mm256_set1_epi64x(int64_t(b));
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  low = (VecU)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = (VecU)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = uint64_t(a[i]) * b;
    low[i] = uint32_t(product);
    high[i] = uint32_t(product >> 32);
  }
#endif
}

// common/philox.h, for kLanes values of the first counter word at once.
BK_INLINE void philox4x32(uint64_t seed, VecU c0, uint32_t c1_, uint32_t c2_, uint32_t c3_,
                          VecU words[4]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  VecU c1 = set1u(c1_), c2 = set1u(c2_), c3 = set1u(c3_);
  for (int round = 0; round < 10; ++round) {
    VecU high_a, low_a, high_b, low_b;
    multiply_wide(c0, 0xD2511F53u, high_a, low_a);
    multiply_wide(c2, 0xCD9E8D57u, high_b, low_b);
    c0 = high_b ^ c1 ^ k0;
    c1 = low_b;
    c2 = high_a ^ c3 ^ k1;
    c3 = low_a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace bigkernel::BK_ISA
