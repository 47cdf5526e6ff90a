// Which kernel of attention's forward pass a call takes, its grid, and the launch.
#include <limits>

#include "attention/cuda_order.h"
#include "attention/sm80_fwd_kernels.h"
#include "cuda/launch.h"

namespace bigkernel {
namespace {

AttentionLaunch forward_kernel(const AttentionCudaArgs& args, int32_t dim, bool general,
                               const DeviceTraits& device) {
  return args.dtype == DType::kFloat32    ? attention_fwd_fp32(dim, general, device)
         : args.dtype == DType::kBFloat16 ? attention_fwd_bf16(dim, general, device)
                                          : attention_fwd_fp16(dim, general, device);
}

int64_t forward_blocks(const AttentionCudaArgs& args, const AttentionLaunch& launch) {
  const int64_t tiles = (int64_t{args.max_q} + launch.tile_rows - 1) / launch.tile_rows;
  return tiles * args.heads_q * args.batch;
}

}  // namespace

AttentionLaunch plan_attention_fwd(const AttentionCudaArgs& args, const DeviceTraits& device) {
  const bool aligned = rows_aligned(args.q, args.dim, args.dtype) &&
                       rows_aligned(args.k, args.dim, args.dtype) &&
                       rows_aligned(args.v, args.dim_v, args.dtype) &&
                       rows_aligned(args.out, args.dim_v, args.dtype);
  const bool general = args.mask.kind != MaskKind::kNone || args.slopes != nullptr ||
                       args.seed != nullptr || args.softcap > 0 || !(args.scale > 0) || !aligned;
  const int32_t dim = args.dim > args.dim_v ? args.dim : args.dim_v;
  AttentionLaunch launch = forward_kernel(args, dim, general, device);
  // Smaller tiles may come with more rows in a block. Where there would be a multiprocessor for
  // each of the others, half of them would have nothing to do.
  DeviceTraits roomy = device;
  roomy.shared_per_block = std::numeric_limits<int32_t>::max();
  const AttentionLaunch large = forward_kernel(args, dim, general, roomy);
  if (launch.tile_rows > large.tile_rows && forward_blocks(args, large) <= device.multiprocessors)
    launch = large;
  const int64_t blocks = forward_blocks(args, launch);
  if (blocks > 0x7fffffff)
    throw std::runtime_error(
        "bigkernel.attention_fwd: " + std::to_string(args.batch) + " sequences of " +
        std::to_string(args.heads_q) + " heads and up to " + std::to_string(args.max_q) +
        " rows take more blocks than a CUDA grid has, 2147483647. Split the batch.");
  if (blocks > 0)
    check_device("attention_fwd", launch.name, device, launch.generation, launch.shared);
  launch.blocks = uint32_t(blocks);
  launch.aligned = aligned;
  launch.together = heads_together(args, device, int64_t{args.batch} * args.heads_q, args.group,
                                   streamed_bytes(args, args.max_k));
  return launch;
}

void launch_attention_fwd(const AttentionCudaArgs& args, int device, void* stream) {
  const AttentionLaunch launch = plan_attention_fwd(args, use_device(device));
  if (launch.blocks == 0) return;
  AttentionCudaArgs ready = args;
  ready.aligned = launch.aligned;
  ready.together = launch.together;
  launch_kernel(launch.name, launch.kernel, launch.blocks, launch.threads, launch.shared, stream,
                ready);
}

}  // namespace bigkernel
