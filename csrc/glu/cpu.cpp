// CPU binding of glu_fwd and glu_bwd: checks, memory of the results, threads.
#include <optional>
#include <tuple>

#include "common/box.h"
#include "common/tensors.h"
#include "cpu/parallel.h"
#include "cpu/row_view.h"
#include "glu/glu.h"

namespace bigkernel {
namespace {

using OptionalTensor = std::optional<Tensor>;

// What forward and backward have in common; `shape` becomes that of the result.
struct Call {
  GluArgs args{};
  std::vector<int64_t> shape;
  int64_t rows;
  Tensor held[2];
};

Call prepare(const char* op, const Tensor& gate, const OptionalTensor& up, int64_t activation) {
  check_activation(op, activation);
  Call call;
  GluArgs& a = call.args;
  a.type = float_type(gate, op, "gate");
  a.activation = activation;
  const RowView first = row_view(gate, op, "gate");
  call.held[0] = first.held;
  call.shape = shape_of_result(gate);
  call.rows = first.rows;
  a.dim = first.dim;
  a.gate = first.data;
  a.gate_stride = first.stride;
  if (up.has_value()) {
    BK_CHECK(same_shape(gate, *up) && up->scalar_type() == gate.scalar_type(), op,
             "up must have gate's shape and dtype");
    const RowView second = row_view(*up, op, "up");
    call.held[1] = second.held;
    a.up = second.data;
    a.up_stride = second.stride;
  } else {
    BK_CHECK(first.dim % 2 == 0, op, "gate, which holds gate and up, must have an even last ",
             "dimension, got ", first.dim);
    call.shape.back() = a.dim = first.dim / 2;
    a.up = static_cast<const char*>(a.gate) + a.dim * dtype_size(a.type);
    a.up_stride = a.gate_stride;
  }
  return call;
}

Tensor glu_fwd_cpu(const Tensor& gate, const OptionalTensor& up, int64_t activation) {
  Call call = prepare("glu_fwd", gate, up, activation);
  Tensor y = Results::empty(gate, call.shape, gate.scalar_type());
  call.args.y = y.mutable_data_ptr();
  parallel_for(call.rows, row_grain(call.args.dim),
               [&](int64_t begin, int64_t end) { BK_CALL(glu_forward)(call.args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> glu_bwd_cpu(const Tensor& dy, const Tensor& gate,
                                       const OptionalTensor& up, int64_t activation) {
  constexpr const char* op = "glu_bwd";
  Call call = prepare(op, gate, up, activation);
  GluArgs& a = call.args;
  const RowView grads = row_view(dy, op, "dy");
  BK_CHECK(dy.scalar_type() == gate.scalar_type() && shape_of_result(dy) == call.shape, op,
           "dy must have the shape and dtype of glu_fwd's result");
  a.dy = grads.data;
  a.dy_stride = grads.stride;
  Tensor dgate = Results::empty(gate, shape_of_result(gate), gate.scalar_type());
  Tensor dup = up.has_value() ? Results::empty(gate, call.shape, gate.scalar_type())
                              : empty_tensor(gate, {0});
  a.dgate = dgate.mutable_data_ptr();
  a.dup = up.has_value() ? dup.mutable_data_ptr()
                         : static_cast<char*>(a.dgate) + a.dim * dtype_size(a.type);
  a.grad_stride = up.has_value() ? a.dim : 2 * a.dim;
  parallel_for(call.rows, row_grain(a.dim),
               [&](int64_t begin, int64_t end) { BK_CALL(glu_backward)(a, begin, end); });
  return {dgate, dup};
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CPU, m) {
  m.impl("glu_fwd", BK_BOX(bigkernel::glu_fwd_cpu));
  m.impl("glu_bwd", BK_BOX(bigkernel::glu_bwd_cpu));
}
