// The Newton-Schulz iteration on the CPU, once per instruction set. Its products are those of
// cpu/products.h; x x^T and its square are symmetric, so that tiles below the diagonal are mirrored
// and not multiplied.
//
// Matrices lie as rows of elements, which are the words of a left side: bf16 where it is multiplied
// in pairs, else float, rounded to bf16 where that is what is computed in. What is a right side as
// well is packed once an iteration: x x^T needs x's words turned, the other products the pairs of
// neighbouring rows, which for a symmetric matrix are its words turned. Rows and columns are padded
// with zeros to whole words and vectors.

#include "cpu/products.h"
#include "cpu/rows.h"
#include "newton_schulz/newton_schulz.h"
#if defined(BK_ISA_AMX)
#include "cpu/amx.h"
#endif

namespace bigkernel::BK_ISA {
namespace newton_schulz {

static_assert(kNewtonSchulzGroup % (2 * kLanes) == 0);
static_assert(kNewtonSchulzBlock % kMr == 0 && kNewtonSchulzBlock % kLanes == 0);
constexpr int64_t kPanel = kNr * kLanes;  // columns of which the sums are in registers at once
static_assert(kNewtonSchulzWidth % kPanel == 0);
#if defined(BK_ISA_AMX)
constexpr int64_t kRowsAtOnce = kMr;
#else
constexpr int64_t kRowsAtOnce = kNewtonSchulzBlock;
#endif

// The matrices in scratch. Distances between rows are in words.
template <class Words>
struct View {
  using Element = std::conditional_t<Words::kPack == 2, bf16, float>;

  explicit BK_INLINE View(const NewtonSchulz& m)
      : rows(m.rows),
        padded_rows(newton_schulz_groups(m.rows) * kNewtonSchulzGroup),
        padded_cols(newton_schulz_groups(m.cols) * kNewtonSchulzGroup),
        row_words(words<Words>(m.rows)),
        col_words(words<Words>(m.cols)),
        ld_x(newton_schulz_stride(words<Words>(padded_cols))),
        ld_square(newton_schulz_stride(words<Words>(padded_rows))),
        ld_cols(newton_schulz_stride(padded_cols)),
        ld_rows(newton_schulz_stride(padded_rows)),
        rounded(Words::kPack == 1 && m.y_type == DType::kBFloat16) {
    float* next = m.scratch;
    auto take = [&](int64_t floats) BK_LAMBDA { return std::exchange(next, next + floats); };
    x = take(padded_rows * newton_schulz_stride(padded_cols));
    paired = take(padded_rows * newton_schulz_stride(padded_cols));
    turned = take(padded_cols * newton_schulz_stride(padded_rows));
    gram = take(padded_rows * newton_schulz_stride(padded_rows));
    paired_gram = take(padded_rows * newton_schulz_stride(padded_rows));
    polynomial = take(padded_rows * newton_schulz_stride(padded_rows));
    squares = take(padded_rows);
  }

  int64_t rows, padded_rows, padded_cols;
  int64_t row_words, col_words;  // of the sums along rows and along columns
  int64_t ld_x, ld_square, ld_cols, ld_rows;
  bool rounded;
  float *x, *gram, *polynomial;          // rows of elements
  float *paired, *turned, *paired_gram;  // right sides
  float* squares;                        // of each row of x, summed up

  static BK_INLINE Element* row(float* of, int64_t ld, int64_t i) {
    return reinterpret_cast<Element*>(of + i * ld);
  }
  BK_INLINE void put_elements(Element* to, VecF v) const {
    put<Element>(to, rounded ? rounded_to<bf16>(v) : v);
  }
};

template <class F>
BK_INLINE void with_view(const NewtonSchulz& m, const F& f) {
  with_words(m.y_type, [&](auto words) { f(View<decltype(words)>(m)); });
}

// Elements [i, i + kLanes) of the line, whole or what there is of it, then zeros.
template <class T>
BK_INLINE VecF load_padded(const T* line, int64_t i, int64_t n) {
  if (i >= n) return VecF{};
  return n - i >= kLanes ? load(line + i) : load_n(line + i, int(n - i));
}

// kLanes x kLanes floats, turned.
BK_INLINE void turn(float* square) { transpose_square(square, kLanes, square, kLanes * 4); }

template <class T, class Words>
BK_INLINE void load_group(const NewtonSchulz& m, const View<Words>& v, int64_t first) {
  const T* x = static_cast<const T*>(m.x);
  alignas(64) float square[kLanes * kLanes];
  VecF sums[kLanes] = {};
  for (int64_t j = 0; j < v.padded_cols; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      // A row of x or, where it is tall, a column.
      const int64_t line = m.tall ? j + i : first + i, at = m.tall ? first : j;
      const bool there = line < (m.tall ? m.cols : m.rows);
      store(square + i * kLanes,
            there ? load_padded(x + line * m.x_stride, at, m.tall ? m.rows : m.cols) : VecF{});
    }
    if (m.tall) turn(square);
    for (int64_t i = 0; i < kLanes; ++i) {
      VecF e = load(square + i * kLanes);
      if (m.y_type == DType::kBFloat16) e = rounded_to<bf16>(e);
      sums[i] = fma(e, e, sums[i]);
      v.put_elements(v.row(v.x, v.ld_x, first + i) + j, e);
    }
  }
  for (int64_t i = 0; i < kLanes; ++i) v.squares[first + i] = reduce_sum(sums[i]);
}

// The sums of `rows` rows of a left side times `vectors` vectors of a right one, [rows, kPanel].
template <class Words>
BK_INLINE void multiply_panel(float* sums, const float* left, int64_t ld_left, const float* right,
                              int64_t ld_right, int64_t length, int64_t rows, int64_t vectors) {
  for (int64_t i = 0; i < rows; i += kRowsAtOnce)
    multiply<Words, false>({left + i * ld_left, ld_left, right, ld_right, sums + i * kPanel, kPanel,
                            length, Start::kZero},
                           rows - i < kRowsAtOnce ? rows - i : kRowsAtOnce, vectors);
}

// Calls f(sums, first column, vectors) for the panels of a tile.
template <class Words, class F>
BK_INLINE void for_panels(const NewtonSchulzTile& tile, int64_t rows, const float* left,
                          int64_t ld_left, const float* right, int64_t ld_right, int64_t length,
                          const F& f) {
  alignas(64) float sums[kNewtonSchulzBlock * kPanel];
  BK_TILES;
  for (int64_t j = tile.begin; j < tile.end; j += kPanel) {
    const int64_t vectors = (tile.end - j < kPanel ? tile.end - j : kPanel) / kLanes;
    multiply_panel<Words>(sums, left + tile.row * ld_left, ld_left, right + j, ld_right, length,
                          rows, vectors);
    f(sums, j, vectors);
  }
}

template <class Words>
BK_INLINE int64_t rows_of(const View<Words>& v, const NewtonSchulzTile& tile) {
  const int64_t left = v.rows - tile.row;
  return left < kNewtonSchulzBlock ? left : kNewtonSchulzBlock;
}

// A tile of a symmetric product: finish(i, j, sum) is what element i, j to j + kLanes - 1 become.
template <class Words, class F>
BK_INLINE void symmetric_tile(const View<Words>& v, const NewtonSchulzTile& tile, const float* left,
                              int64_t ld_left, const float* right, int64_t length, float* result,
                              const F& finish) {
  const int64_t rows = rows_of(v, tile);
  for_panels<Words>(tile, rows, left, ld_left, right, v.ld_rows, length,
                    [&](float* sums, int64_t j, int64_t vectors) BK_LAMBDA {
                      for (int64_t i = 0; i < rows; ++i) {
                        auto* to = v.row(result, v.ld_square, tile.row + i) + j;
                        for (int64_t n = 0; n < vectors * kLanes; n += kLanes) {
                          float* sum = sums + i * kPanel + n;
                          const VecF value = finish(tile.row + i, j + n, load(sum));
                          store(sum, value);
                          v.put_elements(to + n, value);
                        }
                      }
                      alignas(64) float square[kLanes * kLanes];
                      for (int64_t n = 0; n < vectors * kLanes; n += kLanes) {
                        if (j + n < tile.row + kNewtonSchulzBlock)
                          continue;  // of the square on the diagonal
                        for (int64_t i = 0; i < rows; i += kLanes) {
                          transpose_square(square, kLanes, sums + i * kPanel + n, kPanel * 4);
                          for (int64_t k = 0; k < kLanes && j + n + k < v.rows; ++k)
                            v.put_elements(v.row(result, v.ld_square, j + n + k) + tile.row + i,
                                           load(square + k * kLanes));
                        }
                      }
                    });
}

// Rows first .. of a matrix of elements, paired.
template <class Words>
BK_INLINE void pair_group(const View<Words>& v, float* to, int64_t ld_to, float* from,
                          int64_t ld_from, int64_t first, int64_t cols) {
  for (int64_t k = first; k < first + kNewtonSchulzGroup && k < v.rows; k += Words::kPack) {
    const auto* low = v.row(from, ld_from, k);
    float* at = to + k / Words::kPack * ld_to;
    if constexpr (Words::kPack == 1)
      for (int64_t j = 0; j < cols; j += kLanes) store(at + j, load(low + j));
    else
      pair_rows(at, low, k + 1 < v.rows ? v.row(from, ld_from, k + 1) : nullptr, cols);
  }
}

template <class T, class Words>
BK_INLINE void store_group(const NewtonSchulz& m, const View<Words>& v, int64_t first) {
  T* y = static_cast<T*>(m.y);
  alignas(64) float square[kLanes * kLanes];
  for (int64_t j = 0; j < m.cols; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i)
      store(square + i * kLanes, load(v.row(v.x, v.ld_x, first + i) + j));
    if (m.tall) turn(square);
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t line = m.tall ? j + i : first + i, at = m.tall ? first : j;
      const int64_t lines = m.tall ? m.cols : m.rows, n = m.tall ? m.rows : m.cols;
      if (line >= lines || at >= n) continue;
      const int64_t count = n - at < kLanes ? n - at : kLanes;
      store_some(y + line * n + at, load(square + i * kLanes), int(count));
    }
  }
}

// Calls f(first row) for pieces of kLanes rows of the groups.
template <class F>
BK_INLINE void for_pieces(int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin * kNewtonSchulzGroup; i < end * kNewtonSchulzGroup; i += kLanes) f(i);
}

}  // namespace newton_schulz

void newton_schulz_load(const NewtonSchulz& m, int64_t begin, int64_t end) {
  using namespace newton_schulz;
  with_view(m, [&](const auto& v) {
    with_type(m.x_type, [&](auto t) {
      for_pieces(begin, end, [&](int64_t i) { load_group<decltype(t)>(m, v, i); });
    });
  });
}

void newton_schulz_scale(const NewtonSchulz& m, int64_t begin, int64_t end) {
  using namespace newton_schulz;
  with_view(m, [&](const auto& v) {
    double total = 0;
    for (int64_t i = 0; i < m.rows; ++i) total += double(v.squares[i]);
    const float norm = float(__builtin_sqrt(total));
    const VecF divisor = VecF{} + (norm < m.eps ? m.eps : norm);  // a NaN stays one
    for_pieces(begin, end, [&](int64_t first) {
      for (int64_t i = first; i < first + kLanes && i < m.rows; ++i) {
        auto* row = v.row(v.x, v.ld_x, i);
        for (int64_t j = 0; j < v.padded_cols; j += kLanes)
          v.put_elements(row + j, load(row + j) / divisor);
      }
    });
  });
}

void newton_schulz_pack(const NewtonSchulz& m, int64_t begin, int64_t end) {
  using namespace newton_schulz;
  with_view(m, [&]<class Words>(const View<Words>& v) {
    for_pieces(begin, end, [&](int64_t i) {
      for (int64_t w = 0; w < v.col_words; w += kLanes)
        transpose_square(v.turned + w * v.ld_rows + i, v.ld_rows, v.x + i * v.ld_x + w, v.ld_x * 4);
    });
    for (int64_t group = begin; group < end; ++group)
      pair_group(v, v.paired, v.ld_cols, v.x, v.ld_x, group * kNewtonSchulzGroup, v.padded_cols);
  });
}

void newton_schulz_gram(const NewtonSchulz& m, const NewtonSchulzTile& tile) {
  using namespace newton_schulz;
  with_view(m, [&](const auto& v) {
    symmetric_tile(v, tile, v.x, v.ld_x, v.turned, v.col_words, v.gram,
                   [](int64_t, int64_t, VecF sum) BK_LAMBDA { return sum; });
  });
}

void newton_schulz_pack_gram(const NewtonSchulz& m, int64_t begin, int64_t end) {
  using namespace newton_schulz;
  with_view(m, [&](const auto& v) {
    for (int64_t group = begin; group < end; ++group)
      pair_group(v, v.paired_gram, v.ld_rows, v.gram, v.ld_square, group * kNewtonSchulzGroup,
                 v.padded_rows);
  });
}

void newton_schulz_polynomial(const NewtonSchulz& m, const NewtonSchulzTile& tile) {
  using namespace newton_schulz;
  with_view(m, [&](const auto& v) {
    symmetric_tile(v, tile, v.gram, v.ld_square, v.paired_gram, v.row_words, v.polynomial,
                   [&](int64_t i, int64_t j, VecF sum) BK_LAMBDA {
                     return sum * m.c + load(v.row(v.gram, v.ld_square, i) + j) * m.b;
                   });
  });
}

void newton_schulz_update(const NewtonSchulz& m, const NewtonSchulzTile& tile) {
  using namespace newton_schulz;
  with_view(m, [&]<class Words>(const View<Words>& v) {
    const int64_t rows = rows_of(v, tile);
    for_panels<Words>(tile, rows, v.polynomial, v.ld_square, v.paired, v.ld_cols, v.row_words,
                      [&](float* sums, int64_t j, int64_t vectors) BK_LAMBDA {
                        for (int64_t i = 0; i < rows; ++i) {
                          auto* to = v.row(v.x, v.ld_x, tile.row + i) + j;
                          for (int64_t n = 0; n < vectors * kLanes; n += kLanes)
                            v.put_elements(to + n,
                                           load(sums + i * kPanel + n) + load(to + n) * m.a);
                        }
                      });
  });
}

void newton_schulz_store(const NewtonSchulz& m, int64_t begin, int64_t end) {
  using namespace newton_schulz;
  with_view(m, [&](const auto& v) {
    with_type(m.y_type, [&](auto t) {
      for_pieces(begin, end, [&](int64_t i) { store_group<decltype(t)>(m, v, i); });
    });
  });
}

}  // namespace bigkernel::BK_ISA
