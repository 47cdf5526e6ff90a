// Sampling by any map: kLanes output pixels at a time, positions in double precision, taps through
// gathers. Where all taps of a vector lie inside the source box nothing is masked.
#pragma once

#include "augment/cpu_packed.h"

namespace bigkernel::BK_ISA {

typedef double VecD __attribute__((vector_size(8 * BK_LANES)));
typedef int64_t VecL __attribute__((vector_size(8 * BK_LANES)));

BK_INLINE VecI narrow(VecL mask) { return __builtin_convertvector(mask, VecI); }

// Positions along one axis: where |s| is finite and near, else 0 and not reachable.
BK_INLINE VecD reachable_or_zero(VecD s, VecL& reachable) {
  reachable &= (s >= -kAugmentFar) & (s <= kAugmentFar);
  return reachable ? s : VecD{};
}
BK_INLINE VecI floor_of(VecD s, VecD& whole) {
  VecI i = __builtin_convertvector(s, VecI);
  whole = __builtin_convertvector(i, VecD);
  const VecL above = whole > s;
  whole += above ? VecD{} - 1.0 : VecD{};
  return i + narrow(above);
}

BK_INLINE VecD round_to_even(VecD s) {      // |s| below 2^51
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  return (s + magic) - magic;
}
BK_INLINE VecI nearest_index(VecD s, AugmentNearest rule) {
  // Ties of exact arithmetic are to be ties: see _nearest in bigkernel/ops/augment/reference.py.
  if (rule == AugmentNearest::kEven) {
    const VecD snapped = round_to_even((s - 0.5) * 65536.0) * (1.0 / 65536);
    return __builtin_convertvector(round_to_even(snapped), VecI);
  }
  VecD whole;
  return floor_of(round_to_even(s * 65536.0) * (1.0 / 65536), whole);
}

// The filter's window along one axis: `count` taps from `first`, at distances t - `centre`.
struct Window {
  VecI first;
  VecF centre;
  int64_t count;
  float narrowness;    // 1 / half-width
  int32_t begin, end;  // source box
  bool clamped;        // taps outside go to the edge pixel
  VecF scale;          // what makes all weights sum to 1

  BK_INLINE VecF triangle(int64_t t) const {
    return vmax(VecF{}, 1.0f - vabs(float(t) - centre) * narrowness);
  }
  // Tap t: its index, safe to read, and its weight, zero outside.
  BK_INLINE VecI tap(int64_t t, VecF& weight) const {
    const VecI index = first + int32_t(t);
    weight = triangle(t) * scale;
    if (!clamped) weight = (index >= begin) & (index < end) ? weight : VecF{};
    return clampi(index, begin, end - 1);
  }
};

// Sum of the triangle filter over all whole pixels; see _window_sum in
// bigkernel/ops/augment/reference.py.
inline double window_sum(double s, double reach) {
  const double right = __builtin_ceil(s - 0.5) + 0.5 - s;
  const double distances[2] = {right, 1 - right};
  double total = 0;
  for (const double distance : distances) {
    const double n = __builtin_ceil(reach - distance);
    if (n > 0) total += n - (n * distance + n * (n - 1) / 2) / reach;
  }
  return total;
}

BK_INLINE Window window(VecD s, double reach, int32_t begin, int32_t end, AugmentBorder border) {
  Window w;
  VecD whole;
  w.first = floor_of(s - 0.5 - reach, whole) + 1;
  w.begin = begin;
  w.end = end;
  w.narrowness = float(1.0 / reach);
  w.clamped = border == AugmentBorder::kClamp && reach == 1.0;
  w.scale = set1(1.0f);
  w.count = reach == 1.0 ? 2 : int64_t(2 * reach) + 1;
  const bool wide = w.count > int64_t(end - begin) + 2;
  if (wide) {  // the window goes beyond the box on both sides: only walk the box
    w.first = set1i(begin);
    whole = VecD{} + double(begin - 1);
    w.count = end - begin;
  }
  w.centre = __builtin_convertvector(s - 0.5 - (whole + 1.0), VecF);
  if (reach == 1.0) return w;
  VecF total = {};
  if (wide && border != AugmentBorder::kClamp) {
    for (int i = 0; i < kLanes; ++i) total[i] = float(window_sum(s[i], reach));
  } else {
    for (int64_t t = 0; t < w.count; ++t) {
      const VecI index = w.first + int32_t(t);
      const VecF weight = w.triangle(t);
      const VecI inside = (index >= begin) & (index < end);
      total += border == AugmentBorder::kClamp ? (inside ? weight : VecF{}) : weight;
    }
  }
  w.scale = total > 0.0f ? 1.0f / total : VecF{};
  return w;
}

template <class T>
struct MapSampler {
  const AugmentPlan& plan;
  const T* base;
  int64_t channels, width, height;  // of the output
  float* lines;                     // [channels, pitch]
  int64_t pitch;
  const PackedSampler& packed;  // ready if plan.packed

  // Taps that all lie inside: two gathers of neighbours a channel in planes, four of all colours in
  // interleaved RGB.
  BK_INLINE void inner_bilinear(int64_t x, VecI column, VecI line, VecF fx, VecF fy) const {
    const AugmentImage& image = plan.image;
    const VecI stride_y = set1i(int32_t(image.stride_y));
    const VecI stride_x = set1i(int32_t(image.stride_x));
    const VecI above = line * stride_y + column * stride_x;
    const VecI below = above + stride_y;
    if constexpr (std::is_same_v<T, uint8_t>) {
      if (image.stride_x == 3 && channels == 3) {
        const VecU w00 = words_at<T>(base, above, image.readable);
        const VecU w01 = words_at<T>(base, above + 3, image.readable);
        const VecU w10 = words_at<T>(base, below, image.readable);
        const VecU w11 = words_at<T>(base, below + 3, image.readable);
        for (int c = 0; c < 3; ++c)
          put(x, c, unpack<T>(w00, c), unpack<T>(w01, c), unpack<T>(w10, c), unpack<T>(w11, c), fx,
              fy);
        return;
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      const T* plane = base + c * image.stride_c;
      const int64_t readable = image.readable - (image.stride_x == 1 ? 0 : c);
      VecF v00, v01, v10, v11;
      if (image.stride_x == 1) {
        pair_at<T>(plane, above, readable, v00, v01);
        pair_at<T>(plane, below, readable, v10, v11);
      } else {
        v00 = pixel_at<T>(plane, above, readable);
        v01 = pixel_at<T>(plane, above + stride_x, readable);
        v10 = pixel_at<T>(plane, below, readable);
        v11 = pixel_at<T>(plane, below + stride_x, readable);
      }
      put(x, c, v00, v01, v10, v11, fx, fy);
    }
  }

  BK_INLINE void put(int64_t x, int64_t c, VecF v00, VecF v01, VecF v10, VecF v11, VecF fx,
                     VecF fy) const {
    VecF v;
    if constexpr (std::is_same_v<T, uint8_t>) {
      const VecF top = v00 + fx * (v01 - v00);
      const VecF bottom = v10 + fx * (v11 - v10);
      v = top + fy * (bottom - top);
    } else {
      const VecF top = weigh<T>(1.0f - fx, v00) + weigh<T>(fx, v01);
      const VecF bottom = weigh<T>(1.0f - fx, v10) + weigh<T>(fx, v11);
      v = weigh<T>(1.0f - fy, top) + weigh<T>(fy, bottom);
    }
    store<float>(lines + c * pitch + x, v);
  }

  // Any number of taps, any of them outside.
  BK_INLINE void filtered(int64_t x, VecD sx, VecD sy, VecI reachable) const {
    const AugmentImage& image = plan.image;
    const Window wx = window(sx, plan.reach_x, plan.box[0], plan.box[2], plan.border);
    const Window wy = window(sy, plan.reach_y, plan.box[1], plan.box[3], plan.border);
    for (int64_t c = 0; c < channels; ++c) {
      const T* plane = base + c * image.stride_c;
      const int64_t readable = image.readable - (image.stride_x == 1 ? 0 : c);
      VecF sum = {}, cover = {};
      for (int64_t j = 0; j < wy.count; ++j) {
        VecF weight_y;
        const VecI line = wy.tap(j, weight_y) * int32_t(image.stride_y);
        for (int64_t i = 0; i < wx.count; ++i) {
          VecF weight_x;
          const VecI column = wx.tap(i, weight_x) * int32_t(image.stride_x);
          const VecF weight = weight_y * weight_x;
          sum += weigh<T>(weight, pixel_at<T>(plane, line + column, readable));
          cover += weight;
        }
      }
      const float fill = plan.fill[c];
      const VecF blended = plan.border == AugmentBorder::kFillBlend ? cover * (sum - fill) + fill
                                                                    : sum + (1.0f - cover) * fill;
      store<float>(lines + c * pitch + x, reachable ? blended : set1(fill));
    }
  }

  // kWarp: positions in fp32, in the order in which torchvision rounds.
  void warped_line(int64_t y) const {
    const float right = 0.5f - 0.5f * float(width), down = float(y) + 0.5f - 0.5f * float(height);
    const auto position = [&](const AugmentWarp& w, VecF at) {
      const VecF product = rounded(at * w.by_x);
      const VecF sum = plan.fused ? fused(set1(down), set1(w.by_y), product)
                                  : product + rounded(set1(down) * w.by_y);
      return rounded(((sum + w.shift) + 1.0f) * w.half) - 0.5f;
    };
    constexpr float kFar = float(kAugmentFar);
    for (int64_t x = plan.out_box[0]; x < plan.out_box[2]; x += kLanes) {
      const VecF at = to_float(lane_index() + int32_t(x)) + right;
      VecF sx = position(plan.warp_x, at), sy = position(plan.warp_y, at);
      const VecI reachable = (vabs(sx) <= kFar) & (vabs(sy) <= kFar);
      sx = reachable ? sx : VecF{};
      sy = reachable ? sy : VecF{};
      nearest(x, to_int(vround(sx)) + plan.box[0], to_int(vround(sy)) + plan.box[1], reachable);
    }
  }

  BK_INLINE void nearest(int64_t x, VecI column, VecI line, VecI reachable) const {
    const AugmentImage& image = plan.image;
    const int32_t* box = plan.box;
    const VecI clamped_x = clampi(column, box[0], box[2] - 1);
    const VecI clamped_y = clampi(line, box[1], box[3] - 1);
    VecI inside = reachable;
    if (plan.border != AugmentBorder::kClamp) inside &= (column == clamped_x) & (line == clamped_y);
    const VecI index = clamped_y * int32_t(image.stride_y) + clamped_x * int32_t(image.stride_x);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t readable = image.readable - (image.stride_x == 1 ? 0 : c);
      const VecF v = pixel_at<T>(base + c * image.stride_c, index, readable);
      store<float>(lines + c * pitch + x, inside ? v : set1(plan.fill[c]));
    }
  }

  // Output line y, columns out_box[0]..out_box[2] rounded up to whole vectors.
  void line(int64_t y, bool is_nearest) const {
    if (is_nearest && plan.rule == AugmentNearest::kWarp) return warped_line(y);
    const double* m = plan.map;
    const double shift_x = m[1] * (double(y) + 0.5) + m[2];
    const double shift_y = m[4] * (double(y) + 0.5) + m[5];
    const int32_t* box = plan.box;
    const bool narrow_filter = plan.reach_x == 1.0 && plan.reach_y == 1.0;
    const bool inner = !is_nearest && narrow_filter;
    // Inside these bounds all taps lie in the box, with room for rounding.
    const double x_low = box[0] + 0.5 + 1e-6, x_high = box[2] - 0.5 - 1e-6;
    const double y_low = box[1] + 0.5 + 1e-6, y_high = box[3] - 0.5 - 1e-6;
    const VecD lane = __builtin_convertvector(lane_index(), VecD) + 0.5;
    const auto within = [](double start, double step, double low, double high) {
      const double stop = start + step * (kLanes - 1);
      return start > low && start < high && stop > low && stop < high;
    };
    for (int64_t x = plan.out_box[0]; x < plan.out_box[2]; x += kLanes) {
      const double first = double(x) + 0.5;
      if (plan.packed && packed.sample(x, first * m[0] + shift_x, first * m[3] + shift_y)) continue;
      VecD sx = (lane + double(x)) * m[0] + shift_x;
      VecD sy = (lane + double(x)) * m[3] + shift_y;
      if (inner && within(first * m[0] + shift_x, m[0], x_low, x_high) &&
          within(first * m[3] + shift_y, m[3], y_low, y_high)) {
        sx -= 0.5;  // and still positive: cutting is the floor
        sy -= 0.5;
        const VecI column = __builtin_convertvector(sx, VecI);
        const VecI row = __builtin_convertvector(sy, VecI);
        const VecD right = sx - __builtin_convertvector(column, VecD);
        const VecD down = sy - __builtin_convertvector(row, VecD);
        inner_bilinear(x, column, row, __builtin_convertvector(right, VecF),
                       __builtin_convertvector(down, VecF));
        continue;
      }
      VecL near = VecL{} - 1;
      reachable_or_zero(sx, near);
      reachable_or_zero(sy, near);
      sx = near ? sx : VecD{};
      sy = near ? sy : VecD{};
      if (is_nearest)
        nearest(x, nearest_index(sx, plan.rule), nearest_index(sy, plan.rule), narrow(near));
      else
        filtered(x, sx, sy, narrow(near));
    }
  }
};

}  // namespace bigkernel::BK_ISA
