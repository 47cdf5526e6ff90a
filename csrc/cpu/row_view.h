// Tensors as rows [N, D] of a contiguous last dimension, for ops that work row by row. Binding
// code.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/tensors.h"
#include "cpu/results.h"

namespace bigkernel {

inline DType float_type(const Tensor& t, const char* op, const char* argument) {
  const DType type = dtype_of(t, op, argument);
  BK_CHECK(type <= DType::kFloat16, op, argument, " must be float32, bfloat16 or float16");
  return type;
}

inline ScalarType scalar_type(DType t) {
  return t == DType::kFloat32 ? ScalarType::Float
                              : (t == DType::kBFloat16 ? ScalarType::BFloat16 : ScalarType::Half);
}

// The N rows of a tensor [.., D]; `held` keeps a copy alive where the rows were not evenly spaced.
struct RowView {
  Tensor held;
  const void* data;
  int64_t rows, dim, stride;  // in elements; from row to row
};

// Whether all dimensions but the last can be walked as one, and with which stride.
inline bool rows_are_even(const Tensor& t, int64_t& stride) {
  const auto sizes = t.sizes(), strides = t.strides();
  const size_t last = sizes.size() - 1;
  if (sizes[last] > 1 && strides[last] != 1) return false;
  stride = sizes[last];
  int64_t expected = -1;
  for (size_t d = last; d-- > 0;) {
    if (sizes[d] == 1) continue;
    if (expected < 0)
      stride = strides[d];
    else if (strides[d] != expected)
      return false;
    expected = strides[d] * sizes[d];
  }
  return true;
}

inline RowView row_view(const Tensor& t, const char* op, const char* argument) {
  BK_CHECK(t.is_cpu(), op, argument, " must be on the CPU");
  BK_CHECK(t.dim() >= 1, op, argument, " must have at least one dimension");
  RowView v{t, nullptr, 0, t.size(t.dim() - 1), 0};
  v.rows = v.dim == 0 ? 0 : t.numel() / v.dim;
  if (v.rows > 0 && !rows_are_even(t, v.stride)) {
    v.held = without_gaps(t);
    v.stride = v.dim;
  }
  v.data = v.held.const_data_ptr();
  return v;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

inline std::vector<int64_t> shape_of_result(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

// Rows that a thread takes at least: below that waking it takes longer than the work.
inline int64_t row_grain(int64_t dim) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, dim));
}

}  // namespace bigkernel
