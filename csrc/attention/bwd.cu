// Which kernels a call of attention's backward pass takes, their grids, and the launches.
#include <algorithm>

#include "attention/cuda_order.h"
#include "attention/sm80_bwd_kernels.h"
#include "cuda/launch.h"

namespace bigkernel {
namespace {

AttentionLaunch choose(const AttentionCudaArgs& args, Part part, bool general) {
  const int32_t dim = std::max(args.dim, args.dim_v);
  if (args.dtype == DType::kFloat32) return attention_bwd_fp32(part, dim, general);
  if (args.dtype == DType::kBFloat16) return attention_bwd_bf16(part, dim, general);
  return attention_bwd_fp16(part, dim, general);
}

bool is_aligned(const AttentionCudaArgs& args) {
  return rows_aligned(args.q, args.dim, args.dtype) && rows_aligned(args.k, args.dim, args.dtype) &&
         rows_aligned(args.v, args.dim_v, args.dtype) &&
         rows_aligned(args.out, args.dim_v, args.dtype) &&
         rows_aligned(args.dout, args.dim_v, args.dtype) &&
         rows_aligned(args.dq, args.dim, args.dtype) &&
         rows_aligned(args.dk, args.dim, args.dtype) &&
         rows_aligned(args.dv, args.dim_v, args.dtype);
}

bool is_general(const AttentionCudaArgs& args) {
  return args.mask.kind != MaskKind::kNone || args.slopes != nullptr || args.seed != nullptr ||
         args.softcap > 0 || !is_aligned(args);
}

int64_t tiles(int64_t length, int64_t tile) { return (length + tile - 1) / tile; }

}  // namespace

std::vector<AttentionLaunch> plan_attention_bwd(const AttentionCudaArgs& args,
                                                const DeviceTraits& device) {
  const bool aligned = is_aligned(args), general = is_general(args);
  std::vector<AttentionLaunch> launches;
  const auto add = [&](AttentionLaunch launch, int64_t blocks) {
    if (blocks > 0x7fffffff)
      throw std::runtime_error(
          "bigkernel.attention_bwd: " + std::to_string(args.batch) + " sequences of " +
          std::to_string(args.heads_q) + " heads, " + std::to_string(args.max_q) + " rows and " +
          std::to_string(args.max_k) +
          " keys take more blocks than a CUDA grid has, 2147483647. Split the batch.");
    if (blocks == 0) return;
    check_device("attention_bwd", launch.name, device, launch.generation, launch.shared);
    launch.blocks = uint32_t(blocks);
    launch.aligned = aligned;
    launches.push_back(launch);
  };
  const int64_t batch = args.batch, heads = args.heads_q;

  AttentionLaunch queries = choose(args, Part::kQueries, general);
  // General for all parts, where types and dims have the general one alone.
  const AttentionLaunch rows = attention_bwd_rows(args.dtype, queries.general);
  const bool packed = args.cu_q != nullptr;
  add(rows,
      tiles(packed ? args.total_q : args.max_q, rows.tile_rows) * heads * (packed ? 1 : batch));
  for (const Part part : {Part::kKeysValues, Part::kKeys, Part::kValues}) {
    AttentionLaunch launch = choose(args, part, general);
    if (launch.kernel == nullptr) continue;
    const int64_t units = batch * args.heads_kv * args.splits;
    launch.together =
        heads_together(args, device, units, 1, streamed_bytes(args, args.max_q) * args.members);
    add(launch, tiles(args.max_k, launch.tile_rows) * units);
  }
  if (args.splits > 1) {
    const AttentionLaunch launch = attention_bwd_sum(args.dtype);
    add(launch, tiles(args.max_k, launch.tile_rows) * args.heads_kv * batch);
  }
  queries.together =
      heads_together(args, device, heads * batch, args.group, streamed_bytes(args, args.max_k));
  add(queries, tiles(args.max_q, queries.tile_rows) * heads * batch);

  const AttentionMask& dmask = args.dmask;
  if (dmask.kind != MaskKind::kNone) {
    const int64_t owners = (dmask.batch != 0 ? batch : 1) * (dmask.head != 0 ? heads : 1);
    if (dmask.col != 0) {
      const AttentionLaunch launch = choose(args, Part::kMask, true);
      add(launch, owners * tiles(args.max_k, launch.tile_keys) *
                      (dmask.row != 0 ? tiles(args.max_q, launch.tile_rows) : 1));
    } else {
      const AttentionLaunch launch = attention_bwd_mask_rows();
      add(launch, tiles(owners * (dmask.row != 0 ? args.max_q : 1), launch.tile_rows));
    }
  }
  return launches;
}

void launch_attention_bwd(const AttentionCudaArgs& args, int device, void* stream) {
  const std::vector<AttentionLaunch> launches = plan_attention_bwd(args, use_device(device));
  if (launches.empty()) return;
  AttentionCudaArgs ready = args;
  ready.aligned = launches[0].aligned;
  for (const AttentionLaunch& launch : launches) {
    ready.together = launch.together;
    launch_kernel(launch.name, launch.kernel, launch.blocks, launch.threads, launch.shared, stream,
                  ready);
  }
}

// Where keys have too few tiles for the GPU: the fewest splits that make three blocks for each that
// runs at a time, so that the last to end keep few of them waiting (tools/cuda_schedule.py). Blocks
// of 8 warps fill a multiprocessor.
void split_attention_bwd(AttentionCudaArgs& args, const DeviceTraits& device) {
  args.splits = 1;
  if (args.group > 1) {
    AttentionLaunch launch = choose(args, Part::kKeysValues, is_general(args));
    if (launch.kernel == nullptr) launch = choose(args, Part::kKeys, true);
    const int64_t blocks =
        args.heads_kv * (args.cu_q != nullptr ? tiles(args.total_k, launch.tile_rows)
                                              : args.batch * tiles(args.max_k, launch.tile_rows));
    const int64_t wanted = int64_t{3} * device.multiprocessors * 256 / launch.threads;
    for (int32_t splits = 2; splits <= args.group && blocks * args.splits < wanted; ++splits) {
      if (args.group % splits != 0) continue;
      if (splits * attention_bwd_part(args) * int64_t{sizeof(float)} > kAttentionMostParts) break;
      args.splits = splits;
    }
  }
  args.members = args.group / args.splits;
}

}  // namespace bigkernel
