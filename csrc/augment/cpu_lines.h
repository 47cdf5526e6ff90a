// Sampling by an axis-aligned map, one axis after the other, in the order that costs less. Rows
// first: the source rows of an output line are combined, reading memory in order, then its columns,
// from a scratch line. Columns first: each source row is sampled along x once and kept for all the
// output lines that combine it.
#pragma once

#include "augment/cpu_texels.h"

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

// to[i] = sum_t weight[t] * from[t][i], up to the next whole vector.
template <int kCount>
BK_INLINE void combine_lines(const float* const* from, const float* weight, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kLanes) {
    VecF sum = load(from[0] + i) * weight[0];
    for (int t = 1; t < kCount; ++t) sum += load(from[t] + i) * weight[t];
    store<float>(to + i, sum);
  }
}

template <class T>
class LineSampler {
 public:
  // scratch: augment_line_scratch(...) floats.
  LineSampler(const AugmentPlan& plan, int64_t channels, int64_t width, float* lines, int64_t pitch,
              float* scratch)
      : plan_(plan),
        base_(static_cast<const T*>(plan.image.data)),
        channels_(channels),
        width_(width),
        lines_(lines),
        pitch_(pitch),
        source_(scratch),
        source_pitch_(augment_line_pitch(plan)),
        mixed_(source_ + channels * source_pitch_),
        kept_(mixed_ + channels * source_pitch_) {
    for (int64_t& row : row_in_) row = -1;
  }

  void line(int64_t y) {
    const AugmentTaps& rows = plan_.rows;
    const int32_t start = rows.start[y], count = rows.count[y];
    const float* weight = rows.weight + y * rows.stride;
    if (plan_.columns_first) {
      const float* from[kAugmentKeptRows] = {};
      for (int32_t t = 0; t < count; ++t) from[t] = sampled_row(start + t);
      const int64_t n = channels_ * pitch_;
      if (count == 1)
        combine_lines<1>(from, weight, n, lines_);
      else if (count == 2)
        combine_lines<2>(from, weight, n, lines_);
      else if (count == 3)
        combine_lines<3>(from, weight, n, lines_);
      else
        combine_lines<4>(from, weight, n, lines_);
    } else {
      read_rows(start, weight, count);
      combine_columns(lines_);
    }
    if (!plan_.covered)
      for (int64_t c = 0; c < channels_; ++c)
        blend(rows.cover[y], plan_.fill[c], lines_ + c * pitch_);
  }

 private:
  // The columns of one source row: [channels, pitch].
  const float* sampled_row(int64_t row) {
    const int64_t slot = row % kAugmentKeptRows;
    float* to = kept_ + slot * channels_ * pitch_;
    if (row_in_[slot] == row) return to;
    row_in_[slot] = row;
    constexpr float kOne = 1.0f;
    read_rows(row, &kOne, 1);
    combine_columns(to);
    return to;
  }

  // The weighted sum of `count` source rows, in planes: source_.
  void read_rows(int64_t row, const float* weight, int64_t count) {
    const AugmentImage& image = plan_.image;
    const T* first = base_ + row * image.stride_y + plan_.first_column * image.stride_x;
    const int64_t n = plan_.used_columns;
    if (image.stride_x == 1) {
      for (int64_t c = 0; c < channels_; ++c)
        combine_rows<T>(first + c * image.stride_c, image.stride_y, weight, count, n,
                        source_ + c * source_pitch_);
      return;
    }
    combine_rows<T>(first, image.stride_y, weight, count, n * channels_, mixed_);
    if (channels_ == 3) {  // the pitch has room for the whole of the last vector
      float *red = source_, *green = source_ + source_pitch_, *blue = green + source_pitch_;
      for (int64_t i = 0; i < n; i += kLanes) {
        const float* p = mixed_ + 3 * i;
        const VecF a = load(p), b = load(p + kLanes), c = load(p + 2 * kLanes);
        constexpr auto lanes = std::make_index_sequence<kLanes>();
        store<float>(red + i, every_third<0>(a, b, c, lanes));
        store<float>(green + i, every_third<1>(a, b, c, lanes));
        store<float>(blue + i, every_third<2>(a, b, c, lanes));
      }
      return;
    }
    for (int64_t c = 0; c < channels_; ++c)
      for (int64_t i = 0; i < n; ++i) source_[c * source_pitch_ + i] = mixed_[i * channels_ + c];
  }

  void combine_columns(float* to) const {
    if (plan_.columns.most == 2)
      combine_taps<2>(to);
    else
      combine_taps<0>(to);
  }

  // kMost: number of taps, 0 for any.
  template <int kMost>
  BK_INLINE void combine_taps(float* to) const {
    const AugmentTaps& taps = plan_.columns;
    const int64_t most = kMost ? kMost : taps.most;
    for (int64_t x = 0; x < width_; x += kLanes) {
      VecI start;
      __builtin_memcpy(&start, taps.start + x, sizeof start);
      // Starts rise or fall along the line, so the ends of a vector say how far it spans.
      const int32_t left = taps.start[x], right = taps.start[x + kLanes - 1];
      const int32_t base = left < right ? left : right, span = left + right - 2 * base;
      const VecI near = start - base;
      const float* weight = taps.weight + x;
      for (int64_t c = 0; c < channels_; ++c) {
        const float* from = source_ + c * source_pitch_;
        VecF sum = {};
        if (span < kLanes) {
          for (int64_t t = 0; t < most; ++t)
            sum += weigh<T>(load(weight + t * taps.stride), take_near(from + base + t, near, true));
        } else if (span < 2 * kLanes) {
          for (int64_t t = 0; t < most; ++t)
            sum +=
                weigh<T>(load(weight + t * taps.stride), take_near(from + base + t, near, false));
        } else {
          for (int64_t t = 0; t < most; ++t)
            sum += weigh<T>(load(weight + t * taps.stride), gather(from, start + int32_t(t)));
        }
        store<float>(to + c * pitch_ + x, sum);
      }
    }
  }

  BK_INLINE void blend(float cover_y, float fill, float* to) const {
    const float* cover_x = plan_.columns.cover;
    for (int64_t x = 0; x < width_; x += kLanes) {
      const VecF cover = load(cover_x + x) * cover_y, sum = load(to + x);
      const VecF blended = plan_.border == AugmentBorder::kFillBlend ? cover * (sum - fill) + fill
                                                                     : sum + (1.0f - cover) * fill;
      // A covered pixel may be an infinity, which the blend would turn into NaN.
      store<float>(to + x, cover == 1.0f ? sum : blended);
    }
  }

  const AugmentPlan& plan_;
  const T* base_;
  int64_t channels_, width_;  // width of the output
  float* lines_;              // [channels, pitch]
  int64_t pitch_;
  float* source_;  // [channels, source_pitch]
  int64_t source_pitch_;
  float* mixed_;  // as much, for interleaved pixels
  float* kept_;   // [kAugmentKeptRows, channels, pitch]: source rows sampled along x
  int64_t row_in_[kAugmentKeptRows];
};

}  // namespace bigkernel::BK_ISA
