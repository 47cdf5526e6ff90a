// CUDA binding of adam_norm and adam_step_: checks, scratch memory, the current stream. Nothing is
// read back: whether a step is skipped, and by how much it is clipped, is decided on the device.
#include <utility>
#include <vector>

#include "adam/binding.h"
#include "adam/cuda.h"
#include "cuda/stream.h"

namespace bigkernel {
namespace {

DeviceScalar device_scalar(const std::optional<Tensor>& t, int device, const char* op,
                           const char* name) {
  if (!t) return {nullptr, 0};
  const bool is_double = t->scalar_type() == ScalarType::Double;
  BK_CHECK(t->is_cuda() && t->get_device_index() == device && t->numel() == 1, op, name,
           " must be one element on the parameters' device");
  BK_CHECK(is_double || t->scalar_type() == ScalarType::Float, op, name,
           " must be float32 or float64");
  return {t->const_data_ptr(), is_double};
}

// Scratch for one call, carved into arrays of 8-byte alignment.
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t bytes)
      : tensor_(empty_tensor(like, {bytes}, ScalarType::Byte)),
        next_(static_cast<char*>(tensor_.mutable_data_ptr())) {}
  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += (count * int64_t(sizeof(T)) + 7) / 8 * 8;
    return array;
  }

 private:
  Tensor
      tensor_;  // torch's allocator reuses it in stream order, so it may go before the kernels end
  char* next_;
};

Tensor adam_norm_cuda(std::vector<Tensor> grads, std::optional<Tensor> grad_scale) {
  constexpr const char* op = "adam_norm";
  BK_CHECK(!grads.empty(), op, "grads must not be empty");
  const int device = grads[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Staging staging;
  std::vector<AdamTensor> list(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& g = grads[i];
    BK_CHECK(g.is_cuda() && g.get_device_index() == device, op, "grads[", i,
             "] is not on the device of grads[0]");
    list[i].grad_type = dtype_of(g, op, "grads");
    BK_CHECK(list[i].grad_type <= DType::kFloat16, op,
             "grads must be float32, bfloat16 or float16");
    list[i].numel = g.numel();
    list[i].grad = (is_dense(g) ? g : staging.read(g, g)).const_data_ptr();
  }
  AdamDeviceCall call{};
  call.grad_scale = device_scalar(grad_scale, device, op, "grad_scale");
  const int64_t partials = adam_partial_count(list);
  Scratch scratch(grads[0], 8 * (partials + 1));
  call.partials = scratch.take<double>(partials);
  call.partial_count = int32_t(partials);
  Tensor norm = empty_tensor(grads[0], {}, ScalarType::Float);
  call.norm = static_cast<float*>(norm.mutable_data_ptr());
  void* stream = current_cuda_stream(device);
  launch_adam_norm(list, call.partials, device, stream);
  launch_adam_finish(call, device, stream);
  return norm;
}

Tensor adam_step_cuda(const AdamCall& lists) {
  const Tensor& first = lists.first();
  const int device = first.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Staging staging;
  const std::vector<AdamTensor> tensors = gather(lists, staging);

  std::vector<AdamDeviceGroup> groups(lists.group_sizes.size());
  for (size_t i = 0; i < groups.size(); ++i) {
    groups[i].host = {int32_t(lists.flags[i]), lists.lrs[i],  lists.beta1s[i],
                      lists.beta2s[i],         lists.epss[i], lists.weight_decays[i]};
    groups[i].lr = {nullptr, 0};
    if (!lists.lr_tensors.empty())
      groups[i].lr = device_scalar(lists.lr_tensors[i], device, kAdamOp, "lr_tensors");
  }

  AdamDeviceCall call{};
  call.grad_scale = device_scalar(lists.grad_scale, device, kAdamOp, "grad_scale");
  call.found_inf = device_scalar(lists.found_inf, device, kAdamOp, "found_inf");
  call.total_norm = device_scalar(lists.total_norm, device, kAdamOp, "total_norm");
  call.max_norm = lists.max_norm ? *lists.max_norm : -1.0;
  if (lists.seed) {
    BK_CHECK(lists.seed->is_cuda() && lists.seed->get_device_index() == device &&
                 lists.seed->numel() == 1 && lists.seed->scalar_type() == ScalarType::Long,
             kAdamOp, "seed must be one int64 element on the parameters' device");
    call.seed = static_cast<const int64_t*>(lists.seed->const_data_ptr());
  }
  const bool measure = lists.max_norm && !lists.total_norm;
  const int64_t partials = measure ? adam_partial_count(tensors) : 0;
  const int64_t count = int64_t(tensors.size());
  Scratch scratch(first, 8 * (partials + 2) + count * int64_t(sizeof(AdamScalars)));
  call.partials = scratch.take<double>(partials);
  call.partial_count = int32_t(partials);
  call.scalars = scratch.take<AdamScalars>(count);
  call.control = scratch.take<AdamControl>(1);
  Tensor norm = lists.max_norm ? empty_tensor(first, std::vector<int64_t>{}, ScalarType::Float)
                               : empty_tensor(first, std::vector<int64_t>{0}, ScalarType::Float);
  call.norm = static_cast<float*>(norm.mutable_data_ptr());

  void* stream = current_cuda_stream(device);
  if (measure) launch_adam_norm(tensors, call.partials, device, stream);
  launch_adam_step(tensors, groups, call, device, stream);
  staging.write_back();
  return norm;
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CUDA, m) {
  m.impl("adam_norm", BK_BOX(bigkernel::adam_norm_cuda));
  m.impl("adam_step_", BK_BOX(bigkernel::adam_step_cuda));
}
