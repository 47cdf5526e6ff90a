// CPU binding of bias_act_fwd and bias_act_bwd: checks, memory of the results, threads.
#include <optional>
#include <tuple>
#include <vector>

#include "bias_act/binding.h"
#include "common/box.h"
#include "common/tensors.h"
#include "cpu/parallel.h"
#include "cpu/row_sums.h"
#include "cpu/row_view.h"

namespace bigkernel {
namespace {

Tensor bias_act_fwd_cpu(const Tensor& x, const OptionalTensor& bias, int64_t activation) {
  constexpr const char* op = "bias_act_fwd";
  BiasActArgs a = bias_act_args(op, x, bias, activation);
  const RowView rows = row_view(x, op, "x");
  a.x = rows.data;
  a.x_stride = rows.stride;
  Tensor y = Results::empty(x, shape_of_result(x), x.scalar_type());
  a.y = y.mutable_data_ptr();
  parallel_for(rows.rows, row_grain(a.dim),
               [&](int64_t begin, int64_t end) { BK_CALL(bias_act_forward)(a, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> bias_act_bwd_cpu(const Tensor& dy, const Tensor& x,
                                            const OptionalTensor& bias, int64_t activation,
                                            bool needs_dbias) {
  constexpr const char* op = "bias_act_bwd";
  BiasActArgs a = bias_act_args(op, x, bias, activation, &dy);
  const RowView rows = row_view(x, op, "x"), grads = row_view(dy, op, "dy");
  a.x = rows.data;
  a.x_stride = rows.stride;
  a.dy = grads.data;
  a.dy_stride = grads.stride;
  Tensor dx = Results::empty(x, shape_of_result(x), x.scalar_type());
  a.y = dx.mutable_data_ptr();
  RowSums sums(rows.rows, a.dim, needs_dbias);
  sums.each_chunk([&](int64_t begin, int64_t end, float* dbias) {
    std::vector<float> run(needs_dbias ? size_t(a.dim) : 0);
    BK_CALL(bias_act_backward)(a, begin, end, needs_dbias ? dbias : nullptr, run.data());
  });
  return {dx, needs_dbias ? sums.total(x, 0) : empty_tensor(x, {0}, ScalarType::Float)};
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CPU, m) {
  m.impl("bias_act_fwd", BK_BOX(bigkernel::bias_act_fwd_cpu));
  m.impl("bias_act_bwd", BK_BOX(bigkernel::bias_act_bwd_cpu));
}
