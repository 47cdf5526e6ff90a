// The colour chain on one pixel, in fp32: cpu_color.h says the same for vectors. Whole-number
// operations first round to what a uint8 image would hold and cut their result.
#pragma once
#include "augment/augment.h"

namespace bigkernel {

// Lets NaN through, as torch's clamp does.
__device__ __forceinline__ float clamp_to(float v, float bound) {
  v = v < 0.0f ? 0.0f : v;
  return v > bound ? bound : v;
}
// fmaxf and fminf, but NaN if either is, as torch's aminmax and clamp.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ float min_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ float to_byte(float v) { return rintf(clamp_to(v, 255.0f)); }

// Sums are fused where PyTorch's are: the last bit decides which whole number a value is cut to.
__device__ __forceinline__ float grey_of(const float (&v)[3]) {
  return __fmaf_rn(v[2], 0.114f, __fmaf_rn(v[1], 0.587f, __fmul_rn(v[0], 0.2989f)));
}

// See _turn_hue in bigkernel/ops/augment/reference.py: a channel is v - (max - min) * clamp(min(k,
// 4 - k), 0, 1).
__device__ __forceinline__ void turn_hue(float (&v)[3], float factor) {
  const float high = max_nan(v[0], max_nan(v[1], v[2])), low = min_nan(v[0], min_nan(v[1], v[2]));
  // Of less than this the inverse is infinite; it is grey.
  const float chroma = high - low, inverse = __fdividef(1.0f, chroma < 0x1p-126f ? 1.0f : chroma);
  const float sector = high == v[0]   ? (v[1] - v[2]) * inverse
                       : high == v[1] ? (v[2] - v[0]) * inverse + 2.0f
                                      : (v[0] - v[1]) * inverse + 4.0f;
  const float hue = sector + 6.0f * (factor - floorf(factor));  // so that every k is positive
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    float k = hue + float(5 - 2 * c);
    k -= 6.0f * truncf(k * (1.0f / 6.0f));
    v[c] = high - chroma * min_nan(1.0f, max_nan(0.0f, min_nan(k, 4.0f - k)));
  }
}

// mean_grey: of the whole image, for contrast.
template <int kChannels>
__device__ __forceinline__ void recolor(float (&v)[kChannels], const AugmentColor& color,
                                        float bound, float mean_grey) {
  const bool whole = color.whole;
  const float factor = color.factor;
  float grey = mean_grey;
  if (whole) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) v[c] = to_byte(v[c]);
  }
  if constexpr (kChannels == 3) {
    if (color.op == AugmentOp::kHue) {
      turn_hue(v, factor);
      if (whole) {  // torchvision's conversion back to uint8
#pragma unroll
        for (int c = 0; c < 3; ++c) v[c] = truncf(v[c] * (255.999f / 255.0f));
      }
      return;
    }
    if (color.op == AugmentOp::kSaturation || color.op == AugmentOp::kGreyscale)
      grey = whole ? truncf(grey_of(v)) : grey_of(v);
    if (color.op == AugmentOp::kGreyscale) {
      v[0] = v[1] = v[2] = grey;
      return;
    }
  }
  const bool bright = color.op == AugmentOp::kBrightness;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const float scaled = __fmul_rn(v[c], factor);
    v[c] = clamp_to(bright ? scaled : __fmaf_rn(grey, 1.0f - factor, scaled), bound);
    if (whole) v[c] = truncf(v[c]);
  }
}

// What contrast takes the mean of.
template <int kChannels>
__device__ __forceinline__ float grey_for_mean(const float (&v)[kChannels], bool whole) {
  float u[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) u[c] = whole ? to_byte(v[c]) : v[c];
  if constexpr (kChannels == 3) return whole ? truncf(grey_of(u)) : grey_of(u);
  return u[0];
}

}  // namespace bigkernel
