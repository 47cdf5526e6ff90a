// CUDA binding of augment: checks, the current stream, and the tables, which reach the device in
// one asynchronous copy from pinned memory. torch keeps that memory until the copy is done, so
// nothing here waits for the GPU; only tables that are on the GPU already cost a synchronisation,
// for the colours in them decide what is launched.
#include "augment/binding.h"
#include "augment/cuda_plan.h"
#include "cuda/launch.h"
#include "cuda/stream.h"

namespace bigkernel {
namespace {

Tensor on_host(const Tensor& t) {
  return t.is_cpu() ? t : torch::stable::to(t, torch::stable::Device(torch::headeronly::kCPU));
}
std::optional<Tensor> on_host(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(on_host(*t)) : t;
}

Tensor augment_cuda(std::vector<Tensor> images, Tensor geometry, Tensor color, Tensor fill,
                    std::optional<Tensor> mean, std::optional<Tensor> std_, int64_t out_h,
                    int64_t out_w, bool channels_last_in, bool channels_last_out,
                    int64_t interpolation, bool antialias, double in_scale, int64_t out_dtype) {
  const Tensor& like = images.empty() ? geometry : images[0];
  BK_CHECK(like.is_cuda(), kAugmentName, "images must be on the GPU, as the tables are");
  const int device = like.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  const AugmentCall call(images, on_host(geometry), on_host(color), on_host(fill), on_host(mean),
                         on_host(std_), out_h, out_w, channels_last_in, channels_last_out,
                         interpolation, antialias, in_scale, out_dtype, like);
  if (call.out.numel() == 0) return call.out;

  const AugmentInput input{call.args,          call.batch->views().data(), call.geometry_row(0),
                           call.colors(),      call.fill_row(0),           call.samples(),
                           call.color.size(1), call.fill.size(0),          call.antialias};
  const AugmentLaunch launch = plan_augment(input, device_traits(device));
  Tensor scratch = empty_tensor(like, {launch.scratch_bytes}, ScalarType::Byte);
  Tensor host = torch::stable::empty({launch.table_bytes}, ScalarType::Byte, std::nullopt,
                                     torch::stable::Device(torch::headeronly::kCPU), true);
  Tensor tables = empty_tensor(like, {launch.table_bytes}, ScalarType::Byte);
  write_augment_tables(input, launch, scratch.mutable_data_ptr(), host.mutable_data_ptr());
  torch::stable::copy_(tables, host, true);
  launch_augment(input, launch, tables.const_data_ptr(), scratch.mutable_data_ptr(), device,
                 current_cuda_stream(device));
  return call.out;
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CUDA, m) { m.impl("augment", BK_BOX(bigkernel::augment_cuda)); }
