// The Newton-Schulz iteration of Muon: what the binding hands to the kernels. No torch header here.
// The formula stands in bigkernel/ops/newton_schulz/reference.py.
#pragma once
#include <cstdint>

#include "common/dtypes.h"
#include "cpu/isa.h"

namespace bigkernel {

// One matrix x of rows x cols, rows <= cols: given and written row by row or, where it is tall,
// turned, column by column. Everything in between lies in scratch, and is of y's type.
struct NewtonSchulz {
  const void* x;
  void* y;           // contiguous
  int64_t x_stride;  // from a row to the next, or, where it is tall, from a column, in elements
  int64_t rows, cols;
  float a, b, c, eps;
  DType x_type, y_type;
  bool tall;
  float* scratch;  // newton_schulz_floats(rows, cols), uninitialized
};

constexpr int64_t kNewtonSchulzGroup = 32;   // rows that are packed together
constexpr int64_t kNewtonSchulzBlock = 48;   // rows of a tile of a product
constexpr int64_t kNewtonSchulzWidth = 192;  // columns of it, at most

// Columns begin..end of the kNewtonSchulzBlock rows from `row` on.
struct NewtonSchulzTile {
  int64_t row, begin, end;
};

// `static`: a body compiles these too, with its own instructions.
static constexpr int64_t newton_schulz_groups(int64_t n) {
  return (n + kNewtonSchulzGroup - 1) / kNewtonSchulzGroup;
}

// The next odd number of cache lines: rows so far apart spread over all sets of the first cache.
static constexpr int64_t newton_schulz_stride(int64_t n) { return 16 * ((n + 15) / 16 | 1); }

static constexpr int64_t newton_schulz_floats(int64_t rows, int64_t cols) {
  const int64_t padded_rows = newton_schulz_groups(rows) * kNewtonSchulzGroup;
  const int64_t padded_cols = newton_schulz_groups(cols) * kNewtonSchulzGroup;
  return padded_rows *
             (2 * newton_schulz_stride(padded_cols) + 3 * newton_schulz_stride(padded_rows) + 1) +
         padded_cols * newton_schulz_stride(padded_rows);
}

// The steps, in the order in which they run. `begin` and `end` are groups of kNewtonSchulzGroup
// rows; what belongs to different groups or tiles may run at once.
BK_DECLARE_PER_ISA(
    // x into scratch, and the sum of the squares of each row.
    void newton_schulz_load(const NewtonSchulz& m, int64_t begin, int64_t end);
    // x / norm.
    void newton_schulz_scale(const NewtonSchulz& m, int64_t begin, int64_t end);
    // x as the right side of the products with it.
    void newton_schulz_pack(const NewtonSchulz& m, int64_t begin, int64_t end);
    // gram = x x^T: the tile and, if it lies above the diagonal, its mirror image.
    void newton_schulz_gram(const NewtonSchulz& m, const NewtonSchulzTile& tile);
    // gram as a right side.
    void newton_schulz_pack_gram(const NewtonSchulz& m, int64_t begin, int64_t end);
    // polynomial = b gram + c gram^2, as gram.
    void newton_schulz_polynomial(const NewtonSchulz& m, const NewtonSchulzTile& tile);
    // x = a x + polynomial x.
    void newton_schulz_update(const NewtonSchulz& m, const NewtonSchulzTile& tile);
    void newton_schulz_store(const NewtonSchulz& m, int64_t begin, int64_t end))

}  // namespace bigkernel
