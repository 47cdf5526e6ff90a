// Attention forward on the GPU, for one block of query rows (formula: attention.h):
//   for each tile of keys that a row of the block sees:
//     S = Q K^T;  m' = max(m, max_j S);  P = 2^((S - m') f);  c = 2^((m - m') f)
//     l = c l + sum_j P;  O = c O + drop(P) V;  m = m'
//   out = O / l;  lse = m f ln 2 + ln l          f = scale log2 e, or log2 e where scores are not
//                                                just scaled products
// The algorithm is FlashAttention-2's (Dao, 2023).
//
// A block of 4 warps (2 in fp32 with wide heads) holds 64 or 128 rows, 16 or 32 a warp. Shared
// memory: the tiles of Q, K and V, 16-byte chunks swizzled (sm80_tile.h), at most 96 KB so that
// every GPU from sm_80 on has room; in fp32 also P. K and V are two stages of one pipeline: while a
// tile's scores are computed its values are on their way, while they are weighted the next keys.
//
// Two kernels for each type and width of head: the plain one takes causality and windows, and runs
// an inner loop without any masking over the tiles that the whole block sees; the general one takes
// everything: softcap, ALiBi, mask, dropout, any scale, rows that are not 16-byte aligned.
// bf16 and fp16 multiply by mma.m16n8k16, fp32 by fma, so it keeps fp32's accuracy; all keep scores
// in mma's layout: lane 4 g + t has rows g, g + 8 and keys 2 t, 2 t + 1 of each 16 x 8.
//
// Here: the loop over tiles and the kernel. Beside it: sm80_fwd_block.h, what a block has;
// sm80_fwd_schedule.h, which rows it takes and in which order their keys; sm80_fwd_products.h;
// sm80_fwd_softmax.h; sm80_fwd_epilogue.h.
#pragma once
#include <type_traits>

#include "attention/sm80_fwd_epilogue.h"
#include "attention/sm80_fwd_products.h"
#include "attention/sm80_fwd_schedule.h"
#include "attention/sm80_fwd_softmax.h"
#include "cuda/device.h"

namespace bigkernel {

template <class Shape>
__device__ __forceinline__ void attend(const ForwardBlock<Shape>& block) {
  using T = typename Shape::Element;
  constexpr int kDim = Shape::kDim, kKeys = Shape::kKeys;
  using QLoader = TileLoader<T, Shape::kRows, kDim, Shape::kThreads>;
  using KLoader = TileLoader<T, kKeys, kDim, Shape::kThreads>;
  const AttentionCudaArgs& args = block.args;
  const DeviceSequence& sequence = block.sequence;
  const auto load_edge = [&](const auto& loader, uint32_t tile, int first, int rows) {
    if (block.aligned)
      loader.load_bounded(tile, first, rows);
    else
      loader.load_unaligned(tile, first, rows);
  };
  const int last_row = min(block.first_row + Shape::kRows, sequence.rows) - 1;
  const ForwardSteps steps(block.reach, block.first_row, last_row, kKeys);
  const int kv_head = block.head / args.group;
  KLoader keys(row_pointer<T>(args.k, sequence.index, kv_head, sequence.first_k), args.k.row,
               args.dim, threadIdx.x);
  KLoader values(row_pointer<T>(args.v, sequence.index, kv_head, sequence.first_k), args.v.row,
                 args.dim_v, threadIdx.x);
  const uint32_t key_tile = block.shared + Shape::kKeyTile,
                 value_tile = block.shared + Shape::kValueTile;

  // Before the first copies: after them, the loop of kDim 64 is an instruction longer.
  ForwardProducts<Shape> products(block);
  ForwardSoftmax<Shape> softmax(args.scale);
  auto begin = [&](int step) {
    if (step < steps.count) {
      const QLoader queries(row_pointer<T>(args.q, sequence.index, block.head, sequence.first_q),
                            args.q.row, args.dim, threadIdx.x);
      load_edge(queries, block.shared, block.first_row, sequence.rows);
      load_edge(keys, key_tile, steps.tile(step) * kKeys, sequence.keys);
      if (!Shape::kGeneral) values.pad(value_tile);
    }
    cp_async_commit_group();
  };
  if (!Shape::kGeneral) begin(0);

  auto take = [&](bool more, int first_key, int next_key, auto edge) {
    constexpr bool kEdge = decltype(edge)::value;
    cp_async_wait_group<0>();
    __syncthreads();  // keys are there; everyone is done with the values before
    if constexpr (kEdge) {
      load_edge(values, value_tile, first_key, sequence.keys);
    } else {
      values.load(value_tile, 0);
      values.advance(kKeys);
    }
    cp_async_commit_group();
    typename ForwardBlock<Shape>::Scores s = {};
    products.refresh();
    products.multiply_keys(s);
    cp_async_wait_group<0>();
    __syncthreads();  // values are there; everyone is done with the keys
    if (more) {
      if constexpr (kEdge) {
        load_edge(keys, key_tile, next_key, sequence.keys);
      } else {
        keys.load(key_tile, 0);
        keys.advance(kKeys);
      }
    }
    cp_async_commit_group();
    if constexpr (Shape::kGeneral)
      score_tile(block, s, first_key);
    else if constexpr (kEdge)
      hide(block, s, first_key);
    float shrink[2];
    softmax.template take<kEdge>(s, products.o, shrink);
    if constexpr (Shape::kGeneral) {
      if (args.seed != nullptr) drop(block, s, first_key);
    }
    products.add_values(s, shrink);
  };
  if constexpr (Shape::kGeneral) {
    int step = -1;  // the search for open tiles is long code: it stands here once
#pragma unroll 1
    do {
      const int next = open_step(block, steps, step + 1);
      if (step < 0)
        begin(next);
      else
        take(next < steps.count, steps.tile(step) * kKeys, steps.tile(next) * kKeys,
             std::true_type{});
      step = next;
    } while (step < steps.count);
  } else {
#pragma unroll 1
    for (int step = 0; step < steps.edges; ++step)
      take(step + 1 < steps.count, steps.tile(step) * kKeys, steps.tile(step + 1) * kKeys,
           std::true_type{});
    values.advance(steps.full_begin * kKeys);
    keys.advance((steps.full_begin + 1) * kKeys);
#pragma unroll 1
    for (int left = steps.count - steps.edges; left > 0; --left)
      take(left > 1, 0, 0, std::false_type{});
  }
  finish(block, softmax, products.o);
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::blocks_per_sm(kCompiledFor))
    attention_fwd_kernel(const __grid_constant__ AttentionCudaArgs args) {
  extern __shared__ __align__(128) uint4 attention_shared[];
  const ForwardPlace place(args, Shape::kRows);
  const DeviceSequence sequence = sequence_of(args, place.batch);
  if (place.first_row >= sequence.rows) return;
  attend(ForwardBlock<Shape>(args, sequence, place.head, place.first_row,
                             shared_address(attention_shared)));
}

}  // namespace bigkernel
