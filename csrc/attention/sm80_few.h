// Attention forward on the GPU for few queries, as in decoding: each of a few rows sees many keys,
// and a block for a head of them would leave most of the GPU without any. So the query heads that
// share keys are the rows of one tile, row = member * queries + query, and the keys are split among
// blocks. Each leaves its O, not divided yet, and what it is to be divided by; a second kernel adds
// them up in one order:
//   m = max_s m_s;  w_s = 2^((m_s - m) log2 e);  l = sum_s w_s l_s;  out = sum_s w_s O_s / l
// (the split of keys is FlashDecoding's, Dao et al., 2023).
//
// The tiles are those of the forward kernel for everything (sm80_fwd.h): 64 rows, 16 a warp. Both K
// and V have two stages, the next tile's on their way through all of this one's time: memory is
// what a call waits for.
//
//   kDim   keys   shared memory
//     64     64   8 KB + 2 x 16 KB
//    128     64   16 KB + 2 x 32 KB
//    256     32   32 KB + 2 x 32 KB
#pragma once
#include "attention/sm80_few_kernels.h"
#include "attention/sm80_fwd_products.h"
#include "attention/sm80_fwd_softmax.h"
#include "cuda/device.h"

namespace bigkernel {

template <class T, int kDim_>
struct FewShape : ForwardShape<T, kDim_, true> {
  using Base = ForwardShape<T, kDim_, true>;
  static constexpr int kStage = 2 * Base::kKeys * Base::kRowBytes;
  static constexpr int kShared = Base::kKeyTile + 2 * kStage;
};

// What a split leaves in args.parts: O [rows, splits, width], then m and l [rows, splits, 2], where
// rows are those of lse [B, Hq, max_q].
struct FewParts {
  int64_t rows;
  int width;
  float* sums;
  float2* stats;

  __device__ __forceinline__ explicit FewParts(const AttentionCudaArgs& args)
      : rows(int64_t(args.batch) * args.heads_q * args.max_q),
        width(attention_part_width(args.dim_v)),
        sums(args.parts),
        stats(reinterpret_cast<float2*>(args.parts + rows * args.splits * width)) {}
};

// The keys that a row of the tile sees. Rows are members' queries.
template <class Shape>
__device__ __forceinline__ void hide_few(const ForwardBlock<Shape>& block,
                                         typename ForwardBlock<Shape>::Scores& s, int first_key) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int query = block.row_of(0, e) % block.sequence.rows;
    const int lo = block.reach.lo(query) - first_key, hi = block.reach.hi(query) - first_key;
#pragma unroll
    for (int n = 0; n < Shape::kKeys / 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int key = 8 * n + block.lane % 4 * 2 + c;
        if (key < lo || key >= hi) s[0][n][2 * e + c] = -BK_INFINITY;
      }
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kDim <= 128 ? 2 : 1)
    attention_few_kernel(const __grid_constant__ AttentionCudaArgs args) {
  using T = typename Shape::Element;
  using Layout = TileLayout<T, Shape::kDim>;
  using Loader = TileLoader<T, Shape::kKeys, Shape::kDim, Shape::kThreads>;
  extern __shared__ __align__(128) uint4 attention_shared[];
  const int row_tiles = (args.group * args.max_q + Shape::kRows - 1) / Shape::kRows;
  int index = int(blockIdx.x);
  const int split = index % args.splits;
  index /= args.splits;
  const int first_row = index % row_tiles * Shape::kRows;
  index /= row_tiles;
  const int kv_head = index % args.heads_kv;
  const DeviceSequence sequence = sequence_of(args, index / args.heads_kv);
  const int rows = args.group * sequence.rows;
  if (first_row >= rows) return;
  const ForwardBlock<Shape> block(args, sequence, kv_head, first_row,
                                  shared_address(attention_shared));
  const DeviceReach& reach = block.reach;
  const int begin = reach.lo(0) / Shape::kKeys;
  const int tiles = max(0, (reach.hi(sequence.rows - 1) + Shape::kKeys - 1) / Shape::kKeys - begin);
  const int of_split = (tiles + args.splits - 1) / args.splits;
  const int first = begin + split * of_split;
  const int last = min(begin + tiles, first + of_split);

  const Loader keys(row_pointer<T>(args.k, sequence.index, kv_head, sequence.first_k), args.k.row,
                    args.dim, threadIdx.x);
  const Loader values(row_pointer<T>(args.v, sequence.index, kv_head, sequence.first_k), args.v.row,
                      args.dim_v, threadIdx.x);
  const auto load = [&](int tile, int stage) {
    const uint32_t to = block.shared + Shape::kKeyTile + stage * Shape::kStage;
    keys.load_bounded(to, tile * Shape::kKeys, sequence.keys);
    values.load_bounded(to + Shape::kStage / 2, tile * Shape::kKeys, sequence.keys);
  };
  // Of a row of the tile: its query head, and its query.
  const auto head_of = [&](int row) { return kv_head * args.group + row / sequence.rows; };

  ForwardProducts<Shape> products(block);
  ForwardSoftmax<Shape> softmax(args.scale);
  if (first < last) {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < Shape::kRows * Layout::kChunks; i += Shape::kThreads) {
      const int local = i / Layout::kChunks, chunk = i % Layout::kChunks, row = first_row + local;
      const bool there = row < rows && chunk * Layout::kChunk < args.dim;
      const T* const from = row_pointer<T>(args.q, sequence.index, head_of(there ? row : 0),
                                           sequence.first_q + (there ? row % sequence.rows : 0));
      cp_async_16(block.shared + Layout::at(local, chunk),
                  from + (there ? chunk * Layout::kChunk : 0), there ? 16 : 0);
    }
    load(first, 0);
    cp_async_commit_group();
  }
  const DeviceScores rule(args, sequence, 0);  // nothing that differs between heads is used
  int step = Shape::kStage;                    // to the other stage
#pragma unroll 1
  for (int tile = first; tile < last; ++tile) {
    cp_async_wait_group<0>();
    __syncthreads();  // this tile is there; everyone is done with the other stage
    if (tile + 1 < last) load(tile + 1, (tile + 1 - first) % 2);
    cp_async_commit_group();
    typename ForwardBlock<Shape>::Scores s = {};
    products.refresh();
    products.multiply_keys(s);
    for_each(block, s, 0, [&](float& x, int, int) { x = rule.scaled(x); });
    if (rule.softcap > 0)
      for_each(block, s, 0, [&](float& x, int, int) {
        float unused;
        x = rule.capped(x, unused);
      });
    hide_few(block, s, tile * Shape::kKeys);
    float shrink[2];
    softmax.template take<true>(s, products.o, shrink);
    products.add_values(s, shrink);
    products.keys.base[0] += step;
    products.values.base[0] += step;
    step = -step;
  }

  const FewParts parts(args);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float total = softmax.sum[0][e];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int row = block.row_of(0, e);
    if (row >= rows) continue;
    const int64_t at = ((int64_t(sequence.index) * args.heads_q + head_of(row)) * args.max_q +
                        row % sequence.rows) *
                           args.splits +
                       split;
    if (block.lane % 4 == 0) parts.stats[at] = make_float2(softmax.top[0][e], total);
    float* const to = parts.sums + at * parts.width + block.lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Shape::kDim / 8; ++n)
      if (8 * n < parts.width)
        st_global_v2_f32(to + 8 * n, products.o[0][n][2 * e], products.o[0][n][2 * e + 1]);
  }
}

constexpr int kFewRows = 4;  // of a block of the second kernel, a warp each

template <class T>
__global__ void __launch_bounds__(32 * kFewRows)
    attention_few_sum_kernel(const __grid_constant__ AttentionCudaArgs args) {
  const FewParts parts(args);
  const int64_t index = int64_t(blockIdx.x) * kFewRows + threadIdx.x / 32;
  if (index >= parts.rows) return;
  const int lane = threadIdx.x % 32, query = int(index % args.max_q);
  const int head = int(index / args.max_q % args.heads_q);
  const DeviceSequence sequence = sequence_of(args, int(index / args.max_q / args.heads_q));
  if (query >= sequence.rows) return;
  const float2* const stats = parts.stats + index * args.splits;
  float top = -BK_INFINITY;
  for (int split = lane; split < args.splits; split += 32) top = fmaxf(top, stats[split].x);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
  const auto weight = [&](int split) { return ex2_approx_ftz((stats[split].x - top) * kLog2E); };
  float total = 0.0f;
  if (top != -BK_INFINITY)
    for (int split = lane; split < args.splits; split += 32)
      total += weight(split) * stats[split].y;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
  const bool dead = total == 0;
  if (lane == 0)
    *reinterpret_cast<float2*>(
        row_pointer<float>(args.lse, sequence.index, head, sequence.first_q + query)) =
        dead ? make_float2(-BK_INFINITY, 0.0f) : make_float2(top, logf(total));
  T* const out = row_pointer<T>(args.out, sequence.index, head, sequence.first_q + query);
  for (int column = 2 * lane; column < args.dim_v; column += 64) {
    float2 sum = {};
    for (int split = 0; split < args.splits && !dead; ++split) {
      const float2 part = *reinterpret_cast<const float2*>(
          parts.sums + (index * args.splits + split) * parts.width + column);
      const float w = weight(split);
      sum.x = fmaf(w, part.x, sum.x);
      sum.y = fmaf(w, part.y, sum.y);
    }
    const float inverse = dead ? 0.0f : 1.0f / total;
    *reinterpret_cast<uint32_t*>(out + column) = cvt_rn_x2(sum.x * inverse, sum.y * inverse, T{});
  }
}

template <class T, int kDim, int... kWider>
AttentionLaunch choose_few(int32_t dim) {
  if constexpr (sizeof...(kWider) > 0) {
    if (dim > kDim) return choose_few<T, kWider...>(dim);
  }
  using Shape = FewShape<T, kDim>;
  AttentionLaunch launch{};
  launch.name = "attention_few_kernel";
  launch.kernel = reinterpret_cast<const void*>(&attention_few_kernel<Shape>);
  launch.generation = kSm80;
  launch.threads = Shape::kThreads;
  launch.shared = Shape::kShared;
  launch.tile_rows = Shape::kRows;
  launch.tile_keys = Shape::kKeys;
  launch.tile_dim = Shape::kDim;
  return launch;
}

template <class T>
AttentionLaunch few_sum() {
  AttentionLaunch launch{};
  launch.name = "attention_few_sum_kernel";
  launch.kernel = reinterpret_cast<const void*>(&attention_few_sum_kernel<T>);
  launch.generation = kSm80;
  launch.threads = 32 * kFewRows;
  launch.tile_rows = kFewRows;
  return launch;
}

}  // namespace bigkernel
