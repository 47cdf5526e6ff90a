// Which calls of attention's forward pass the kernels for few queries take, how the keys are split,
// and the launches.
#include <algorithm>

#include "attention/sm80_few_kernels.h"
#include "cuda/launch.h"

namespace bigkernel {
namespace {

int64_t tiles(int64_t length, int64_t tile) { return (length + tile - 1) / tile; }

AttentionLaunch choose(const AttentionCudaArgs& args) {
  const int32_t dim = std::max(args.dim, args.dim_v);
  return args.dtype == DType::kBFloat16 ? attention_few_bf16(dim) : attention_few_fp16(dim);
}

// Of one split.
int64_t few_blocks(const AttentionCudaArgs& args, const AttentionLaunch& launch) {
  return int64_t{args.batch} * args.heads_kv *
         tiles(int64_t{args.group} * args.max_q, launch.tile_rows);
}

}  // namespace

int64_t attention_few_part(const AttentionCudaArgs& args) {
  return int64_t{args.batch} * args.heads_q * args.max_q * (attention_part_width(args.dim_v) + 2);
}

// The number of splits after which the last block ends first, if a block takes the time of its
// tiles and of one more. Registers are left for three blocks on a multiprocessor in narrow heads,
// else for two.
void split_attention_fwd(AttentionCudaArgs& args, const DeviceTraits& device) {
  args.splits = 0;
  const bool taken =
      args.dtype != DType::kFloat32 && args.batch > 0 && args.heads_q > 0 && args.max_q > 0 &&
      args.max_q <= kAttentionFewRows && args.max_k >= kAttentionFewKeys &&
      args.mask.kind == MaskKind::kNone && args.slopes == nullptr && args.seed == nullptr &&
      rows_aligned(args.q, args.dim, args.dtype) && rows_aligned(args.k, args.dim, args.dtype) &&
      rows_aligned(args.v, args.dim_v, args.dtype) &&
      rows_aligned(args.out, args.dim_v, args.dtype);
  const AttentionLaunch launch = taken ? choose(args) : AttentionLaunch{};
  if (!taken || device.capability < launch.generation ||
      launch.shared > size_t(device.shared_per_block))
    return;
  const int64_t blocks = few_blocks(args, launch), keys = tiles(args.max_k, launch.tile_keys);
  const int64_t most = kAttentionMostParts / (attention_few_part(args) * int64_t{sizeof(float)});
  const int64_t at_once =
      device.multiprocessors *
      std::min<int64_t>(launch.tile_dim <= 64 ? 3 : 2, blocks_by_shared(device, launch.shared));
  int64_t best = 0, best_time = 0;
  for (int64_t splits = 1; splits <= std::min({keys, most, int64_t{128}}); ++splits) {
    const int64_t of_split = tiles(keys, splits), used = tiles(keys, of_split);
    const int64_t time = tiles(blocks * used, at_once) * (of_split + 1);
    if (best == 0 || time < best_time) {
      best = used;
      best_time = time;
    }
  }
  // One split of heads that share nothing is what the other kernels do without a second launch.
  if (best > 1 || args.group > 1) args.splits = int32_t(best);
}

std::vector<AttentionLaunch> plan_attention_few(const AttentionCudaArgs& args,
                                                const DeviceTraits& device) {
  AttentionLaunch launch = choose(args);
  AttentionLaunch sum =
      args.dtype == DType::kBFloat16 ? attention_few_sum_bf16() : attention_few_sum_fp16();
  const int64_t blocks = few_blocks(args, launch) * args.splits;
  const int64_t rows = int64_t{args.batch} * args.heads_q * args.max_q;
  if (blocks > 0x7fffffff)
    throw std::runtime_error("bigkernel.attention_fwd: " + std::to_string(args.batch) +
                             " sequences of " + std::to_string(args.heads_q) +
                             " heads take more blocks than a CUDA grid has, 2147483647. Split the "
                             "batch.");
  check_device("attention_fwd", launch.name, device, launch.generation, launch.shared);
  launch.blocks = uint32_t(blocks);
  sum.blocks = uint32_t(tiles(rows, sum.tile_rows));
  launch.aligned = sum.aligned = true;
  return {launch, sum};
}

void launch_attention_few(const AttentionCudaArgs& args, int device, void* stream) {
  AttentionCudaArgs ready = args;
  ready.aligned = true;
  for (const AttentionLaunch& launch : plan_attention_few(args, use_device(device)))
    launch_kernel(launch.name, launch.kernel, launch.blocks, launch.threads, launch.shared, stream,
                  ready);
}

}  // namespace bigkernel
