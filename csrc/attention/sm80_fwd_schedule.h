// Which rows a block of attention's forward has, and the order in which it takes the tiles of keys.
#pragma once
#include "attention/cuda_order.h"
#include "attention/sm80_fwd_block.h"

namespace bigkernel {

// The last rows, which under a causal mask see most, first.
struct ForwardPlace {
  int batch, head, first_row;

  __device__ __forceinline__ ForwardPlace(const AttentionCudaArgs& args, int rows) {
    const uint32_t tiles = (args.max_q + rows - 1) / rows;
    const BlockPlace place =
        block_place(blockIdx.x, uint32_t(args.batch * args.heads_q), tiles, args.together);
    first_row = int(tiles - 1 - place.rank) * rows;
    batch = place.head / uint32_t(args.heads_q);
    head = int(place.head) - batch * args.heads_q;
  }
};

// The tiles of keys of a block, in the order in which they are taken: those that not every row of
// the block sees whole, at either end, then the others.
struct ForwardSteps {
  int begin, left_edges, edges, full_begin, full_end, count;

  __device__ ForwardSteps(const DeviceReach& reach, int first_row, int last_row, int keys) {
    begin = reach.lo(first_row) / keys;
    const int end = (reach.hi(last_row) + keys - 1) / keys;
    full_begin = (reach.lo(last_row) + keys - 1) / keys;
    full_end = reach.hi(first_row) / keys;
    count = max(0, end - begin);
    if (full_begin >= full_end) full_begin = full_end = max(begin, end);
    left_edges = full_begin - begin;
    edges = count - (full_end - full_begin);
  }
  __device__ int tile(int step) const {
    if (step < left_edges) return begin + step;
    return step < edges ? full_end + step - left_edges : full_begin + step - edges;
  }
};

// The first step from this one on whose tile the mask does not close.
template <class Shape>
__device__ __forceinline__ int open_step(const ForwardBlock<Shape>& block,
                                         const ForwardSteps& steps, int step) {
  if (block.args.mask.kind == MaskKind::kNone) return step;
  const DeviceScores rule(block.args, block.sequence, block.head);
#pragma unroll 1
  for (; step < steps.count; ++step) {
    const int first_key = steps.tile(step) * Shape::kKeys;
    if (!mask_closes<Shape::kRows, Shape::kKeys, Shape::kThreads>(
            rule, block.first_row, block.sequence.rows - block.first_row, first_key,
            block.sequence.keys - first_key))
      break;
  }
  return step;
}

}  // namespace bigkernel
