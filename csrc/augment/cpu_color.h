// The colour chain on one line of the output, in fp32. Whole-number operations first round to what
// a uint8 image would hold and cut their result, as torchvision does.
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

// Applies f(r, g, b) to whole vectors of three channels.
template <class F>
BK_INLINE void each_rgb(const Line& line, const F& f) {
  float *red = line.p, *green = red + line.pitch, *blue = green + line.pitch;
  for (int64_t x = 0; x < line.width; x += kLanes) {
    VecF r = load(red + x), g = load(green + x), b = load(blue + x);
    f(r, g, b);
    store<float>(red + x, r);
    store<float>(green + x, g);
    store<float>(blue + x, b);
  }
}

template <class F>
BK_INLINE void each_channel(const Line& line, const F& f) {
  for (int64_t c = 0; c < line.channels; ++c) {
    float* p = line.p + c * line.pitch;
    for (int64_t x = 0; x < line.width; x += kLanes) store<float>(p + x, f(load(p + x)));
  }
}

template <bool kWhole>
BK_INLINE void brighten_line(const Line& line, float factor) {
  const float bound = line.bound;
  each_channel(line, [=](VecF v) {
    if constexpr (kWhole) v = to_byte(v);
    v = clamp_to(v * factor, bound);
    return kWhole ? cut(v) : v;
  });
}

template <bool kWhole>
BK_INLINE void contrast_line(const Line& line, float factor, float mean_grey) {
  const float bound = line.bound;
  const VecF grey = set1(mean_grey);
  each_channel(line, [=](VecF v) {
    if constexpr (kWhole) v = to_byte(v);
    v = clamp_to(blend(v, factor, grey), bound);
    return kWhole ? cut(v) : v;
  });
}

template <bool kWhole>
BK_INLINE void saturate_line(const Line& line, float factor) {
  const float bound = line.bound;
  each_rgb(line, [=](VecF& r, VecF& g, VecF& b) {
    if constexpr (kWhole) r = to_byte(r), g = to_byte(g), b = to_byte(b);
    VecF grey = grey_of(r, g, b);
    if constexpr (kWhole) grey = cut(grey);
    r = clamp_to(blend(r, factor, grey), bound);
    g = clamp_to(blend(g, factor, grey), bound);
    b = clamp_to(blend(b, factor, grey), bound);
    if constexpr (kWhole) r = cut(r), g = cut(g), b = cut(b);
  });
}

template <bool kWhole>
BK_INLINE void grey_line(const Line& line) {
  each_rgb(line, [](VecF& r, VecF& g, VecF& b) {
    if constexpr (kWhole) r = to_byte(r), g = to_byte(g), b = to_byte(b);
    VecF grey = grey_of(r, g, b);
    if constexpr (kWhole) grey = cut(grey);
    r = g = b = grey;
  });
}

// See _turn_hue in reference/augment.py: a channel is v - (max - min) * clamp(min(k, 4 - k), 0, 1).
template <bool kWhole>
BK_INLINE void turn_line(const Line& line, float factor) {
  const float turn = 6.0f * (factor - __builtin_floorf(factor));  // 0..6, so every k is positive
  each_rgb(line, [=](VecF& r, VecF& g, VecF& b) {
    if constexpr (kWhole) r = to_byte(r), g = to_byte(g), b = to_byte(b);
    const VecF high = vmax(r, vmax(g, b)), low = vmin(r, vmin(g, b));
    const VecF chroma = high - low;
    const VecF inverse = 1.0f / (chroma == 0.0f ? set1(1.0f) : chroma);
    const VecF sector = high == r   ? (g - b) * inverse
                        : high == g ? (b - r) * inverse + 2.0f
                                    : (r - g) * inverse + 4.0f;
    const VecF hue = sector + turn;
    const auto channel = [=](float offset) {
      VecF k = hue + offset;
      k -= 6.0f * cut(k * (1.0f / 6.0f));
      const VecF down = vmin(k, 4.0f - k);
      return high - chroma * vmin(set1(1.0f), vmax(VecF{}, down));
    };
    r = channel(5.0f), g = channel(3.0f), b = channel(1.0f);
    if constexpr (kWhole) {  // torchvision's conversion back to uint8
      constexpr float kScale = 255.999f / 255.0f;
      r = cut(r * kScale), g = cut(g * kScale), b = cut(b * kScale);
    }
  });
}

template <bool kWhole>
inline void color_line(const Line& line, const AugmentColor& color, float mean_grey) {
  switch (color.op) {
    case AugmentOp::kBrightness:
      return brighten_line<kWhole>(line, color.factor);
    case AugmentOp::kContrast:
      return contrast_line<kWhole>(line, color.factor, mean_grey);
    case AugmentOp::kSaturation:
      return saturate_line<kWhole>(line, color.factor);
    case AugmentOp::kHue:
      return turn_line<kWhole>(line, color.factor);
    case AugmentOp::kGreyscale:
      return grey_line<kWhole>(line);
  }
}

// Sum of the grey values of a line, as contrast takes their mean: over all channels where there are
// not three.
template <bool kWhole>
inline double grey_sum(const Line& line) {
  const bool rgb = line.channels == 3;
  VecF sum = {};
  double total = 0;
  const int64_t rounds = rgb ? 1 : line.channels;
  for (int64_t c = 0; c < rounds; ++c) {
    const float* p = line.p + c * line.pitch;
    for (int64_t x = 0; x < line.width; x += kLanes) {
      const auto at = [&](int64_t channel) {
        const VecF v = load(p + channel * line.pitch + x);
        return kWhole ? to_byte(v) : v;
      };
      VecF grey = at(0);
      if (rgb) grey = grey_of(grey, at(1), at(2));
      if (kWhole && rgb) grey = cut(grey);
      const int64_t rest = line.width - x;
      sum += rest >= kLanes ? grey : (lane_index() < int32_t(rest) ? grey : VecF{});
    }
    // Lines are added up in double; a line's own sum of whole numbers is exact in fp32.
    float lanes[kLanes];
    store<float>(lanes, sum);
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
    sum = VecF{};
  }
  return total;
}

}  // namespace bigkernel::BK_ISA
