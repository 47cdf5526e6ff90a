// CUDA binding of bias_act_fwd and bias_act_bwd: checks, memory of the results, the current stream.
#include <tuple>

#include "bias_act/binding.h"
#include "bias_act/cuda.h"
#include "common/box.h"
#include "common/tensors.h"
#include "cuda/stream.h"

namespace bigkernel {
namespace {

// Fills in x, and what of dy and y is one memory; returns y.
Tensor prepare(const char* op, BiasActCudaArgs& call, const Tensor& x) {
  BK_CHECK(x.is_cuda(), op, "x must be on the GPU");
  call.rows = call.args.dim == 0 ? 0 : x.numel() / call.args.dim;
  call.args.x_stride = call.args.dy_stride = call.args.dim;
  call.args.x = x.const_data_ptr();
  Tensor y = empty_tensor(x, shape_of_result(x));
  call.args.y = y.mutable_data_ptr();
  return y;
}

Tensor bias_act_fwd_cuda(const Tensor& x, const OptionalTensor& bias, int64_t activation) {
  constexpr const char* op = "bias_act_fwd";
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  BiasActCudaArgs call{bias_act_args(op, x, bias, activation), 0, nullptr, nullptr};
  const Tensor rows = without_gaps(x);
  Tensor y = prepare(op, call, rows);
  launch_bias_act(call, x.get_device_index(), current_cuda_stream(x.get_device_index()));
  return y;
}

std::tuple<Tensor, Tensor> bias_act_bwd_cuda(const Tensor& dy, const Tensor& x,
                                             const OptionalTensor& bias, int64_t activation,
                                             bool needs_dbias) {
  constexpr const char* op = "bias_act_bwd";
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  BiasActCudaArgs call{bias_act_args(op, x, bias, activation, &dy), 0, nullptr, nullptr};
  BK_CHECK(dy.is_cuda() && dy.get_device_index() == x.get_device_index(), op,
           "dy must be on x's device");
  const Tensor rows = without_gaps(x), grads = without_gaps(dy);
  Tensor dx = prepare(op, call, rows);
  call.args.dy = grads.const_data_ptr();
  const int64_t dim = needs_dbias ? call.args.dim : 0;
  Tensor dbias = empty_tensor(x, {dim}, ScalarType::Float);
  // torch's allocator reuses it in stream order, so it may go before the kernels end.
  Tensor partials =
      empty_tensor(x, {std::max<int64_t>(1, bias_act_chunks(call.rows) * dim)}, ScalarType::Float);
  if (needs_dbias) {
    call.dbias = static_cast<float*>(dbias.mutable_data_ptr());
    call.partials = static_cast<float*>(partials.mutable_data_ptr());
  }
  launch_bias_act(call, x.get_device_index(), current_cuda_stream(x.get_device_index()));
  return {dx, dbias};
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CUDA, m) {
  m.impl("bias_act_fwd", BK_BOX(bigkernel::bias_act_fwd_cuda));
  m.impl("bias_act_bwd", BK_BOX(bigkernel::bias_act_bwd_cuda));
}
