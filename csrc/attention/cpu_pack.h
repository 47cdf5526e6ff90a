// Rows of any dtype to words (cpu/words.h) and fp32 rows back, and tiles of them in the order in
// which the products read them.
#pragma once

#include "attention/attention.h"
#include "cpu/words.h"

namespace bigkernel::BK_ISA {

constexpr int64_t kMostDim = 256;  // the binding checks it

template <class T>
BK_INLINE void unpack_row_as(float* dst, const T* src, int64_t n, int64_t padded) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  if (i < n) {
    store(dst + i, load_n(src + i, int(n - i)));
    i += kLanes;
  }
  for (; i < padded; i += kLanes) store(dst + i, VecF{});
}

// dst[0, padded) = src[0, n), then zeros; padded is a multiple of kLanes.
inline void unpack_row(float* dst, const void* src, DType dtype, int64_t n, int64_t padded) {
  switch (dtype) {
    case DType::kBFloat16:
      return unpack_row_as(dst, static_cast<const bf16*>(src), n, padded);
    case DType::kFloat16:
      return unpack_row_as(dst, static_cast<const fp16*>(src), n, padded);
    default:
      return unpack_row_as(dst, static_cast<const float*>(src), n, padded);
  }
}

template <class T>
BK_INLINE void pack_row_as(T* dst, const float* src, float factor, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i) * factor);
  if (i < n) store_n(dst + i, load(src + i) * factor, int(n - i));
}

// dst[0, n) = src[0, n) * factor; src is readable up to whole vectors.
inline void pack_row(void* dst, const float* src, float factor, DType dtype, int64_t n) {
  switch (dtype) {
    case DType::kBFloat16:
      return pack_row_as(static_cast<bf16*>(dst), src, factor, n);
    case DType::kFloat16:
      return pack_row_as(static_cast<fp16*>(dst), src, factor, n);
    default:
      return pack_row_as(static_cast<float*>(dst), src, factor, n);
  }
}

BK_INLINE int64_t offset_of(const AttentionTensor& t, int64_t b, int64_t h, int64_t i) {
  return b * t.batch + h * t.head + i * t.row;
}

BK_INLINE void* row_of(const AttentionTensor& t, DType dtype, int64_t b, int64_t h, int64_t i) {
  return static_cast<char*>(t.data) + offset_of(t, b, h, i) * dtype_size(dtype);
}

// Rows that lie apart, as those of a head between other heads, are no stream that the processor
// foresees; what it has in flight by itself are the next few.
constexpr int64_t kRowsAhead = 8;

BK_INLINE void prefetch_row(const AttentionTensor& t, DType dtype, int64_t b, int64_t h, int64_t i,
                            int64_t dim) {
  const char* row = static_cast<const char*>(row_of(t, dtype, b, h, i));
  for (int64_t at = 0; at < dim * dtype_size(dtype); at += 64) __builtin_prefetch(row + at);
}

// dst[0, padded) = the words of src[0, n), then zeros; padded is a multiple of kLanes.
template <class Words>
BK_INLINE void row_words(float* dst, const void* src, DType dtype, int64_t n, int64_t padded) {
  if constexpr (Words::kPack == 1) {
    unpack_row(dst, src, dtype, n, padded);
  } else {
    const auto* from = static_cast<const uint16_t*>(src);
    int64_t w = 0;
    for (; 2 * (w + kLanes) <= n; w += kLanes) store(dst + w, load_words(from + 2 * w));
    if (w < padded) {
      float last[kLanes] = {};
      __builtin_memcpy(last, from + 2 * w, size_t(2 * (n - 2 * w)));
      store(dst + w, load(last));
    }
  }
}

// Rows [first, first + n) of a head, each as words along it: [n, ld].
template <class Words>
void row_tile(float* dst, int64_t ld, const AttentionTensor& t, DType dtype, int64_t b, int64_t h,
              int64_t first, int64_t n, int64_t dim) {
  const int64_t width = round_up(words<Words>(dim), kLanes);
  for (int64_t i = 0; i < n; ++i) {
    if (i + kRowsAhead < n) prefetch_row(t, dtype, b, h, first + i + kRowsAhead, dim);
    row_words<Words>(dst + i * ld, row_of(t, dtype, b, h, first + i), dtype, dim, width);
  }
}

// dst[w][d] = column d of the kPack rows from first + w * kPack: [words of n, ld]. Columns from dim
// up to a whole vector are zero, and so is what the last word holds beyond n.
template <class Words>
void column_tile(float* dst, int64_t ld, const AttentionTensor& t, DType dtype, int64_t b,
                 int64_t h, int64_t first, int64_t n, int64_t dim) {
  if constexpr (Words::kPack == 1) {
    row_tile<Words>(dst, ld, t, dtype, b, h, first, n, dim);
  } else {
    for (int64_t i = 0; i < n; i += 2) {
      for (int64_t r = i + kRowsAhead; r < i + kRowsAhead + 2 && r < n; ++r)
        prefetch_row(t, dtype, b, h, first + r, dim);
      pair_rows(dst + i / 2 * ld, row_of(t, dtype, b, h, first + i),
                i + 1 < n ? row_of(t, dtype, b, h, first + i + 1) : nullptr, dim);
    }
  }
}

// dst[w][i] = word w of row first + i: [words of dim, ld]. Columns from n up to a whole vector are
// zero.
template <class Words>
void transposed_tile(float* dst, int64_t ld, const AttentionTensor& t, DType dtype, int64_t b,
                     int64_t h, int64_t first, int64_t n, int64_t dim) {
  alignas(64) float rows[kLanes * (kMostDim + 16)];
  const int64_t width = round_up(words<Words>(dim), kLanes), ld_rows = odd_lines(dim);
  // Rows that are words already, in whole vectors, need no copy in between.
  const bool as_they_are =
      dim == width * Words::kPack && (Words::kPack > 1 || dtype == DType::kFloat32);
  const int64_t bytes = t.row * dtype_size(dtype);
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t r = i + kLanes; r < i + 2 * kLanes && r < n; ++r)
      prefetch_row(t, dtype, b, h, first + r, dim);
    if (as_they_are && i + kLanes <= n) {
      const char* from = static_cast<const char*>(row_of(t, dtype, b, h, first + i));
      for (int64_t d = 0; d < width; d += kLanes)
        transpose_square(dst + d * ld + i, ld, from + d * int64_t(sizeof(float)), bytes);
      continue;
    }
    for (int64_t r = 0; r < kLanes; ++r) {
      if (i + r < n)
        row_words<Words>(rows + r * ld_rows, row_of(t, dtype, b, h, first + i + r), dtype, dim,
                         width);
      else
        for (int64_t d = 0; d < width; d += kLanes) store(rows + r * ld_rows + d, VecF{});
    }
    for (int64_t d = 0; d < width; d += kLanes)
      transpose_square(dst + d * ld + i, ld, rows + d, ld_rows * int64_t(sizeof(float)));
  }
}

// The elements [from, to) of a row become words in its front, from word from / kPack on; both are
// multiples of kLanes.
template <class Words>
BK_INLINE void pack_in_place(float* row, int64_t from, int64_t to) {
  if constexpr (Words::kPack > 1) {
    for (int64_t c = from; c < to; c += 2 * kLanes) {
      const VecF low = load(row + c), high = c + kLanes < to ? load(row + c + kLanes) : VecF{};
      store(row + c / 2, Words::consecutive(low, high));
    }
  }
}

}  // namespace bigkernel::BK_ISA
