// What the products read: 32-bit words, each of kPack consecutive elements along the summed
// dimension.
//
// A word of the left operand is broadcast and multiplied with a vector of words of the right one,
// whose lanes are columns: in fp32 a fused multiply-add, in bf16 two products a lane, summed in
// fp32 (vdpbf16ps; AMX multiplies 16 rows of words at once, cpu_amx.h). Nothing else about a
// product differs, so words lie in float arrays, with the summed dimension kPack times shorter, and
// forward and backward are written once.
#pragma once

#include "cpu/vec.h"

namespace bigkernel::BK_ISA {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Fp32Words {  // fp16 and, without dot products, bf16 are converted when they are packed
  static constexpr int64_t kPack = 1;
  static BK_INLINE VecF dot(VecF a, VecF b, VecF c) { return fma(a, b, c); }
  // One lane of `dot`. Left to itself, the compiler may vectorise the products of a sum and add
  // them one by one, which rounds twice.
  static BK_INLINE float dot_one(float a, float b, float c) {
#if defined(BK_AVX2) || defined(BK_AVX512) || defined(__FP_FAST_FMAF)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
  }
};

#if defined(BK_ISA_AVX512_BF16) || defined(BK_ISA_AMX)
struct Bf16Words {
  static constexpr int64_t kPack = 2;
  static BK_INLINE VecF dot(VecF a, VecF b, VecF c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
  static BK_INLINE float dot_one(float a, float b, float c) {
    return _mm_cvtss_f32(
        _mm_dpbf16_ps(_mm_set_ss(c), (__m128bh)_mm_set_ss(a), (__m128bh)_mm_set_ss(b)));
  }
  // The elements of `low`, then those of `high`.
  static BK_INLINE VecF consecutive(VecF low, VecF high) {
    return (VecF)_mm512_cvtne2ps_pbh(high, low);
  }
  // Word i: low[i] and high[i].
  static BK_INLINE VecF pair(VecF low, VecF high) {
    const VecU l = (VecU)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
    const VecU h = (VecU)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
    return (VecF)(l | (h << 16));
  }
};
#endif

// Calls f with the kind of words that tensors of this dtype are multiplied in.
template <class F>
BK_INLINE void with_words(DType dtype, const F& f) {
  (void)dtype;
#if defined(BK_ISA_AMX)  // BK_CALL_PRODUCTS comes here with bf16 alone
  f(Bf16Words{});
#else
#if defined(BK_ISA_AVX512_BF16)
  if (dtype == DType::kBFloat16) return f(Bf16Words{});
#endif
  f(Fp32Words{});
#endif
}

// How many words hold n elements.
template <class Words>
constexpr int64_t words(int64_t n) {
  return (n + Words::kPack - 1) / Words::kPack;
}

// The word at p in every lane, bit by bit.
BK_INLINE VecF broadcast(const float* p) {
  uint32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (VecF)set1u(bits);
}

}  // namespace bigkernel::BK_ISA
