// One output pixel from the source: positions in double precision, weights and sums in fp32. Reads
// nothing outside the source box.
#pragma once
#include "augment/cuda.h"
#include "cuda/convert.h"

namespace bigkernel {

// The taps along one axis that lie inside the box: `count` from `first`, weights a triangle around
// `centre`, counted from `first`.
struct AugmentWindow {
  int32_t first, count;
  float centre, narrowness;  // 1 / half-width
  float scale;               // what makes the weights of the whole filter sum to 1
  float cover;               // how much of the filter is inside

  __device__ __forceinline__ float weight(int t) const {
    return fmaxf(0.0f, 1.0f - fabsf(float(t) - centre) * narrowness);
  }
};

// Sum of the triangle filter over all whole pixels; see _window_sum in
// bigkernel/ops/augment/reference.py.
__device__ __forceinline__ double window_sum(double s, double reach, double per_reach) {
  const double right = ceil(s - 0.5) + 0.5 - s;
  double total = 0;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const double distance = side ? 1.0 - right : right;
    const double n = fmax(ceil(reach - distance), 0.0);
    total += n - (n * distance + n * (n - 1.0) * 0.5) * per_reach;
  }
  return total;
}

__device__ __forceinline__ AugmentWindow window_at(double s, double reach, double per_reach,
                                                   int32_t begin, int32_t end,
                                                   AugmentBorder border) {
  AugmentWindow w;
  const bool narrow = reach == 1.0, clamped = border == AugmentBorder::kClamp;
  // Between the edge pixels' centres two taps inside do what clamped taps do.
  if (narrow && clamped) s = fmin(fmax(s, begin + 0.5), end - 0.5);
  const int32_t low = __double2int_rd(s - 0.5 - reach) + 1;
  const int32_t high = low + (narrow ? 2 : __double2int_rz(2.0 * reach) + 1);
  w.first = max(low, begin);
  w.count = max(min(high, end) - w.first, 0);
  w.centre = float(s - 0.5 - double(w.first));
  w.narrowness = 1.0f;
  w.scale = 1.0f;
  if (narrow) {
    w.cover = w.count == 2 ? 1.0f : w.count == 1 ? w.weight(0) : 0.0f;
    return w;
  }
  w.narrowness = float(per_reach);
  float inside = 0;
  for (int t = 0; t < w.count; ++t) inside += w.weight(t);
  const bool all = clamped || w.count == high - low;
  const float total = all ? inside : float(window_sum(s, reach, per_reach));
  w.scale = total > 0.0f ? __fdividef(1.0f, total) : 0.0f;
  w.cover = !(inside > 0.0f) ? 0.0f : all ? 1.0f : inside * w.scale;
  return w;
}

// weight * pixel; for floats a weight of zero silences a NaN or an infinity.
template <class In>
__device__ __forceinline__ float weigh(float weight, float pixel) {
  if constexpr (sizeof(In) == 1) return weight * pixel;
  return weight != 0.0f ? weight * pixel : 0.0f;
}

__device__ __forceinline__ int32_t nearest_index(double s, AugmentNearest rule, double origin,
                                                 double per_scale, double scale) {
  if (rule == AugmentNearest::kResize) {
    const double k = rint((s - origin) * per_scale - 0.5);
    // Rounded to fp32 before the floor, as interpolate(mode="nearest") does.
    return __float2int_rd(__fmul_rn(float(k), float(fabs(scale)))) + __double2int_rz(origin);
  }
  // Ties of exact arithmetic are to be ties: see _nearest in bigkernel/ops/augment/reference.py.
  if (rule == AugmentNearest::kEven)
    return __double2int_rn(rint((s - 0.5) * 65536.0) * (1.0 / 65536));
  return __double2int_rd(rint(s * 65536.0) * (1.0 / 65536));
}

// kWarp: positions in fp32, in the order in which torchvision rounds.
__device__ __forceinline__ float warped(const AugmentWarp& w, bool fused, float x, float y) {
  const float product = __fmul_rn(x, w.by_x);
  const float sum =
      fused ? __fmaf_rn(y, w.by_y, product) : __fadd_rn(product, __fmul_rn(y, w.by_y));
  return __fadd_rn(__fmul_rn(__fadd_rn(__fadd_rn(sum, w.shift), 1.0f), w.half), -0.5f);
}

// Channels c..c + kChannels of pixel (x, y) of out_w x out_h. fill: [kChannels], of these channels.
template <class In, int kChannels>
__device__ __forceinline__ void sample_pixel(const AugmentSample& s, const float* fill,
                                             bool nearest, uint32_t out_w, uint32_t out_h,
                                             uint32_t x, uint32_t y, int64_t c,
                                             float (&v)[kChannels]) {
  const AugmentGeometry& g = s.geometry;
  const int32_t* box = g.box;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) v[k] = fill[k];
  if (g.empty || int32_t(x) < g.out_box[0] || int32_t(x) >= g.out_box[2] ||
      int32_t(y) < g.out_box[1] || int32_t(y) >= g.out_box[3])
    return;
  const double* m = g.map;
  const double column = double(x) + 0.5, line = double(y) + 0.5;
  const double sx = m[0] * column + (m[1] * line + m[2]);
  const double sy = m[3] * column + (m[4] * line + m[5]);
  const bool warp = nearest && g.rule == AugmentNearest::kWarp;
  if (!warp && !(fabs(sx) <= kAugmentFar && fabs(sy) <= kAugmentFar)) return;
  const In* base = static_cast<const In*>(s.data) + c * s.stride_c;

  if (nearest) {
    int32_t i, j;
    if (warp) {
      const float right = float(x) + (0.5f - 0.5f * float(out_w));
      const float down = float(y) + (0.5f - 0.5f * float(out_h));
      const float wx = warped(g.warp_x, g.fused, right, down);
      const float wy = warped(g.warp_y, g.fused, right, down);
      constexpr float kFar = float(kAugmentFar);
      if (!(fabsf(wx) <= kFar && fabsf(wy) <= kFar)) return;
      i = __float2int_rn(wx) + box[0];
      j = __float2int_rn(wy) + box[1];
    } else {
      i = nearest_index(sx, s.rule_x, g.origin_x, s.per_scale_x, m[0]);
      j = nearest_index(sy, s.rule_y, g.origin_y, s.per_scale_y, m[4]);
    }
    const int32_t inner_i = min(max(i, box[0]), box[2] - 1);
    const int32_t inner_j = min(max(j, box[1]), box[3] - 1);
    if (g.border != AugmentBorder::kClamp && (i != inner_i || j != inner_j)) return;
    const In* p = base + inner_j * s.stride_y + inner_i * s.stride_x;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) v[k] = widen(p[k * s.stride_c]);
    return;
  }

  const AugmentWindow wx = window_at(sx, g.reach_x, s.per_reach_x, box[0], box[2], g.border);
  const AugmentWindow wy = window_at(sy, g.reach_y, s.per_reach_y, box[1], box[3], g.border);
  if (wx.cover == 0.0f || wy.cover == 0.0f) return;
  const In* row = base + wy.first * s.stride_y + wx.first * s.stride_x;
  float sum[kChannels] = {};
  if (g.reach_x == 1.0 && g.reach_y == 1.0 && wx.count == 2 && wy.count == 2) {
    const float right = wx.centre, down = wy.centre;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const In* p = row + k * s.stride_c;
      const float v00 = widen(p[0]), v01 = widen(p[s.stride_x]);
      const float v10 = widen(p[s.stride_y]), v11 = widen(p[s.stride_y + s.stride_x]);
      if constexpr (sizeof(In) == 1) {  // differences of bytes are exact
        const float top = v00 + right * (v01 - v00), bottom = v10 + right * (v11 - v10);
        v[k] = top + down * (bottom - top);
      } else {
        const float top = weigh<In>(1.0f - right, v00) + weigh<In>(right, v01);
        const float bottom = weigh<In>(1.0f - right, v10) + weigh<In>(right, v11);
        v[k] = weigh<In>(1.0f - down, top) + weigh<In>(down, bottom);
      }
    }
    return;
  }
  for (int j = 0; j < wy.count; ++j, row += s.stride_y) {
    const float weight_y = wy.weight(j);
    float across[kChannels] = {};
    const In* p = row;
#pragma unroll 2
    for (int i = 0; i < wx.count; ++i, p += s.stride_x) {
      const float weight_x = wx.weight(i);
#pragma unroll
      for (int k = 0; k < kChannels; ++k)
        across[k] += weigh<In>(weight_x, widen(p[k * s.stride_c]));
    }
#pragma unroll
    for (int k = 0; k < kChannels; ++k) sum[k] += weigh<In>(weight_y, across[k]);
  }
  const float scale = wx.scale * wy.scale, cover = wx.cover * wy.cover;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const float inside = sum[k] * scale, fill_k = v[k];
    v[k] = cover == 1.0f                           ? inside
           : g.border == AugmentBorder::kFillBlend ? cover * (inside - fill_k) + fill_k
                                                   : inside + (1.0f - cover) * fill_k;
  }
}

}  // namespace bigkernel
