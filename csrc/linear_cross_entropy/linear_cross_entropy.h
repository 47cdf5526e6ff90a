// A linear layer and the cross-entropy of its results: what goes over the rows besides the matrix
// products, which are torch's, and the kernels of cross_entropy. No torch header here. The formula
// stands in bigkernel/ops/linear_cross_entropy/reference.py.
#pragma once
#include <cstdint>

#include "common/dtypes.h"
#include "cpu/isa.h"

namespace bigkernel {

// Rows of a matrix, converted: to[to_rows[i]] = from[from_rows[i]]. Null: the i-th row itself.
struct CopyRowsArgs {
  const void* from;
  void* to;
  const int64_t *from_rows, *to_rows;
  int64_t dim, from_stride, to_stride;  // in elements
  DType from_type, to_type;             // equal, or one of them fp32
};

BK_DECLARE_PER_ISA(
    // Rows begin..end.
    void copy_rows(const CopyRowsArgs& args, int64_t begin, int64_t end);
    // to[i] += from[i], begin..end.
    void accumulate(DType type, const void* from, float* to, int64_t begin, int64_t end);
    // to[c] += the sum of column c of from [rows, ..], columns begin..end.
    void add_columns(DType type, const void* from, int64_t stride, int64_t rows, float* to,
                     int64_t begin, int64_t end))

}  // namespace bigkernel
