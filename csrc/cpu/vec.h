// Short vectors of BK_LANES floats, in the compilers' own vector types: + - * / & | << < and ?:
// work on them as they stand, on every architecture. Here is only what those types lack. Included
// once for each instruction set, inside its flags (see setup.py), so everything lives in that set's
// namespace. Arithmetic a * b + c becomes one FMA where the set has it (-ffp-contract=fast).
#pragma once

#include "cpu/isa_prologue.h"

#if defined(BK_ISA_AVX512) || defined(BK_ISA_AVX512_BF16) || defined(BK_ISA_AMX)
#define BK_AVX512 1
#define BK_MM(name) _mm512_##name
#elif defined(BK_ISA_AVX2)
#define BK_AVX2 1
#define BK_MM(name) _mm256_##name
#elif defined(__SSE2__)
#define BK_MM(name) _mm_##name
#endif
#define BK_INLINE inline __attribute__((always_inline))

namespace bigkernel::BK_ISA {

constexpr int kLanes = BK_LANES;

typedef float VecF __attribute__((vector_size(4 * BK_LANES)));
typedef int32_t VecI __attribute__((vector_size(4 * BK_LANES)));  // comparisons give 0 or -1
typedef uint32_t VecU __attribute__((vector_size(4 * BK_LANES)));
typedef uint16_t VecH __attribute__((vector_size(2 * BK_LANES)));

BK_INLINE VecF set1(float x) { return x - VecF{}; }
BK_INLINE VecI set1i(int32_t x) { return x - VecI{}; }
BK_INLINE VecU set1u(uint32_t x) { return x - VecU{}; }
BK_INLINE VecI lane_index() {
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}
BK_INLINE VecF select(VecI mask, VecF a, VecF b) { return mask ? a : b; }
BK_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }

// v as it was rounded: keeps a following sum from being fused with the product v. Attention's
// forward and backward then see the same score, and a row with a single key gives it the weight 1
// exactly.
BK_INLINE VecF rounded(VecF v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  __asm__("" : "+m"(v));
#endif
  return v;
}
// a * b + c rounded once whatever the instruction set, where fma() may round twice.
BK_INLINE VecF fused(VecF a, VecF b, VecF c) {
#if defined(BK_AVX512) || defined(BK_AVX2)
  return BK_MM(fmadd_ps)(a, b, c);
#else
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return a;
#endif
}

// As maxps and minps: the second operand where either is NaN.
BK_INLINE VecF vmax(VecF a, VecF b) {
#ifdef BK_MM
  return BK_MM(max_ps)(a, b);
#else
  return a > b ? a : b;
#endif
}
BK_INLINE VecF vmin(VecF a, VecF b) {
#ifdef BK_MM
  return BK_MM(min_ps)(a, b);
#else
  return a < b ? a : b;
#endif
}
BK_INLINE VecF vsqrt(VecF a) {
#ifdef BK_MM
  return BK_MM(sqrt_ps)(a);
#else
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}
BK_INLINE VecF vabs(VecF a) { return (VecF)((VecI)a & 0x7fffffff); }
BK_INLINE VecF copysign(VecF magnitude, VecF sign) {
  return (VecF)(((VecI)magnitude & 0x7fffffff) | ((VecU)sign & 0x80000000u));
}

// To the nearest integer, halves to even. Beyond 2^22 adding the constant would lose bits that are
// already whole there.
BK_INLINE VecF vround(VecF a) {
  const VecF magic = copysign(set1(8388608.0f), a);
  return vabs(a) < 4194304.0f ? copysign((a + magic) - magic, a)
                              : (vabs(a) < 8388608.0f ? copysign((a + magic) - magic, a) : a);
}
BK_INLINE VecF vfloor(VecF a) {
  const VecF r = vround(a);
  return r > a ? r - 1.0f : r;
}
BK_INLINE VecI to_int(VecF a) { return __builtin_convertvector(a, VecI); }  // towards zero
BK_INLINE VecF to_float(VecI a) { return __builtin_convertvector(a, VecF); }

// ---- memory: T is float, bf16 or fp16; arithmetic is always fp32 ----

template <class T>
BK_INLINE VecF load(const T* p);
template <>
BK_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <>
BK_INLINE VecF load(const bf16* p) {
  VecH h;
  __builtin_memcpy(&h, p, sizeof h);
  return (VecF)(__builtin_convertvector(h, VecU) << 16);
}
template <>
BK_INLINE VecF load(const fp16* p) {
#if defined(BK_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(BK_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = ::bigkernel::to_float(p[i]);
  return v;
#endif
}

template <class T>
BK_INLINE void store(T* p, VecF v);
template <>
BK_INLINE void store(float* p, VecF v) {
  __builtin_memcpy(p, &v, sizeof v);
}
BK_INLINE VecU bf16_bits(VecF v) {  // round to nearest even; a NaN stays one
  const VecU u = (VecU)v;
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? ((u >> 16) | 0x40u) : rounded;
}
template <>
BK_INLINE void store(bf16* p, VecF v) {
  const VecH h = __builtin_convertvector(bf16_bits(v), VecH);
  __builtin_memcpy(p, &h, sizeof h);
}
template <>
BK_INLINE void store(fp16* p, VecF v) {
#if defined(BK_AVX512)
  _mm256_storeu_si256((__m256i*)p,
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(BK_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = round_to<fp16>(v[i]);
#endif
}

// The first n of kLanes elements; the rest of a load is zero and is never read from memory.
template <class T>
BK_INLINE VecF load_n(const T* p, int n) {
  T tmp[kLanes] = {};
  for (int i = 0; i < n; ++i) tmp[i] = p[i];
  return load<T>(tmp);
}
template <class T>
BK_INLINE void store_n(T* p, VecF v, int n) {
  T tmp[kLanes];
  store<T>(tmp, v);
  for (int i = 0; i < n; ++i) p[i] = tmp[i];
}

BK_INLINE VecF gather(const float* base, VecI index) {
#if defined(BK_AVX512)
  return _mm512_i32gather_ps((__m512i)index, base, 4);
#elif defined(BK_AVX2)
  return _mm256_i32gather_ps(base, (__m256i)index, 4);
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = base[index[i]];
  return v;
#endif
}

// ---- reductions, always in the same order for a given number of lanes ----

// Lane i of the result: lane i ^ w of v.
template <int w, int... i>
BK_INLINE VecF swap_lanes(VecF v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i ^ w)...);
}
template <int w>
BK_INLINE VecF swap_lanes(VecF v) {
  return swap_lanes<w>(v, std::make_integer_sequence<int, kLanes>{});
}
template <class F>
BK_INLINE float reduce(VecF v, const F& f) {
  if constexpr (kLanes >= 16) v = f(v, swap_lanes<8>(v));
  if constexpr (kLanes >= 8) v = f(v, swap_lanes<4>(v));
  v = f(v, swap_lanes<2>(v));
  v = f(v, swap_lanes<1>(v));
  return v[0];
}
BK_INLINE float reduce_sum(VecF v) {
  return reduce(v, [](VecF a, VecF b) { return a + b; });
}
BK_INLINE float reduce_max(VecF v) {
  return reduce(v, [](VecF a, VecF b) { return vmax(a, b); });
}

// Whether a > b in any lane.
BK_INLINE bool any_greater(VecF a, VecF b) {
#if defined(BK_AVX512)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(BK_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#else
  const VecI greater = a > b;
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= greater[i];
  return any != 0;
#endif
}

// ---- elementary functions ----

constexpr float kExp2[7] = {1.0f,           0.693147182465f, 0.240226507187f, 0.0555032715202f,
                            0.00961805693f, 0.00134004280f,  0.000154614449f};

// 2^x within 1 ulp; results below 2^-126 are 0. Chebyshev interpolant of degree 6 on [-1/2, 1/2]
// (relative error 2e-9), then the whole part goes into the exponent.
BK_INLINE VecF exp2(VecF x) {
  const VecF magic = set1(12582912.0f);  // 1.5 * 2^23: rounds, and leaves the integer in low bits
  const VecF shifted = x + magic;
  const VecF f = x - (shifted - magic);
  VecF p = set1(kExp2[6]);
  for (int i = 5; i >= 0; --i) p = p * f + kExp2[i];
  VecF r = (VecF)((VecI)p + (((VecI)shifted) << 23));
  r = x >= -126.0f ? r : VecF{};
  r = x < 128.0f ? r : set1(__builtin_inff());
  return x == x ? r : x;
}

// Within 2 ulp: odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel (Cephes, tanhf).
BK_INLINE VecF vtanh(VecF x) {
  const VecF z = x * x;
  VecF p = set1(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const VecF near = p * z * x + x;
  const VecF far = copysign(1.0f - 2.0f / (exp2(vabs(x) * 2.88539008177792681f) + 1.0f), x);
  return vabs(x) < 0.625f ? near : (x == x ? far : x);
}

}  // namespace bigkernel::BK_ISA
