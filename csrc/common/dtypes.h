// Element types as plain structs, so that kernels need no torch header.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define BK_HD __host__ __device__ __forceinline__
#else
#define BK_HD inline
#endif

namespace bigkernel {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// The values cross the binding as plain integers: keep them.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3, kBool = 4 };

constexpr int64_t dtype_size(DType t) {
  return t == DType::kFloat32 ? 4 : (t == DType::kBFloat16 || t == DType::kFloat16) ? 2 : 1;
}

namespace detail {
BK_HD float bits_to_float(uint32_t u) {
  union {
    uint32_t u;
    float f;
  } x{u};
  return x.f;
}
BK_HD uint32_t float_to_bits(float f) {
  union {
    float f;
    uint32_t u;
  } x{f};
  return x.u;
}
}  // namespace detail

BK_HD float to_float(float x) { return x; }
BK_HD float to_float(bf16 x) { return detail::bits_to_float(uint32_t(x.bits) << 16); }

BK_HD float to_float(fp16 x) {
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127, subnormals included.
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const bool special = magnitude >= (0x7c00u << 13);  // infinity or NaN
  const float value = detail::bits_to_float(magnitude) * detail::bits_to_float(0x77800000u);
  const uint32_t bits = special ? (magnitude | 0x7f800000u) : detail::float_to_bits(value);
  return detail::bits_to_float(bits | sign);
}

BK_HD float from_float(float x, float*) { return x; }

BK_HD bf16 from_float(float x, bf16*) {
  const uint32_t u = detail::float_to_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40u)};  // keep it a NaN
  return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

BK_HD fp16 from_float(float x, fp16*) {
  const uint32_t u = detail::float_to_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7e00u;
  } else if (a >= 0x477ff000u) {  // rounds to 65536 or more
    h = 0x7c00u;
  } else if (a < 0x38800000u) {  // subnormal: let an addition do the rounding
    h = detail::float_to_bits(detail::bits_to_float(a) + 0.5f) - 0x3f000000u;
  } else {
    h = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  }
  return fp16{uint16_t(h | sign)};
}

template <class T>
BK_HD T round_to(float x) {
  return from_float(x, static_cast<T*>(nullptr));
}

}  // namespace bigkernel
