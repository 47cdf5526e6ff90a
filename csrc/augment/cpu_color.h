// The colour chain on one line of the output, in fp32, each vector of pixels through all of it.
// Whole-number operations first round to what a uint8 image would hold and cut their result, as
// torchvision does.
#pragma once

#include "augment/cpu_texels.h"

namespace bigkernel::BK_ISA {

// Clamps that let NaN through (vmax and vmin give the second operand where either is NaN).
BK_INLINE VecF clamp_to(VecF v, float bound) { return vmin(set1(bound), vmax(VecF{}, v)); }
BK_INLINE VecF cut(VecF v) { return to_float(to_int(v)); }  // towards zero; v within 0..256
BK_INLINE VecF to_byte(VecF v) {  // nearest whole number in 0..255, halves to even
  v = vmin(set1(255.0f), vmax(VecF{}, v));
  return (v + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23
}

// Sums are fused where PyTorch's are: the last bit decides which whole number a value is cut to.
BK_INLINE VecF grey_of(VecF r, VecF g, VecF b) {
  const VecF grey = fused(g, set1(0.587f), rounded(r * 0.2989f));
  return fused(b, set1(0.114f), grey);
}
BK_INLINE VecF blend(VecF v, float factor, VecF grey) {
  return fused(grey, set1(1.0f - factor), rounded(v * factor));
}

struct Line {
  float* p;  // [channels, pitch]
  int64_t channels, pitch, width;
  float bound;
};

// One vector of pixels, all three channels of RGB or a single one.
template <int kChannels>
struct Pixels {
  VecF v[kChannels];

  template <class F>
  BK_INLINE void each(const F& f) {
    for (int c = 0; c < kChannels; ++c) v[c] = f(v[c]);
  }
  BK_INLINE void clamp_and_cut(float bound, bool whole) {
    each([=](VecF x) { return clamp_to(x, bound); });
    if (whole) each([](VecF x) { return cut(x); });
  }
};

BK_INLINE VecF grey_of(const Pixels<3>& p, bool whole) {
  const VecF grey = grey_of(p.v[0], p.v[1], p.v[2]);
  return whole ? cut(grey) : grey;
}

template <bool kWhole, int kChannels>
BK_INLINE void brighten(Pixels<kChannels>& p, float factor, float bound) {
  p.each([=](VecF x) { return x * factor; });
  p.clamp_and_cut(bound, kWhole);
}

template <bool kWhole, int kChannels>
BK_INLINE void blend_all(Pixels<kChannels>& p, float factor, VecF grey, float bound) {
  p.each([=](VecF x) { return blend(x, factor, grey); });
  p.clamp_and_cut(bound, kWhole);
}

// With the hue h in 0..6, red is v - (max - min) * clamp(2 - |h - 3|, 0, 1), green the same of
// |h - 2| - 1 and blue of |h - 4| - 1: _turn_hue in bigkernel/ops/augment/reference.py, unrolled.
template <bool kWhole>
BK_INLINE void turn_hue(Pixels<3>& p, float factor) {
  const float turn = 6.0f * (factor - __builtin_floorf(factor));
  const VecF r = p.v[0], g = p.v[1], b = p.v[2];
  const VecF high = vmax(r, vmax(g, b)), low = vmin(r, vmin(g, b));
  const VecF chroma = high - low;
  // Of less than this the inverse is infinite; it is grey.
  const VecF inverse = 1.0f / (chroma < 0x1p-126f ? set1(1.0f) : chroma);
  const VecI reddest = high == r, greenest = high == g;
  const VecF across = reddest ? g - b : (greenest ? b - r : r - g);
  const VecF base = reddest ? set1(turn) : (greenest ? set1(turn + 2.0f) : set1(turn + 4.0f));
  VecF hue = across * inverse + base;  // -1..11
  hue = hue < 0.0f ? hue + 6.0f : hue;
  hue = hue >= 6.0f ? hue - 6.0f : hue;
  const auto share = [=](VecF x) { return high - chroma * vmin(set1(1.0f), vmax(VecF{}, x)); };
  p.v[0] = share(2.0f - vabs(hue - 3.0f));
  p.v[1] = share(vabs(hue - 2.0f) - 1.0f);
  p.v[2] = share(vabs(hue - 4.0f) - 1.0f);
  if constexpr (kWhole) {  // torchvision's conversion back to uint8
    constexpr float kScale = 255.999f / 255.0f;
    p.each([](VecF x) { return cut(x * kScale); });
  }
}

template <bool kWhole, int kChannels>
BK_INLINE void recolor(Pixels<kChannels>& p, const AugmentColor& color, float mean_grey,
                       float bound) {
  if (color.op == AugmentOp::kBrightness) return brighten<kWhole>(p, color.factor, bound);
  if (color.op == AugmentOp::kContrast)
    return blend_all<kWhole>(p, color.factor, set1(mean_grey), bound);
  if constexpr (kChannels == 3) {
    if (color.op == AugmentOp::kSaturation)
      blend_all<kWhole>(p, color.factor, grey_of(p, kWhole), bound);
    else if (color.op == AugmentOp::kHue)
      turn_hue<kWhole>(p, color.factor);
    else
      p.v[0] = p.v[1] = p.v[2] = grey_of(p, kWhole);
  }
}

// Colours first..last of the chain, each vector of pixels through all of them. `whole`: the line
// holds whole numbers already.
template <int kChannels>
inline void recolor_planes(const Line& line, float* planes, const AugmentColor* first,
                           const AugmentColor* last, float mean_grey, bool whole) {
  for (int64_t x = 0; x < line.width; x += kLanes) {
    Pixels<kChannels> p;
    for (int c = 0; c < kChannels; ++c) p.v[c] = load(planes + c * line.pitch + x);
    bool rounded = whole;
    for (const AugmentColor* color = first; color != last; ++color) {
      if (color->whole && !rounded) p.each([](VecF v) { return to_byte(v); });
      rounded = color->whole;
      if (rounded)
        recolor<true>(p, *color, mean_grey, line.bound);
      else
        recolor<false>(p, *color, mean_grey, line.bound);
    }
    for (int c = 0; c < kChannels; ++c) store<float>(planes + c * line.pitch + x, p.v[c]);
  }
}
inline void recolor_line(const Line& line, const AugmentColor* first, const AugmentColor* last,
                         float mean_grey, bool whole) {
  if (first == last) return;
  if (line.channels == 3) return recolor_planes<3>(line, line.p, first, last, mean_grey, whole);
  for (int64_t c = 0; c < line.channels; ++c)
    recolor_planes<1>(line, line.p + c * line.pitch, first, last, mean_grey, whole);
}

// Keeps a line for the contrast that comes next, as bytes if that works in whole numbers, and
// returns the sum of its grey values: over all channels where there are not three.
template <bool kWhole>
inline double hold_line(const Line& line, void* to, int64_t plane) {
  double total = 0;
  const bool rgb = line.channels == 3;
  const int64_t rounds = rgb ? 1 : line.channels;
  for (int64_t round = 0; round < rounds; ++round) {
    VecF sum = {};
    for (int64_t x = 0; x < line.width; x += kLanes) {
      const auto keep = [&](int64_t c) {
        VecF v = load(line.p + c * line.pitch + x);
        if constexpr (kWhole) {
          v = to_byte(v);
          store_bytes(static_cast<uint8_t*>(to) + c * plane + x, v);
        } else {
          store<float>(static_cast<float*>(to) + c * plane + x, v);
        }
        return v;
      };
      VecF grey = keep(round);
      if (rgb) {
        const VecF green = keep(1), blue = keep(2);
        grey = grey_of(grey, green, blue);
        if constexpr (kWhole) grey = cut(grey);
      }
      const int64_t rest = line.width - x;
      sum += rest >= kLanes ? grey : (lane_index() < int32_t(rest) ? grey : VecF{});
    }
    // Lines are added up in double; a line's own sum of whole numbers is exact in fp32.
    float lanes[kLanes];
    store<float>(lanes, sum);
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
  }
  return total;
}
// T: uint8_t or float.
template <class T>
inline void load_held(const Line& line, const void* from, int64_t plane) {
  for (int64_t c = 0; c < line.channels; ++c)
    for (int64_t x = 0; x < line.width; x += kLanes)
      store<float>(line.p + c * line.pitch + x,
                   load_pixels(static_cast<const T*>(from) + c * plane + x));
}

}  // namespace bigkernel::BK_ISA
