// Sampling by an axis-aligned map: the source rows of an output line are combined first, reading
// memory in order, then its columns, from a scratch line that stays in the cache.
namespace bigkernel::BK_ISA {

// dst[i] = sum_t weight[t] * row(t)[i] for i in 0..n. Reads nothing outside the rows.
template <class T>
BK_INLINE void combine_rows(const T* first, int64_t stride, const float* weight, int64_t count,
                            int64_t n, float* dst) {
  if (n < kLanes) {
    // The sum stays in a register: it is rounded as below, whatever the layout of the image.
    const auto row = [&](int64_t t) {
      T pixels[kLanes] = {};
      for (int64_t i = 0; i < n; ++i) pixels[i] = first[t * stride + i];
      return load_pixels(static_cast<const T*>(pixels));
    };
    VecF sum = row(0) * weight[0];
    for (int64_t t = 1; t < count; ++t) sum += row(t) * weight[t];
    store_n<float>(dst, sum, int(n));
    return;
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    i = i > n - kLanes ? n - kLanes : i;  // the last vector overlaps the one before
    VecF sum = load_pixels(first + i) * weight[0];
    for (int64_t t = 1; t < count; ++t) sum += load_pixels(first + t * stride + i) * weight[t];
    store<float>(dst + i, sum);
  }
}

template <class T>
struct LineSampler {
  const AugmentPlan& plan;
  const T* base;
  int64_t channels, width;  // of the output
  float* lines;             // [channels, pitch]
  int64_t pitch;
  float* source;  // [channels, source_pitch], then as much for interleaved pixels
  int64_t source_pitch;

  void line(int64_t y) const {
    const AugmentImage& image = plan.image;
    const AugmentTaps& rows = plan.rows;
    const float* weight = rows.weight + y * rows.stride;
    const T* first = base + rows.start[y] * image.stride_y + plan.first_column * image.stride_x;
    if (image.stride_x == 1) {
      for (int64_t c = 0; c < channels; ++c)
        combine_rows<T>(first + c * image.stride_c, image.stride_y, weight, rows.count[y],
                        plan.used_columns, source + c * source_pitch);
    } else {
      float* mixed = source + channels * source_pitch;
      combine_rows<T>(first, image.stride_y, weight, rows.count[y], plan.used_columns * channels,
                      mixed);
      separate(mixed);
    }
    for (int64_t c = 0; c < channels; ++c)
      combine_columns(source + c * source_pitch, lines + c * pitch);
    if (!plan.covered)
      for (int64_t c = 0; c < channels; ++c) blend(rows.cover[y], plan.fill[c], lines + c * pitch);
  }

  BK_INLINE void separate(const float* mixed) const {
    if (channels == 3) {
      float *red = source, *green = source + source_pitch, *blue = source + 2 * source_pitch;
      for (int64_t i = 0; i < plan.used_columns; ++i) {
        red[i] = mixed[3 * i];
        green[i] = mixed[3 * i + 1];
        blue[i] = mixed[3 * i + 2];
      }
      return;
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < plan.used_columns; ++i)
        source[c * source_pitch + i] = mixed[i * channels + c];
  }

  BK_INLINE void combine_columns(const float* from, float* to) const {
    const AugmentTaps& taps = plan.columns;
    for (int64_t x = 0; x < width; x += kLanes) {
      VecI start;
      __builtin_memcpy(&start, taps.start + x, sizeof start);
      // Starts rise or fall along the line, so the ends of a vector say how far it spans.
      const int32_t left = taps.start[x], right = taps.start[x + kLanes - 1];
      const int32_t base = left < right ? left : right, span = left + right - 2 * base;
      const float* weight = taps.weight + x;
      VecF sum = {};
      if (span < 2 * kLanes) {
        start -= base;
        for (int64_t t = 0; t < taps.most; ++t)
          sum += weigh<T>(load(weight + t * taps.stride),
                          take_near(from + base + t, start, span < kLanes));
      } else {
        for (int64_t t = 0; t < taps.most; ++t)
          sum += weigh<T>(load(weight + t * taps.stride), gather(from, start + int32_t(t)));
      }
      store<float>(to + x, sum);
    }
  }

  BK_INLINE void blend(float cover_y, float fill, float* to) const {
    const float* cover_x = plan.columns.cover;
    for (int64_t x = 0; x < width; x += kLanes) {
      const VecF cover = load(cover_x + x) * cover_y, sum = load(to + x);
      const VecF blended = plan.border == AugmentBorder::kFillBlend ? cover * (sum - fill) + fill
                                                                    : sum + (1.0f - cover) * fill;
      // A covered pixel may be an infinity, which the blend would turn into NaN.
      store<float>(to + x, cover == 1.0f ? sum : blended);
    }
  }
};

}  // namespace bigkernel::BK_ISA
