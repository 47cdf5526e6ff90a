// Sums over the rows of [N, dim], as gradients of parameters are. Binding code.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/tensors.h"

#include "cpu/parallel.h"
#include "cpu/row_view.h"

namespace bigkernel {

// `count` sums [dim] beside each other. Rows are cut into chunks by the shape alone, and the sums
// of the chunks are added in their order: the number of threads has no part in the result.
class RowSums {
 public:
  RowSums(int64_t rows, int64_t dim, int64_t count)
      : rows_(rows),
        dim_(dim),
        count_(count),
        size_(std::max(kLeastRows, (rows + kMostChunks - 1) / kMostChunks)),
        chunks_((rows + size_ - 1) / size_),
        parts_(size_t(chunks_ * count * dim)) {}

  // Calls f(begin, end, sums) for the rows of each chunk; sums [count, dim] are zeros to add to.
  template <class F>
  void each_chunk(const F& f) {
    const int64_t grain = std::max<int64_t>(1, row_grain(dim_) / size_);
    parallel_for(chunks_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        f(c * size_, std::min(rows_, (c + 1) * size_), parts_.data() + c * count_ * dim_);
    });
  }

  // Sum `which` over all rows, fp32 [dim].
  Tensor total(const Tensor& like, int64_t which) const {
    Tensor result = empty_tensor(like, {dim_}, ScalarType::Float);
    float* to = static_cast<float*>(result.mutable_data_ptr());
    parallel_for(dim_, std::max<int64_t>(64, row_grain(chunks_)), [&](int64_t begin, int64_t end) {
      std::fill(to + begin, to + end, 0.0f);
      for (int64_t c = 0; c < chunks_; ++c) {
        const float* part = parts_.data() + (c * count_ + which) * dim_;
        for (int64_t i = begin; i < end; ++i) to[i] += part[i];
      }
    });
    return result;
  }

 private:
  static constexpr int64_t kMostChunks = 64, kLeastRows = 4;
  int64_t rows_, dim_, count_, size_, chunks_;
  std::vector<float> parts_;  // [chunks, count, dim]
};

}  // namespace bigkernel
