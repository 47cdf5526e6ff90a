// Copies and sums around the matrix products of linear_cross_entropy, once per instruction set.
#include "cpu/rows.h"

#include "linear_cross_entropy/linear_cross_entropy.h"

namespace bigkernel::BK_ISA {
namespace linear_cross_entropy {

template <class From, class To>
void copy(const CopyRowsArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t source = a.from_rows == nullptr ? i : a.from_rows[i];
    const int64_t target = a.to_rows == nullptr ? i : a.to_rows[i];
    const From* from = static_cast<const From*>(a.from) + source * a.from_stride;
    To* to = static_cast<To*>(a.to) + target * a.to_stride;
    if constexpr (std::is_same_v<From, To>)
      __builtin_memcpy(to, from, size_t(a.dim) * sizeof(To));
    else
      for_elements(a.dim, [&](int64_t c, int n)
                              BK_LAMBDA { store_some(to + c, load_some(from + c, n), n); });
  }
}

// Pairwise, so that the error does not grow with the number of rows. n columns.
template <class T>
VecF sum_rows(const T* x, int64_t stride, int64_t rows, int n) {
  constexpr int64_t kLeaf = 8;
  if (rows > kLeaf) {
    const int64_t half = rows / 2;
    return sum_rows(x, stride, half, n) + sum_rows(x + half * stride, stride, rows - half, n);
  }
  VecF sum = {};
  for (int64_t row = 0; row < rows; ++row) sum += load_some(x + row * stride, n);
  return sum;
}

}  // namespace linear_cross_entropy

void copy_rows(const CopyRowsArgs& a, int64_t begin, int64_t end) {
  with_type(a.from_type, [&](auto from) BK_LAMBDA {
    if (a.to_type == a.from_type)
      linear_cross_entropy::copy<decltype(from), decltype(from)>(a, begin, end);
    else if (a.to_type == DType::kFloat32)
      linear_cross_entropy::copy<decltype(from), float>(a, begin, end);
    else
      with_type(a.to_type, [&](auto to) BK_LAMBDA {
        linear_cross_entropy::copy<float, decltype(to)>(a, begin, end);
      });
  });
}

void accumulate(DType type, const void* from, float* to, int64_t begin, int64_t end) {
  with_type(type, [&](auto tag) BK_LAMBDA {
    const auto* x = static_cast<const decltype(tag)*>(from);
    for_elements(end - begin, [&](int64_t i, int n) BK_LAMBDA {
      store_some(to + begin + i, load_some(to + begin + i, n) + load_some(x + begin + i, n), n);
    });
  });
}

void add_columns(DType type, const void* from, int64_t stride, int64_t rows, float* to,
                 int64_t begin, int64_t end) {
  with_type(type, [&](auto tag) BK_LAMBDA {
    const auto* x = static_cast<const decltype(tag)*>(from);
    for_elements(end - begin, [&](int64_t i, int n) BK_LAMBDA {
      const VecF sum = linear_cross_entropy::sum_rows(x + begin + i, stride, rows, n);
      store_some(to + begin + i, load_some(to + begin + i, n) + sum, n);
    });
  });
}

}  // namespace bigkernel::BK_ISA
