// The two products of attention's forward, S = Q K^T and O += P V: on tensor cores in 16 bits, by
// fma in fp32.
#pragma once
#include <type_traits>

#include "attention/sm80_fwd_block.h"

namespace bigkernel {

template <class Shape>
struct ForwardMma {
  using T = typename Shape::Element;
  using Scores = typename ForwardBlock<Shape>::Scores;
  static constexpr int kDim = Shape::kDim, kKeys = Shape::kKeys, kRowTiles = Shape::kRowTiles;

  // Not used: but without it the compiler keeps what it knows of the block through the loop instead
  // of working it out again, and spills in kDim 32.
  const ForwardBlock<Shape>& block;
  MatrixCursor<T, kDim> rows, values;
  MatrixCursor<T, kDim, MatrixOrder::kColumnsFirst> keys;
  typename ForwardBlock<Shape>::Sums o = {};

  __device__ __forceinline__ explicit ForwardMma(const ForwardBlock<Shape>& block_)
      : block(block_),
        rows(block.shared, block.warp_row, block.lane),
        values(block.shared + Shape::kValueTile, 0, block.lane),
        keys(block.shared + Shape::kKeyTile, 0, block.lane) {}

  // Once in each round of a loop (MatrixCursor).
  __device__ __forceinline__ void refresh() {
    rows.refresh();
    keys.refresh();
    values.refresh();
  }

  // S = Q K^T
  __device__ __forceinline__ void multiply_keys(Scores& s) const {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) ldmatrix_x4(a[i], rows.at(16 * i, k));
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, keys.at(16 * n, k));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma_m16n8k16(s[i][2 * n], a[i], b[0], b[1], T{});
          mma_m16n8k16(s[i][2 * n + 1], a[i], b[2], b[3], T{});
        }
      }
    }
  }

  // O += P V: `softmax` has scaled O
  __device__ __forceinline__ void add_values(const Scores& p, const float (&)[2]) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int x = 0; x < 4; ++x)
          a[i][x] =
              cvt_rn_x2(p[i][2 * k + x / 2][x % 2 * 2], p[i][2 * k + x / 2][x % 2 * 2 + 1], T{});
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, values.at(16 * k, d));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma_m16n8k16(o[i][2 * d], a[i], b[0], b[1], T{});
          mma_m16n8k16(o[i][2 * d + 1], a[i], b[2], b[3], T{});
        }
      }
    }
  }
};

template <class Shape>
struct ForwardFma {
  using Layout = TileLayout<float, Shape::kDim>;
  using Scores = typename ForwardBlock<Shape>::Scores;
  static constexpr int kDim = Shape::kDim, kKeys = Shape::kKeys;
  static constexpr int kKeyGroups = kKeys / 8;

  const uint32_t shared;
  const int lane, warp_row;
  const float scale;
  typename ForwardBlock<Shape>::Sums o = {};

  __device__ __forceinline__ explicit ForwardFma(const ForwardBlock<Shape>& block)
      : shared(block.shared), lane(block.lane), warp_row(block.warp_row), scale(block.args.scale) {}

  __device__ __forceinline__ void refresh() {}

  // Places in the tile of P (fp32 only), one for each chunk of four keys; writing pairs of keys and
  // reading chunks of 8 rows are both free of bank conflicts.
  static __device__ __forceinline__ uint32_t weight_at(int row, int chunk) {
    const int turn = kKeys % 32 == 0 ? 2 * (row & 3) : kKeys == 16 ? row & 2 : row >> 2 & 1;
    return Shape::kWeightTile + row * kKeys * 4 + ((chunk ^ turn) << 4);
  }

  // S = scale Q K^T, unless `score_tile` will scale: the same elements as mma's layout
  // gives this lane.
  __device__ __forceinline__ void multiply_keys(Scores& s) const {
#pragma unroll 2
    for (int k = 0; k < Layout::kChunks; ++k) {
      float4 q[2];
#pragma unroll
      for (int e = 0; e < 2; ++e)
        q[e] = ld_shared_v4_f32(shared + Layout::at(warp_row + 8 * e + lane / 4, k));
#pragma unroll
      for (int n = 0; n < kKeyGroups; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float4 key =
              ld_shared_v4_f32(shared + Shape::kKeyTile + Layout::at(8 * n + lane % 4 * 2 + c, k));
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[0][n][2 * e + c];
            x = fmaf(q[e].x, key.x, x);
            x = fmaf(q[e].y, key.y, x);
            x = fmaf(q[e].z, key.z, x);
            x = fmaf(q[e].w, key.w, x);
          }
        }
      }
    }
    if constexpr (!Shape::kGeneral) {
#pragma unroll
      for (int n = 0; n < kKeyGroups; ++n)
#pragma unroll
        for (int x = 0; x < 4; ++x)  // rounded, as the general kernel does: not fused with - m
          s[0][n][x] = __fmul_rn(s[0][n][x], scale);
    }
  }

  // O = c O + P V. This lane's columns of O: 16 j + 4 t .. + 3, in o[0][2 j] and
  // o[0][2 j + 1]. A tile's products are summed on their own: added to O one by one, each would be
  // rounded at the size of what was there before, which an earlier tile may have made large.
  __device__ __forceinline__ void add_values(const Scores& p, const float (&shrink)[2]) {
    const int g = lane / 4, t = lane % 4;
    __syncwarp();  // the weights before are read
#pragma unroll
    for (int n = 0; n < kKeyGroups; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        st_shared_v2_f32(shared + weight_at(warp_row + 8 * e + g, 2 * n + t / 2) + t % 2 * 8,
                         p[0][n][2 * e], p[0][n][2 * e + 1]);
    __syncwarp();
    constexpr int kPart = kDim > 128 ? 64 : kDim;  // columns that registers are left for
#pragma unroll
    for (int part = 0; part < kDim / 16; part += kPart / 16) {
      float sum[kPart / 16][2][4] = {};
#pragma unroll 2
      for (int chunk = 0; chunk < kKeys / 4; ++chunk) {
        float weight[2][4];
#pragma unroll
        for (int e = 0; e < 2; ++e)
          *reinterpret_cast<float4*>(weight[e]) =
              ld_shared_v4_f32(shared + weight_at(warp_row + 8 * e + g, chunk));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int d = 0; d < kPart / 16; ++d) {
            const float4 value = ld_shared_v4_f32(shared + Shape::kValueTile +
                                                  Layout::at(4 * chunk + j, 4 * (part + d) + t));
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              sum[d][e][0] = fmaf(weight[e][j], value.x, sum[d][e][0]);
              sum[d][e][1] = fmaf(weight[e][j], value.y, sum[d][e][1]);
              sum[d][e][2] = fmaf(weight[e][j], value.z, sum[d][e][2]);
              sum[d][e][3] = fmaf(weight[e][j], value.w, sum[d][e][3]);
            }
          }
        }
      }
#pragma unroll
      for (int d = 0; d < kPart / 16; ++d)
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            float& to = o[0][2 * (part + d) + x / 2][2 * e + x % 2];
            to = fmaf(to, shrink[e], sum[d][e][x]);
          }
    }
  }
};

template <class Shape>
using ForwardProducts = std::conditional_t<Shape::kFma, ForwardFma<Shape>, ForwardMma<Shape>>;

}  // namespace bigkernel
