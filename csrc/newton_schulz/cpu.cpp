// CPU binding of newton_schulz: checks, memory, and how matrices are shared by the threads.
#include "newton_schulz/newton_schulz.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "common/box.h"
#include "common/tensors.h"
#include "cpu/parallel.h"
#include "cpu/row_view.h"

namespace bigkernel {
namespace {

constexpr const char* kOp = "newton_schulz";

struct Iteration {
  double a, b, c, eps;
  int64_t steps;
  bool narrow;
  auto fields() { return std::tie(a, b, c, steps, eps, narrow); }
};

// Aligned floats that nothing has written yet.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(static_cast<float*>(
            ::operator new(size_t(floats) * sizeof(float), std::align_val_t{64}))) {}
  float* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> memory_;
};

// The tiles of a product of `rows` rows and `cols` columns, in whole groups; above the diagonal
// alone where it is symmetric.
std::vector<NewtonSchulzTile> tiles_of(int64_t rows, int64_t cols, bool symmetric) {
  std::vector<NewtonSchulzTile> tiles;
  const int64_t end = newton_schulz_groups(cols) * kNewtonSchulzGroup;
  for (int64_t row = 0; row < rows; row += kNewtonSchulzBlock)
    for (int64_t col = symmetric ? row : 0; col < end; col += kNewtonSchulzWidth)
      tiles.push_back({row, col, std::min(col + kNewtonSchulzWidth, end)});
  return tiles;
}

// Operations of an iteration.
double work_of(const NewtonSchulz& m) {
  return double(m.rows) * double(m.rows) * (double(m.rows) + 3 * double(m.cols));
}

// `for_each(n, f)` calls f(begin, end) on ranges that cover 0..n.
template <class F>
void orthogonalize(const NewtonSchulz& m, int64_t steps, const F& for_each) {
  const int64_t groups = newton_schulz_groups(m.rows);
  const auto halves = tiles_of(m.rows, m.rows, true), whole = tiles_of(m.rows, m.cols, false);
  auto each_group = [&](auto step) {
    for_each(groups, [&](int64_t begin, int64_t end) { step(m, begin, end); });
  };
  auto each_tile = [&](const std::vector<NewtonSchulzTile>& tiles, auto step) {
    for_each(int64_t(tiles.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) step(m, tiles[size_t(i)]);
    });
  };
  const bool narrow = m.y_type == DType::kBFloat16;
  each_group(BK_CALL_PRODUCTS(narrow, newton_schulz_load));
  each_group(BK_CALL_PRODUCTS(narrow, newton_schulz_scale));
  for (int64_t i = 0; i < steps; ++i) {
    each_group(BK_CALL_PRODUCTS(narrow, newton_schulz_pack));
    each_tile(halves, BK_CALL_PRODUCTS(narrow, newton_schulz_gram));
    each_group(BK_CALL_PRODUCTS(narrow, newton_schulz_pack_gram));
    each_tile(halves, BK_CALL_PRODUCTS(narrow, newton_schulz_polynomial));
    each_tile(whole, BK_CALL_PRODUCTS(narrow, newton_schulz_update));
  }
  each_group(BK_CALL_PRODUCTS(narrow, newton_schulz_store));
}

// Large matrices one after another, each by all threads; the others are taken by whichever thread
// is free, the largest first. Neither changes a bit of the results.
void run_all(std::vector<NewtonSchulz> matrices, int64_t steps) {
  std::sort(matrices.begin(), matrices.end(),
            [](const NewtonSchulz& p, const NewtonSchulz& q) { return work_of(p) > work_of(q); });
  const int64_t threads = thread_count(), count = int64_t(matrices.size());
  double left = 0;
  for (const NewtonSchulz& m : matrices) left += work_of(m);
  int64_t first = 0;
  for (; threads > 1 && first < count; ++first) {
    NewtonSchulz& m = matrices[size_t(first)];
    if (work_of(m) * 4 * double(threads) <= left) break;
    const Scratch scratch(newton_schulz_floats(m.rows, m.cols));
    m.scratch = scratch.data();
    orthogonalize(m, steps, [](int64_t n, const auto& f) { parallel_for(n, 1, f); });
    left -= work_of(m);
  }
  int64_t floats = 0;  // of the largest
  for (int64_t i = first; i < count; ++i)
    floats =
        std::max(floats, newton_schulz_floats(matrices[size_t(i)].rows, matrices[size_t(i)].cols));
  std::atomic<int64_t> next{first};
  parallel_for(std::min(threads, count - first), 1, [&](int64_t, int64_t) {
    const Scratch scratch(floats);
    for (int64_t i = next++; i < count; i = next++) {
      NewtonSchulz m = matrices[size_t(i)];
      m.scratch = scratch.data();
      orthogonalize(m, steps, [](int64_t n, const auto& f) { f(int64_t{0}, n); });
    }
  });
}

std::vector<Tensor> newton_schulz_cpu(const std::vector<Tensor>& xs, const Iteration& given) {
  BK_CHECK(given.steps >= 0, kOp, "steps must be at least 0");
  std::vector<Tensor> results;
  std::vector<RowView> views;  // copies of rows that were not evenly spaced
  std::vector<NewtonSchulz> matrices;
  for (const Tensor& x : xs) {
    BK_CHECK(x.is_cpu() && x.dim() >= 2, kOp, "xs must be [.., rows, columns], on the CPU");
    NewtonSchulz m{};
    m.x_type = float_type(x, kOp, "xs");
    m.y_type = given.narrow ? DType::kBFloat16 : DType::kFloat32;
    const int64_t rows = x.size(x.dim() - 2), cols = x.size(x.dim() - 1);
    results.push_back(empty_tensor(x, shape_of_result(x), scalar_type(m.y_type)));
    if (x.numel() == 0) continue;
    views.push_back(row_view(x, kOp, "xs"));
    const RowView& view = views.back();
    m.x_stride = view.stride;
    m.tall = rows > cols;
    m.rows = std::min(rows, cols);
    m.cols = std::max(rows, cols);
    m.a = float(given.a);
    m.b = float(given.b);
    m.c = float(given.c);
    m.eps = float(given.eps);
    for (int64_t i = 0; i < view.rows / rows; ++i) {
      m.x = static_cast<const char*>(view.data) + i * rows * view.stride * dtype_size(m.x_type);
      m.y = static_cast<char*>(results.back().mutable_data_ptr()) +
            i * rows * cols * dtype_size(m.y_type);
      matrices.push_back(m);
    }
  }
  run_all(std::move(matrices), given.steps);
  return results;
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CPU, m) { m.impl("newton_schulz", BK_BOX(bigkernel::newton_schulz_cpu)); }
