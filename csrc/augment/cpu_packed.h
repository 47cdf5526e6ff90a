// Sampling of RGB bytes by any map, from a copy of the source box with one 32-bit word a pixel:
// red, green, blue, and 1. 64 bits hold a pixel and its right neighbour, so that a bilinear vector
// takes two gathers of pairs. The copy has a frame as wide as the filter: of zeros, whose fourth
// byte makes the weighted sum of ones the filter's cover, or, where taps are clamped, of the edge's
// pixels. Positions are fixed-point with 32 bits of fraction, in two registers (Pair).
#pragma once

#include "augment/cpu_texels.h"

namespace bigkernel::BK_ISA {

typedef int64_t VecQ __attribute__((vector_size(4 * BK_LANES)));

// kLanes 64-bit numbers: in groups of four lanes, the first two are in `a` and the last two in `b`,
// which is how shuffles within 128 bits bring the halves of all numbers together.
struct Pair {
  VecQ a, b;
};
BK_INLINE int lane_of(int i, bool second) { return i / 2 * 4 + i % 2 + 2 * second; }

BK_INLINE VecU low_halves(Pair p) {
#ifdef BK_MM
  constexpr int kEven = 0x88;
#if defined(BK_AVX512)
  return (VecU)_mm512_shuffle_ps((__m512)p.a, (__m512)p.b, kEven);
#elif defined(BK_AVX2)
  return (VecU)_mm256_shuffle_ps((__m256)p.a, (__m256)p.b, kEven);
#else
  return (VecU)_mm_shuffle_ps((__m128)p.a, (__m128)p.b, kEven);
#endif
#else
  VecU v;
  for (int i = 0; i < kLanes / 2; ++i) {
    v[lane_of(i, false)] = uint32_t(p.a[i]);
    v[lane_of(i, true)] = uint32_t(p.b[i]);
  }
  return v;
#endif
}
BK_INLINE VecU high_halves(Pair p) {
#ifdef BK_MM
  constexpr int kOdd = 0xdd;
#if defined(BK_AVX512)
  return (VecU)_mm512_shuffle_ps((__m512)p.a, (__m512)p.b, kOdd);
#elif defined(BK_AVX2)
  return (VecU)_mm256_shuffle_ps((__m256)p.a, (__m256)p.b, kOdd);
#else
  return (VecU)_mm_shuffle_ps((__m128)p.a, (__m128)p.b, kOdd);
#endif
#else
  VecU v;
  for (int i = 0; i < kLanes / 2; ++i) {
    v[lane_of(i, false)] = uint32_t(uint64_t(p.a[i]) >> 32);
    v[lane_of(i, true)] = uint32_t(uint64_t(p.b[i]) >> 32);
  }
  return v;
#endif
}

// The words at `index` and right of it.
BK_INLINE void gather_neighbours(const uint32_t* words, VecI index, VecU& left, VecU& right) {
  Pair p;
#if defined(BK_AVX512)
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i sorted = _mm512_permutexvar_epi64(order, (__m512i)index);
  p.a = (VecQ)_mm512_i32gather_epi64(_mm512_castsi512_si256(sorted), words, 4);
  p.b = (VecQ)_mm512_i32gather_epi64(_mm512_extracti64x4_epi64(sorted, 1), words, 4);
#elif defined(BK_AVX2)
  const __m256i sorted = _mm256_permute4x64_epi64((__m256i)index, 0xd8);
  const long long* base = reinterpret_cast<const long long*>(words);
  p.a = (VecQ)_mm256_i32gather_epi64(base, _mm256_castsi256_si128(sorted), 4);
  p.b = (VecQ)_mm256_i32gather_epi64(base, _mm256_extracti128_si256(sorted, 1), 4);
#else
  for (int i = 0; i < kLanes / 2; ++i) {
    int64_t word;
    __builtin_memcpy(&word, words + index[lane_of(i, false)], sizeof word);
    p.a[i] = word;
    __builtin_memcpy(&word, words + index[lane_of(i, true)], sizeof word);
    p.b[i] = word;
  }
#endif
  left = low_halves(p);
  right = high_halves(p);
}

// Byte c of each word, times 256^c: the caller multiplies it away once.
BK_INLINE VecF byte_of(VecU word, int c) {
  return to_float((VecI)(c == 3 ? word >> 24 : word & (0xffu << (8 * c))));
}
constexpr float kByteScale[4] = {1.0f, 0x1p-8f, 0x1p-16f, 1.0f};

class PackedSampler {
 public:
  PackedSampler(const AugmentPlan& plan, uint32_t* words, float* lines, int64_t pitch)
      : plan_(plan), lines_(lines), pitch_(pitch), words_(words) {
    if (!plan.packed) return;
    const int32_t* box = plan.box;
    const AugmentFrame frame = augment_frame(plan);
    count_x_ = frame.taps_x;
    count_y_ = frame.taps_y;
    width_ = int32_t(frame.pitch);
    from_x_ = box[0] - frame.left;
    from_y_ = box[1] - frame.top;
    narrow_x_ = float(1.0 / plan.reach_x);
    narrow_y_ = float(1.0 / plan.reach_y);
    for (int i = 0; i < kLanes / 2; ++i) {
      for (int second = 0; second < 2; ++second) {
        const double lane = lane_of(i, second);
        (second ? step_x_.b : step_x_.a)[i] = fixed(lane * plan.map[0]);
        (second ? step_y_.b : step_y_.a)[i] = fixed(lane * plan.map[3]);
      }
    }
  }

  // Copies what output lines begin..end look at.
  void pack(int64_t begin, int64_t end) const {
    const int32_t* box = plan_.box;
    const double* m = plan_.map;
    double low = box[3], high = box[1];
    for (const int64_t x : {int64_t(plan_.out_box[0]), plan_.out_box[2] + int64_t(kLanes)}) {
      for (const int64_t y : {begin, end}) {
        const double sy = m[3] * double(x) + m[4] * double(y) + m[5];
        low = sy < low ? sy : low;
        high = sy > high ? sy : high;
      }
    }
    const double margin = plan_.reach_y + 2;
    const auto cut = [&](double y) {
      return int32_t(y < box[1] ? box[1] : (y > box[3] ? box[3] : y));
    };
    const int32_t first = cut(low - margin), last = cut(high + margin);
    const bool clamped = plan_.border == AugmentBorder::kClamp && count_x_ == 2 && count_y_ == 2;
    const int32_t above = box[1] - from_y_, below = int32_t(augment_frame(plan_).rows) - above;
    for (int32_t y = first == box[1] ? box[1] - above : first;
         y < (last == box[3] ? box[1] + below : last); ++y) {
      uint32_t* row = words_ + int64_t(y - from_y_) * width_;
      const bool inside = y >= box[1] && y < box[3];
      if (inside || clamped) {
        const int32_t nearest = y < box[1] ? box[1] : (y >= box[3] ? box[3] - 1 : y);
        pack_row(row, nearest, clamped);
      } else {
        for (int32_t x = 0; x < width_; ++x) row[x] = 0;
      }
    }
  }

  // kLanes output pixels at x, the first of them from the point (sx, sy). False, and nothing done,
  // where a point is far away or none.
  BK_INLINE bool sample(int64_t x, double sx, double sy) const {
    const double shift_x = 0.5 - plan_.reach_x, shift_y = 0.5 - plan_.reach_y;
    const double end_x = sx + (kLanes - 1) * plan_.map[0], end_y = sy + (kLanes - 1) * plan_.map[3];
    const auto near = [](double s) { return s > -kAugmentFar && s < kAugmentFar; };
    if (!(near(sx) && near(sy) && near(end_x) && near(end_y))) return false;
    // Whole parts are now the first tap's index. Fractions are rounded to 24 bits.
    const int64_t start_x = fixed(sx + shift_x) + 128, start_y = fixed(sy + shift_y) + 128;
    const int64_t stop_x = start_x + step_x_.b[kLanes / 2 - 1];
    const int64_t stop_y = start_y + step_y_.b[kLanes / 2 - 1];
    const int32_t low_x = int32_t((start_x < stop_x ? start_x : stop_x) >> 32);
    const int32_t low_y = int32_t((start_y < stop_y ? start_y : stop_y) >> 32);
    const int32_t high_x = int32_t((start_x < stop_x ? stop_x : start_x) >> 32);
    const int32_t high_y = int32_t((start_y < stop_y ? stop_y : start_y) >> 32);
    const int32_t* box = plan_.box;
    const bool inner = low_x >= box[0] && high_x + count_x_ <= box[2] && low_y >= box[1] &&
                       high_y + count_y_ <= box[3];
    const Pair px{step_x_.a + start_x, step_x_.b + start_x};
    const Pair py{step_y_.a + start_y, step_y_.b + start_y};
    const VecF fx = fraction(px), fy = fraction(py);
    VecI column = (VecI)high_halves(px) - from_x_, row = (VecI)high_halves(py) - from_y_;
    const bool narrow = count_x_ == 2 && count_y_ == 2;
    if (inner) {
      const VecI index = row * width_ + column;
      if (narrow)
        mix<false>(x, index, fx, fy);
      else
        filter<false>(x, index, fx, fy);
      return true;
    }
    // Beyond the frame all is as at its end.
    column = clampi(column, 0, box[2] - from_x_);
    row = clampi(row, 0, box[3] - from_y_);
    const VecI index = row * width_ + column;
    if (narrow)
      mix<true>(x, index, fx, fy);
    else
      filter<true>(x, index, fx, fy);
    return true;
  }

 private:
  static BK_INLINE int64_t fixed(double s) { return int64_t(__builtin_llrint(s * 0x1p32)); }
  static BK_INLINE VecF fraction(Pair p) { return to_float((VecI)(low_halves(p) >> 8)) * 0x1p-24f; }

  void pack_row(uint32_t* row, int32_t y, bool clamped) const {
    const AugmentImage& image = plan_.image;
    const int64_t width = plan_.box[2] - plan_.box[0], left = plan_.box[0] - from_x_;
    const uint8_t* red = static_cast<const uint8_t*>(image.data) + y * image.stride_y +
                         plan_.box[0] * image.stride_x;
    uint32_t* to = row + left;
    constexpr uint32_t kInside = 1u << 24;
    int64_t x = 0;
    if (image.stride_x == 1) {
      const uint8_t *green = red + image.stride_c, *blue = green + image.stride_c;
      for (; x + kLanes <= width; x += kLanes) {
        const VecU word = (VecU)load_bytes(red + x) | (VecU)load_bytes(green + x) << 8 |
                          (VecU)load_bytes(blue + x) << 16 | kInside;
        __builtin_memcpy(to + x, &word, sizeof word);
      }
      for (; x < width; ++x)
        to[x] = uint32_t(red[x]) | uint32_t(green[x]) << 8 | uint32_t(blue[x]) << 16 | kInside;
    } else {
#if defined(BK_AVX2) || defined(BK_AVX512)
      const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
      for (; x + 6 <= width; x += 4) {  // 16 bytes are read for 4 pixels
        const __m128i bytes = _mm_loadu_si128((const __m128i*)(red + 3 * x));
        const __m128i word = _mm_or_si128(_mm_shuffle_epi8(bytes, spread), _mm_set1_epi32(kInside));
        _mm_storeu_si128((__m128i*)(to + x), word);
      }
#endif
      for (; x < width; ++x)
        to[x] = uint32_t(red[3 * x]) | uint32_t(red[3 * x + 1]) << 8 |
                uint32_t(red[3 * x + 2]) << 16 | kInside;
    }
    for (x = 0; x < left; ++x) row[x] = clamped ? to[0] : 0;
    for (x = left + width; x < width_; ++x) row[x] = clamped ? to[width - 1] : 0;
  }

  // Bilinear.
  template <bool kEdge>
  BK_INLINE void mix(int64_t x, VecI index, VecF fx, VecF fy) const {
    VecU w00, w01, w10, w11;
    gather_neighbours(words_, index, w00, w01);
    gather_neighbours(words_ + width_, index, w10, w11);
    VecF sum[4];
    for (int c = 0; c < 3 + kEdge; ++c) {
      const VecF left = byte_of(w00, c), below = byte_of(w10, c);
      const VecF top = fma(fx, byte_of(w01, c) - left, left);
      const VecF bottom = fma(fx, byte_of(w11, c) - below, below);
      sum[c] = fma(fy, bottom - top, top) * kByteScale[c];
    }
    put<kEdge>(x, sum);
  }

  // The triangle filter of reach_x and reach_y: `index` is its first tap's, and the filter's middle
  // lies `reach - 1 + fraction` pixels right of that.
  template <bool kEdge>
  BK_INLINE void filter(int64_t x, VecI index, VecF fx, VecF fy) const {
    const VecF middle_x = fx + float(plan_.reach_x - 1), middle_y = fy + float(plan_.reach_y - 1);
    VecF weight_x[kAugmentPackedTaps + 1], total_x = {}, total_y = {}, sum[4] = {};
    for (int32_t t = 0; t < count_x_; ++t) {
      weight_x[t] = triangle(middle_x, t, narrow_x_);
      total_x += weight_x[t];
    }
    weight_x[count_x_] = VecF{};
    const uint32_t* row = words_;
    for (int32_t j = 0; j < count_y_; ++j, row += width_) {
      const VecF weight_y = triangle(middle_y, j, narrow_y_);
      total_y += weight_y;
      VecF line[4] = {};
      for (int32_t t = 0; t < count_x_; t += 2) {
        VecU left, right;
        gather_neighbours(row + t, index, left, right);
        for (int c = 0; c < 3 + kEdge; ++c) {
          line[c] = fma(weight_x[t], byte_of(left, c), line[c]);
          line[c] = fma(weight_x[t + 1], byte_of(right, c), line[c]);
        }
      }
      for (int c = 0; c < 3 + kEdge; ++c) sum[c] = fma(weight_y, line[c], sum[c]);
    }
    const VecF scale = 1.0f / (total_x * total_y);
    for (int c = 0; c < 3 + kEdge; ++c) sum[c] *= scale * kByteScale[c];
    if (kEdge && plan_.border == AugmentBorder::kClamp) {  // the taps inside share all the weight
      const VecI some = sum[3] > 0.0f;
      const VecF share = 1.0f / (some ? sum[3] : set1(1.0f));
      for (int c = 0; c < 3; ++c) sum[c] *= share;
      sum[3] = some ? set1(1.0f) : VecF{};
    }
    put<kEdge>(x, sum);
  }
  static BK_INLINE VecF triangle(VecF middle, int32_t t, float narrowness) {
    return vmax(VecF{}, 1.0f - vabs(float(t) - middle) * narrowness);
  }

  template <bool kEdge>
  BK_INLINE void put(int64_t x, const VecF* sum) const {
    for (int c = 0; c < 3; ++c) {
      VecF v = sum[c];
      if constexpr (kEdge) {
        const float fill = plan_.fill[c];
        v = plan_.border == AugmentBorder::kFillBlend ? fma(sum[3], v - fill, set1(fill))
                                                      : fma(1.0f - sum[3], set1(fill), v);
      }
      store<float>(lines_ + c * pitch_ + x, v);
    }
  }

  const AugmentPlan& plan_;
  float* lines_;  // [3, pitch]
  int64_t pitch_;
  uint32_t* words_;            // [rows, width_]
  int32_t from_x_, from_y_;    // source pixel of the copy's corner
  int32_t count_x_, count_y_;  // taps
  int32_t width_;
  float narrow_x_, narrow_y_;
  Pair step_x_, step_y_;  // of the lanes from the first
};

}  // namespace bigkernel::BK_ISA
