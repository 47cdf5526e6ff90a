// What the products read: 32-bit words, each of kPack consecutive elements along the summed
// dimension.
//
// A word of the left operand is broadcast and multiplied with a vector of words of the right one,
// whose lanes are columns: in fp32 a fused multiply-add, in bf16 two products a lane, summed in
// fp32 (vdpbf16ps; AMX multiplies 16 rows of words at once, cpu/amx.h). Nothing else about a
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

// A row length in floats that is an odd number of cache lines: the rows of a tile then spread over
// all sets of the L1 cache, whatever the head dimension.
constexpr int64_t odd_lines(int64_t n) {
  const int64_t lines = round_up(n, 16) / 16;
  return 16 * (lines | 1);
}

// The lower and upper half of a0 b0 a1 b1 ...
BK_INLINE void interleave(VecF a, VecF b, VecF& low, VecF& high) {
#if BK_LANES == 4
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#elif BK_LANES == 8
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high =
      __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
}

// kLanes words as they lie in memory.
BK_INLINE VecF load_words(const void* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// dst[c][r] = src[r][c] for kLanes x kLanes words: log2(kLanes) perfect shuffles of the rows, which
// are `bytes` apart.
BK_INLINE void transpose_square(float* dst, int64_t ld_dst, const void* src, int64_t bytes) {
  VecF rows[kLanes], next[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = load_words(static_cast<const char*>(src) + i * bytes);
  for (int stage = 1; stage < kLanes; stage *= 2) {
    for (int i = 0; i < kLanes / 2; ++i)
      interleave(rows[i], rows[i + kLanes / 2], next[2 * i], next[2 * i + 1]);
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
  for (int i = 0; i < kLanes; ++i) store(dst + i * ld_dst, rows[i]);
}

// dst[d] = the word of low[d] and high[d], two rows of 16-bit elements, for d < n; zeros follow up
// to a whole vector. high: null for a row of zeros.
BK_INLINE void pair_rows(float* dst, const void* low, const void* high, int64_t n) {
  const uint32_t keep = high == nullptr ? 0 : 0xffff0000u;
  const auto* l = static_cast<const uint16_t*>(low);
  const auto* h = static_cast<const uint16_t*>(high == nullptr ? low : high);
  for (int64_t d = 0; d < n; d += kLanes) {
    VecH a{}, b{};
    const size_t bytes = size_t(2 * (n - d < kLanes ? n - d : int64_t{kLanes}));
    if (bytes == sizeof a) {
      __builtin_memcpy(&a, l + d, sizeof a);
      __builtin_memcpy(&b, h + d, sizeof b);
    } else {
      __builtin_memcpy(&a, l + d, bytes);
      __builtin_memcpy(&b, h + d, bytes);
    }
    store(dst + d, (VecF)(__builtin_convertvector(a, VecU) |
                          ((__builtin_convertvector(b, VecU) << 16) & keep)));
  }
}

}  // namespace bigkernel::BK_ISA
