// What a block of attention's forward leaves: out and lse.
#pragma once
#include "attention/sm80_fwd_softmax.h"

namespace bigkernel {

// out = O / l and lse. O goes through the warp's own rows of the tile of Q, to leave in whole
// sectors.
template <class Shape>
__device__ __forceinline__ void finish(const ForwardBlock<Shape>& block,
                                       const ForwardSoftmax<Shape>& softmax,
                                       const typename ForwardBlock<Shape>::Sums& o) {
  using T = typename Shape::Element;
  using Layout = TileLayout<T, Shape::kDim>;
  const AttentionCudaArgs& args = block.args;
  const DeviceSequence& sequence = block.sequence;
  const int lane = block.lane;
  const float kept = Shape::kGeneral && args.seed != nullptr ? args.dropout_scale : 1.0f;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Shape::kRowTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float total = softmax.sum[i][e];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const bool dead = total == 0;
      const float inverse = dead ? 0.0f : kept / total;
      const int row = block.row_of(i, e), local = row - block.first_row;
      if (lane % 4 == 0 && row < sequence.rows)
        *reinterpret_cast<float2*>(
            row_pointer<float>(args.lse, sequence.index, block.head, sequence.first_q + row)) =
            dead ? make_float2(-BK_INFINITY, 0.0f)
                 : make_float2(softmax.top[i][e] * (softmax.kNatural ? 1.0f : args.scale),
                               logf(total));
#pragma unroll
      for (int n = 0; n < Shape::kDim / 8; ++n) {
        const float low = o[i][n][2 * e] * inverse, high = o[i][n][2 * e + 1] * inverse;
        if constexpr (Shape::kFma)
          st_shared_v2_f32(block.shared + Layout::at(local, n / 2 * 4 + lane % 4) + n % 2 * 8, low,
                           high);
        else
          st_shared(block.shared + Layout::at(local, n) + lane % 4 * 4, cvt_rn_x2(low, high, T{}));
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = Layout::kChunks;
#pragma unroll
  for (int j = 0; j < Shape::kWarpRows * kChunks / 32; ++j) {
    const int at = j * 32 + lane, local = block.warp_row + at / kChunks, chunk = at % kChunks;
    const int row = block.first_row + local, column = chunk * Layout::kChunk;
    if (row >= sequence.rows || column >= args.dim_v) continue;
    const uint4 value = ld_shared_v4(block.shared + Layout::at(local, chunk));
    T* to = row_pointer<T>(args.out, sequence.index, block.head, sequence.first_q + row) + column;
    if (block.aligned) {
      st_global_v4(to, value);
    } else {
      union {
        uint4 whole;
        T element[Layout::kChunk];
      } parts;
      parts.whole = value;
#pragma unroll
      for (int x = 0; x < Layout::kChunk; ++x)
        if (column + x < args.dim_v) to[x] = parts.element[x];
    }
  }
}

}  // namespace bigkernel
