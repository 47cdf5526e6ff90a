// Which tile of which head a block takes. Blocks start in the order of their numbers, each on the
// first multiprocessor with room, so the order decides how long the last ones keep the others
// waiting (tools/cuda_schedule.py counts it). Host and device code: reports ask the same function.
#pragma once
#include <algorithm>

#include "attention/cuda.h"

namespace bigkernel {

struct BlockPlace {
  uint32_t head, rank;  // of all batch * heads; rank 0: the tile of a head that sees most
};

// The tiles of `together` heads by rank, then those of the next heads. Nothing fills the end of the
// last of these groups: heads that are left over come first.
BK_HD BlockPlace block_place(uint32_t block, uint32_t heads, uint32_t tiles, uint32_t together) {
  uint32_t first = 0, count = heads % together;
  if (block >= count * tiles) {
    block -= count * tiles;
    first = count + block / (together * tiles) * together;
    block %= together * tiles;
    count = together;
  }
  return {first + block % count, block / count};
}

// Of two matrices of a head: K and V of `rows` keys, or Q and dO of as many queries.
inline int64_t streamed_bytes(const AttentionCudaArgs& args, int64_t rows) {
  return rows * (args.dim + args.dim_v) * dtype_size(args.dtype);
}

// How many heads go together. Under a causal mask tiles differ: the longest of as many heads first
// as have what they stream in the L2 cache side by side; `sharing` heads stream the same `bytes`.
// Else a head at a time, one after the other in the cache.
inline uint32_t heads_together(const AttentionCudaArgs& args, const DeviceTraits& device,
                               int64_t heads, int64_t sharing, int64_t bytes) {
  if (args.right < 0 || args.left >= 0) return 1;
  const int64_t fit = std::max<int64_t>(1, device.l2_bytes / std::max<int64_t>(bytes, 1));
  return uint32_t(std::max<int64_t>(1, std::min(fit * sharing, heads)));
}

}  // namespace bigkernel
