// Sampling of RGB bytes by any map, from a copy of the source box with one 32-bit word a
// pixel: 8 bytes hold a pixel and its right neighbour, so a pixel costs two loads where gathers
// from planes cost six of 8 lanes each. Filters of up to kAugmentPackedTaps a side are walked here
// as well.
namespace bigkernel::BK_ISA {

inline void pack_box(const AugmentPlan& plan, uint32_t* packed) {
  const AugmentImage& image = plan.image;
  const uint8_t* base = static_cast<const uint8_t*>(image.data);
  const int64_t width = plan.box[2] - plan.box[0];
  for (int64_t y = plan.box[1]; y < plan.box[3]; ++y, packed += width) {
    const uint8_t* red = base + y * image.stride_y + plan.box[0] * image.stride_x;
    const uint8_t *green = red + image.stride_c, *blue = green + image.stride_c;
    if (image.stride_x == 1) {
      for (int64_t x = 0; x < width; ++x)
        packed[x] = uint32_t(red[x]) | uint32_t(green[x]) << 8 | uint32_t(blue[x]) << 16;
    } else {
      for (int64_t x = 0; x < width; ++x)
        packed[x] =
            uint32_t(red[3 * x]) | uint32_t(red[3 * x + 1]) << 8 | uint32_t(red[3 * x + 2]) << 16;
    }
  }
}

#if defined(BK_AVX2) || defined(BK_AVX512)
BK_INLINE __m256 load_two_pixels(const uint32_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
// r g b and nothing, between four pixels.
BK_INLINE __m128 mix_pixels(const uint32_t* above, int64_t pitch, float fx, float fy) {
  const __m256 top = load_two_pixels(above), bottom = load_two_pixels(above + pitch);
  const __m256 both = top + (bottom - top) * fy;
  const __m128 left = _mm256_castps256_ps128(both), right = _mm256_extractf128_ps(both, 1);
  return left + (right - left) * fx;
}

// kLanes output pixels at x whose taps all lie inside; `index` counts from the box's corner.
BK_INLINE void mix_packed(const uint32_t* packed, int64_t box_width, VecI index, VecF fx, VecF fy,
                          float* to, int64_t pitch) {
  int32_t at[kLanes];
  float right[kLanes], down[kLanes];
  __builtin_memcpy(at, &index, sizeof at);
  store<float>(right, fx);
  store<float>(down, fy);
  for (int g = 0; g < kLanes; g += 8, to += 8) {
    const auto pair = [&](int i) {  // pixels i and i + 4 in the halves of one register
      const __m128 low = mix_pixels(packed + at[g + i], box_width, right[g + i], down[g + i]);
      const __m128 high =
          mix_pixels(packed + at[g + i + 4], box_width, right[g + i + 4], down[g + i + 4]);
      return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
    };
    const __m256 p0 = pair(0), p1 = pair(1), p2 = pair(2), p3 = pair(3);
    const __m256 rg01 = _mm256_unpacklo_ps(p0, p1), b01 = _mm256_unpackhi_ps(p0, p1);
    const __m256 rg23 = _mm256_unpacklo_ps(p2, p3), b23 = _mm256_unpackhi_ps(p2, p3);
    _mm256_storeu_ps(to, _mm256_shuffle_ps(rg01, rg23, 0x44));
    _mm256_storeu_ps(to + pitch, _mm256_shuffle_ps(rg01, rg23, 0xee));
    _mm256_storeu_ps(to + 2 * pitch, _mm256_shuffle_ps(b01, b23, 0x44));
  }
}

// The same with weights [taps, kLanes] along each axis, `index` being the first tap.
BK_INLINE void filter_packed(const uint32_t* packed, int64_t box_width, VecI index,
                             const float* weight_x, int64_t count_x, const float* weight_y,
                             int64_t count_y, float* to, int64_t pitch) {
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t* row = packed + index[i];
    __m128 sum = _mm_setzero_ps();
    for (int64_t j = 0; j < count_y; ++j, row += box_width) {
      __m128 line = _mm_setzero_ps();
      for (int64_t k = 0; k < count_x; ++k)
        line += _mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(int(row[k])))) *
                weight_x[k * kLanes + i];
      sum += line * weight_y[j * kLanes + i];
    }
    to[i] = sum[0];
    to[pitch + i] = sum[1];
    to[2 * pitch + i] = sum[2];
  }
}
#else
BK_INLINE void filter_packed(const uint32_t* packed, int64_t box_width, VecI index,
                             const float* weight_x, int64_t count_x, const float* weight_y,
                             int64_t count_y, float* to, int64_t pitch) {
  for (int i = 0; i < kLanes; ++i)
    for (int c = 0; c < 3; ++c) {
      const uint32_t* row = packed + index[i];
      float sum = 0;
      for (int64_t j = 0; j < count_y; ++j, row += box_width) {
        float line = 0;
        for (int64_t k = 0; k < count_x; ++k)
          line += float((row[k] >> (8 * c)) & 0xff) * weight_x[k * kLanes + i];
        sum += line * weight_y[j * kLanes + i];
      }
      to[c * pitch + i] = sum;
    }
}
BK_INLINE void mix_packed(const uint32_t* packed, int64_t box_width, VecI index, VecF fx, VecF fy,
                          float* to, int64_t pitch) {
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t *above = packed + index[i], *below = above + box_width;
    for (int c = 0; c < 3; ++c) {
      const auto value = [c](uint32_t word) { return float((word >> (8 * c)) & 0xff); };
      const float top = value(above[0]) + fx[i] * (value(above[1]) - value(above[0]));
      const float bottom = value(below[0]) + fx[i] * (value(below[1]) - value(below[0]));
      to[c * pitch + i] = top + fy[i] * (bottom - top);
    }
  }
}
#endif

}  // namespace bigkernel::BK_ISA
