// CPU binding of norm_fwd and norm_bwd: checks, memory of the results, threads.
#include <optional>
#include <tuple>
#include <vector>

#include "common/box.h"
#include "common/tensors.h"
#include "cpu/parallel.h"
#include "cpu/row_sums.h"
#include "cpu/row_view.h"
#include "norm/norm.h"

namespace bigkernel {
namespace {

using OptionalTensor = std::optional<Tensor>;

// offset + weight in fp32: the tensor's own memory where that is it.
class Widened {
 public:
  Widened(const OptionalTensor& t, int64_t dim, float offset, const char* op,
          const char* argument) {
    if (!t.has_value()) return;
    BK_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == dim, op, argument, " must be [", dim,
             "] on the CPU");
    tensor_ = without_gaps(*t);
    type_ = float_type(tensor_, op, argument);
    if (type_ == DType::kFloat32 && offset == 0) {
      data_ = static_cast<const float*>(tensor_.const_data_ptr());
      return;
    }
    copy_.resize(size_t(dim));
    BK_CALL(norm_widen)(tensor_.const_data_ptr(), type_, offset, dim, copy_.data());
    data_ = copy_.data();
  }
  const float* data() const { return data_; }
  DType type() const { return type_; }

 private:
  Tensor tensor_;
  std::vector<float> copy_;
  const float* data_ = nullptr;
  DType type_ = DType::kFloat32;
};

std::tuple<Tensor, Tensor, Tensor> norm_fwd_cpu(const Tensor& x, const OptionalTensor& residual,
                                                const OptionalTensor& weight,
                                                const OptionalTensor& bias, double eps,
                                                double offset, bool center, bool round_first) {
  constexpr const char* op = "norm_fwd";
  NormArgs a{};
  a.x_type = a.sum_type = float_type(x, op, "x");
  const RowView rows = row_view(x, op, "x");
  BK_CHECK(rows.dim > 0, op, "x must have a last dimension of at least 1");
  const auto shape = shape_of_result(x);
  std::optional<RowView> other;
  Tensor sum;
  if (residual.has_value()) {
    BK_CHECK(same_shape(x, *residual), op, "residual must have x's shape");
    a.residual_type = float_type(*residual, op, "residual");
    BK_CHECK(a.residual_type == a.x_type || a.residual_type == DType::kFloat32, op,
             "residual must be float32 or have x's dtype");
    a.sum_type = a.residual_type;
    other = row_view(*residual, op, "residual");
    a.residual = other->data;
    a.residual_stride = other->stride;
    sum = Results::empty(x, shape, scalar_type(a.sum_type));
    a.sum = sum.mutable_data_ptr();
  } else {
    sum = empty_tensor(x, {0});
  }
  const Widened scale(weight, rows.dim, float(offset), op, "weight");
  const Widened shift(bias, rows.dim, 0, op, "bias");
  const std::vector<float> ones(bias.has_value() && !weight.has_value() ? size_t(rows.dim) : 0, 1);
  a.scale = ones.empty() ? scale.data() : ones.data();
  a.bias = shift.data();
  a.round_first = round_first;
  a.y_type = round_first && weight.has_value() && scale.type() != a.sum_type ? DType::kFloat32
                                                                             : a.sum_type;
  Tensor y = Results::empty(x, shape, scalar_type(a.y_type));
  std::vector<int64_t> stats_shape(shape);
  stats_shape.pop_back();
  stats_shape.insert(stats_shape.begin(), center ? 2 : 1);
  Tensor stats = empty_tensor(x, stats_shape, ScalarType::Float);
  a.x = rows.data;
  a.x_stride = rows.stride;
  a.y = y.mutable_data_ptr();
  a.rstd = static_cast<float*>(stats.mutable_data_ptr());
  a.mean = center ? a.rstd + rows.rows : nullptr;
  a.dim = rows.dim;
  a.eps = float(eps);
  parallel_for(rows.rows, row_grain(rows.dim),
               [&](int64_t begin, int64_t end) { BK_CALL(norm_forward)(a, begin, end); });
  return {y, sum, stats};
}

std::tuple<Tensor, Tensor, Tensor> norm_bwd_cpu(const Tensor& dy, const OptionalTensor& dsum,
                                                const Tensor& h, const OptionalTensor& weight,
                                                const Tensor& stats, double offset, bool center,
                                                bool needs_dweight, bool needs_dbias) {
  constexpr const char* op = "norm_bwd";
  NormGradArgs a{};
  a.h_type = float_type(h, op, "h");
  a.dy_type = float_type(dy, op, "dy");
  BK_CHECK(same_shape(dy, h), op, "dy must have h's shape");
  BK_CHECK(a.dy_type == a.h_type || a.dy_type == DType::kFloat32, op,
           "dy must be float32 or have h's dtype");
  const RowView rows = row_view(h, op, "h"), grads = row_view(dy, op, "dy");
  BK_CHECK(rows.dim > 0, op, "h must have a last dimension of at least 1");
  std::optional<RowView> other;
  if (dsum.has_value()) {
    BK_CHECK(same_shape(*dsum, h) && dsum->scalar_type() == h.scalar_type(), op,
             "dsum must have h's shape and dtype");
    other = row_view(*dsum, op, "dsum");
    a.dsum = other->data;
    a.dsum_stride = other->stride;
  }
  BK_CHECK(stats.is_cpu() && stats.scalar_type() == ScalarType::Float && stats.is_contiguous() &&
               stats.numel() == rows.rows * (center ? 2 : 1),
           op, "stats must be the third result of norm_fwd");
  const Widened scale(weight, rows.dim, float(offset), op, "weight");
  Tensor dh = Results::empty(h, shape_of_result(h), scalar_type(a.h_type));
  a.dy = grads.data;
  a.dy_stride = grads.stride;
  a.h = rows.data;
  a.h_stride = rows.stride;
  a.scale = scale.data();
  a.rstd = static_cast<const float*>(stats.const_data_ptr());
  a.mean = center ? a.rstd + rows.rows : nullptr;
  a.dh = dh.mutable_data_ptr();
  a.dim = rows.dim;

  const int64_t dim = rows.dim, count = int64_t(needs_dweight) + int64_t(needs_dbias);
  RowSums sums(rows.rows, dim, count);
  sums.each_chunk([&](int64_t begin, int64_t end, float* to) {
    std::vector<float> run(size_t(count == 0 ? 0 : 2 * dim));
    BK_CALL(norm_backward)(a, begin, end, needs_dweight ? to : nullptr,
                           needs_dbias ? to + (count - 1) * dim : nullptr, run.data());
  });
  auto total = [&](bool needed, int64_t which) {
    return needed ? sums.total(h, which) : empty_tensor(h, {0}, ScalarType::Float);
  };
  return {dh, total(needs_dweight, 0), total(needs_dbias, count - 1)};
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CPU, m) {
  m.impl("norm_fwd", BK_BOX(bigkernel::norm_fwd_cpu));
  m.impl("norm_bwd", BK_BOX(bigkernel::norm_bwd_cpu));
}
