// The gradient of an additive mask: dS, before softcap's part, summed over the dimensions along
// which the mask is broadcast. A pass of its own, run only on request: a block owns kRows x kCols
// elements of the result (kCols, where all rows share one) and goes through everything that adds to
// them in one order, with compensated sums (Kahan, 1965), as a mask of one row may sum up every
// score of the batch. A mask that is broadcast along the keys is attention_bwd_mask_rows_kernel's.
#pragma once
#include "attention/sm80_bwd.h"

namespace bigkernel {

__device__ __forceinline__ void store_mask_gradient(const AttentionMask& dmask, int64_t at,
                                                    float value) {
  void* const data = const_cast<void*>(dmask.data);
  switch (dmask.kind) {
    case MaskKind::kBFloat16:
      static_cast<bf16*>(data)[at] = round_to<bf16>(value);
      break;
    case MaskKind::kFloat16:
      static_cast<fp16*>(data)[at] = round_to<fp16>(value);
      break;
    case MaskKind::kFloat64:
      static_cast<double*>(data)[at] = value;
      break;
    default:
      static_cast<float*>(data)[at] = value;
  }
}

// Left to itself, the compiler spills in the 16-bit kernel of kDim 128, to fit in two blocks.
template <class T, int kDim>
__global__ void __launch_bounds__(BackwardTile<T, kDim, Part::kMask, true>::kThreads,
                                  sizeof(T) == 2 && kDim == 128 ? 1 : 0)
    attention_bwd_mask_kernel(const __grid_constant__ AttentionCudaArgs args) {
  extern __shared__ __align__(128) char memory[];
  using Block = Backward<T, kDim, Part::kMask, true>;
  using Tile = typename Block::Tile;
  const AttentionMask& dmask = args.dmask;
  const int row_tiles = (args.max_q + Tile::kRows - 1) / Tile::kRows;
  const int col_tiles = (args.max_k + Tile::kCols - 1) / Tile::kCols;
  const bool by_batch = dmask.batch != 0, by_head = dmask.head != 0, by_row = dmask.row != 0;
  int block = int(blockIdx.x);
  const int col_tile = block % col_tiles;
  block /= col_tiles;
  const int row_tile = by_row ? block % row_tiles : 0;
  block /= by_row ? row_tiles : 1;
  const int first_head = by_head ? block % args.heads_q : 0;
  const int first_batch = by_head ? block / args.heads_q : block;

  typename Block::Scores sum = {}, lost = {};
#pragma unroll 1
  for (int b = first_batch; b < (by_batch ? first_batch + 1 : args.batch); ++b) {
#pragma unroll 1
    for (int h = first_head; h < (by_head ? first_head + 1 : args.heads_q); ++h) {
#pragma unroll 1
      for (int r = row_tile; r < (by_row ? row_tile + 1 : row_tiles); ++r) {
        Block part(args, memory, b, h, r);
        if (part.row0 >= part.rows_all) continue;  // packed with longer sequences
        if (col_tile < part.first || col_tile >= part.last) continue;
        if (part.closed(0, col_tile)) continue;
        __syncthreads();  // everyone is done with the tiles before
        part.load_rows();
        part.start(0, col_tile, 0);
        cp_async_commit_group();
        cp_async_wait_group<0>();
        __syncthreads();
        typename Block::Scores p, ds;
        part.template differentiate<true>(p, ds, 0, col_tile * Tile::kCols, 0, 0);
#pragma unroll
        for (int f = 0; f < Block::kFrags; ++f)
#pragma unroll
          for (int n = 0; n < Block::kTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float x = __fsub_rn(ds[f][n][e], lost[f][n][e]);
              const float total = __fadd_rn(sum[f][n][e], x);
              lost[f][n][e] = __fsub_rn(__fsub_rn(total, sum[f][n][e]), x);
              sum[f][n][e] = total;
            }
      }
    }
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t corner = first_batch * dmask.batch + first_head * dmask.head;
  if (by_row) {
#pragma unroll
    for (int m = 0; m < 2 * Block::kFrags; ++m)
#pragma unroll
      for (int n = 0; n < Block::kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = row_tile * Tile::kRows + warp * Tile::kWarpRows + m * 8 + lane / 4;
          const int col = col_tile * Tile::kCols + 8 * n + lane % 4 * 2 + e;
          if (row < args.max_q && col < args.max_k)
            store_mask_gradient(dmask, corner + row * dmask.row + col * dmask.col,
                                sum[m / 2][n][m % 2 * 2 + e]);
        }
    return;
  }
  // The rows of a thread, then of a warp, then the warps.
  float* const columns = reinterpret_cast<float*>(memory);  // [kWarps, kCols]
  __syncthreads();
#pragma unroll
  for (int n = 0; n < Block::kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float x = 0.0f;
#pragma unroll
      for (int m = 0; m < 2 * Block::kFrags; ++m) x += sum[m / 2][n][m % 2 * 2 + e];
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) x += __shfl_xor_sync(~0u, x, offset);
      if (lane < 4) columns[warp * Tile::kCols + 8 * n + lane * 2 + e] = x;
    }
  __syncthreads();
  const int col = col_tile * Tile::kCols + int(threadIdx.x);
  if (threadIdx.x < Tile::kCols && col < args.max_k) {
    float x = 0.0f;
    for (int w = 0; w < Tile::kWarps; ++w) x += columns[w * Tile::kCols + threadIdx.x];
    store_mask_gradient(dmask, corner + col * dmask.col, x);
  }
}

}  // namespace bigkernel
