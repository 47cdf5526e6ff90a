// Reading source pixels as fp32 vectors: consecutive ones, and scattered ones through gathers. A
// gather fetches 32 bits, so one of uint8 or 16-bit pixels brings the neighbour along: the right
// tap in a plane, the other colours in an interleaved image.
#pragma once

#include "augment/augment.h"
#include "cpu/vec.h"

namespace bigkernel::BK_ISA {

BK_INLINE VecI vmini(VecI a, VecI b) { return a < b ? a : b; }
BK_INLINE VecI clampi(VecI a, int32_t low, int32_t high) {
  a = a < low ? set1i(low) : a;
  return a > high ? set1i(high) : a;
}

// ---- consecutive pixels ----

BK_INLINE VecI load_bytes(const uint8_t* p) {
#if defined(BK_AVX512)
  return (VecI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(BK_AVX2)
  return (VecI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}
// Of whole numbers in 0..255.
BK_INLINE void store_bytes(uint8_t* p, VecF v) {
  typedef uint8_t VecB __attribute__((vector_size(BK_LANES)));
  const VecB bytes = __builtin_convertvector(to_int(v), VecB);
  __builtin_memcpy(p, &bytes, sizeof bytes);
}

// A store that leaves the caches alone, to an aligned address; stream_fence() lets others see it.
BK_INLINE void stream(float* p, VecF v) {
#ifdef BK_MM
  BK_MM(stream_ps)(p, v);
#else
  store(p, v);
#endif
}
BK_INLINE void stream_fence() {
#ifdef BK_MM
  _mm_sfence();
#endif
}

template <class T>
BK_INLINE VecF load_pixels(const T* p) {
  return load<T>(p);
}
template <>
BK_INLINE VecF load_pixels(const uint8_t* p) {
  return to_float(load_bytes(p));
}

// Between planes and interleaved RGB, kLanes pixels a call.
template <size_t... I>
BK_INLINE void interleave(VecF r, VecF g, VecF b, VecF* out, std::index_sequence<I...>) {
  // Element i of output vector v is colour (v * kLanes + i) % 3 of pixel (v * kLanes + i) / 3.
  constexpr int n = kLanes;
  const auto place = [](int k) constexpr { return k % 3 == 1 ? n + k / 3 : k / 3; };
  const auto blue = [](int k, int i) constexpr { return k % 3 == 2 ? n + k / 3 : i; };
  const VecF rg0 = __builtin_shufflevector(r, g, place(int(I))...);
  const VecF rg1 = __builtin_shufflevector(r, g, place(n + int(I))...);
  const VecF rg2 = __builtin_shufflevector(r, g, place(2 * n + int(I))...);
  out[0] = __builtin_shufflevector(rg0, b, blue(int(I), int(I))...);
  out[1] = __builtin_shufflevector(rg1, b, blue(n + int(I), int(I))...);
  out[2] = __builtin_shufflevector(rg2, b, blue(2 * n + int(I), int(I))...);
}
template <int kFirst, size_t... I>
BK_INLINE VecF every_third(VecF a, VecF b, VecF c, std::index_sequence<I...>) {
  constexpr int n = kLanes;
  const auto early = [](int i) constexpr { return kFirst + 3 * i < 2 * n ? kFirst + 3 * i : 0; };
  const auto late = [](int i) constexpr { return kFirst + 3 * i < 2 * n ? i : kFirst + 3 * i - n; };
  const VecF ab = __builtin_shufflevector(a, b, early(int(I))...);
  return __builtin_shufflevector(ab, c, late(int(I))...);
}

// ---- scattered pixels ----

// p[index[i]] for indices that all lie in 0..2 * kLanes: `one` if below kLanes. Register
// permutations take a fraction of a gather's time.
BK_INLINE VecF take_near(const float* p, VecI index, bool one) {
#if defined(BK_AVX512)
  if (one) return _mm512_permutexvar_ps((__m512i)index, load(p));
  return _mm512_permutex2var_ps(load(p), (__m512i)index, load(p + kLanes));
#elif defined(BK_AVX2)
  const VecF low = _mm256_permutevar8x32_ps(load(p), (__m256i)index);
  if (one) return low;
  const VecF high = _mm256_permutevar8x32_ps(load(p + kLanes), (__m256i)index);
  return index < kLanes ? low : high;
#else
  return gather(p, index);
#endif
}

BK_INLINE VecU gather_words(const void* base, VecI byte) {
#if defined(BK_AVX512)
  return (VecU)_mm512_i32gather_epi32((__m512i)byte, base, 1);
#elif defined(BK_AVX2)
  return (VecU)_mm256_i32gather_epi32((const int*)base, (__m256i)byte, 1);
#else
  VecU v;
  for (int i = 0; i < kLanes; ++i) {
    uint32_t word;
    __builtin_memcpy(&word, static_cast<const char*>(base) + byte[i], 4);
    v[i] = word;
  }
  return v;
#endif
}

// The 32 bits at elements `index` of p[0..readable), without reading behind the last element: there
// the word before is fetched and shifted. What lies behind comes out as zeros.
template <class T>
BK_INLINE VecU words_at(const T* p, VecI index, int64_t readable) {
  constexpr int32_t kEach = 4 / int32_t(sizeof(T));
  if (readable < kEach) {  // the whole image is smaller than one word
    VecU v = {};
    for (int i = 0; i < kLanes; ++i) {
      uint32_t word = 0;
      __builtin_memcpy(&word, p + index[i], size_t(readable - index[i]) * sizeof(T));
      v[i] = word;
    }
    return v;
  }
  const VecI safe = vmini(index, set1i(int32_t(readable) - kEach));
  const VecI excess = (index - safe) * int32_t(8 * sizeof(T));
  return gather_words(p, safe * int32_t(sizeof(T))) >> (VecU)excess;
}

BK_INLINE VecF half_to_float(VecU bits) {  // as to_float(fp16) in common/dtypes.h
  const VecU magnitude = (bits & 0x7fffu) << 13;
  const VecF value = (VecF)magnitude * 0x1p112f;
  const VecU special = magnitude | 0x7f800000u;
  const VecU out = magnitude >= (0x7c00u << 13) ? special : (VecU)value;
  return (VecF)(out | ((bits & 0x8000u) << 16));
}

// Pixel number `which` of the word that words_at fetched.
template <class T>
BK_INLINE VecF unpack(VecU word, int which);
template <>
BK_INLINE VecF unpack<uint8_t>(VecU word, int which) {
  return to_float((VecI)((word >> (8 * which)) & 0xffu));
}
template <>
BK_INLINE VecF unpack<bf16>(VecU word, int which) {
  return (VecF)(which ? word & 0xffff0000u : word << 16);
}
template <>
BK_INLINE VecF unpack<fp16>(VecU word, int which) {
  return half_to_float(which ? word >> 16 : word & 0xffffu);
}

template <class T>
BK_INLINE VecF pixel_at(const T* p, VecI index, int64_t readable) {
  return unpack<T>(words_at<T>(p, index, readable), 0);
}
template <>
BK_INLINE VecF pixel_at(const float* p, VecI index, int64_t) {
  return gather(p, index);
}

// The pixels at `index` and right of it in a plane.
template <class T>
BK_INLINE void pair_at(const T* p, VecI index, int64_t readable, VecF& left, VecF& right) {
  const VecU word = words_at<T>(p, index, readable);
  left = unpack<T>(word, 0);
  right = unpack<T>(word, 1);
}
template <>
BK_INLINE void pair_at(const float* p, VecI index, int64_t, VecF& left, VecF& right) {
  left = gather(p, index);
  right = gather(p, index + 1);
}

// weight * pixel; for floats a weight of zero silences a NaN or an infinity.
template <class T>
BK_INLINE VecF weigh(VecF weight, VecF pixel) {
  if constexpr (std::is_same_v<T, uint8_t>) return weight * pixel;
  return weight != 0.0f ? weight * pixel : VecF{};
}

}  // namespace bigkernel::BK_ISA
