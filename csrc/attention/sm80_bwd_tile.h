// The tiles of attention's backward kernels, and the products of tiles: on tensor cores in 16 bits,
// by fma in fp32.
#pragma once
#include <type_traits>

#include "attention/sm80_bwd_kernels.h"
#include "attention/cuda_scores.h"
#include "attention/sm80_tile.h"

namespace bigkernel {

template <class T, int kDim, Part kPart, bool kGeneral>
struct BackwardTile {
  static constexpr bool kFma = sizeof(T) == 4;
  static constexpr bool kRowsAreKeys = kPart != Part::kQueries && kPart != Part::kMask;
  // 16 rows each, of a warp; two halve the loads of columns, where registers allow.
  static constexpr int kFrags = kDim == 64 && !kGeneral ? 2 : 1;
  static constexpr int kWarps = kFma ? (kDim == 256 ? 2 : 4) : (kDim == 256 || kFrags == 2 ? 4 : 8);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kFrags;
  static constexpr int kRows = kWarps * kWarpRows;
  // Rows' fragments stay in registers where those are left; without the tiles of rows, which they
  // come from, there is room for more columns.
  static constexpr bool kResident2 = !kGeneral && kPart == Part::kQueries && kDim == 128;
  static constexpr bool kResident1 = !kGeneral && (kPart == Part::kQueries || kDim == 128);
  static constexpr int kChunk = (kDim == 256 ? 16 : 32) / (kFma && kDim > 64 ? 2 : 1);
  static constexpr int kCols = kResident2 ? 2 * kChunk : kChunk;
  static constexpr int kBlocksPerSm = kFrags == 2 ? 2 : 1;
  static constexpr int kRowBytes = kRows * kDim * int(sizeof(T));  // a tile of rows
  static constexpr int kColBytes = kCols * kDim * int(sizeof(T));  // a tile of columns
  static constexpr int kStageBytes = 2 * kColBytes;                // q and dout, or k and v
  static constexpr int kStatPlanes = kGeneral ? 3 : 2;             // stat_plane
  static constexpr int kStatBytes = kRowsAreKeys ? kStatPlanes * kCols * 4 : 0;
  static constexpr int kStages = kResident2 ? 0 : 2 * kRowBytes;  // offset
  static constexpr int kStats = kStages + 2 * kStageBytes;        // offset
  static constexpr int kShared =
      kStats + 2 * kStatBytes > 2 * kRowBytes ? kStats + 2 * kStatBytes : 2 * kRowBytes;
};

template <class T, int kDim, Part kPart, bool kGeneral>
struct BackwardProducts {
  using Tile = BackwardTile<T, kDim, kPart, kGeneral>;
  using Layout = TileLayout<T, kDim>;
  static constexpr bool kFma = Tile::kFma;
  static constexpr bool kRowsAreKeys = Tile::kRowsAreKeys;
  static constexpr bool kResident1 = Tile::kResident1, kResident2 = Tile::kResident2;
  static constexpr int kFrags = Tile::kFrags;
  static constexpr int kSteps = kDim / 16;
  static constexpr int kTiles = Tile::kChunk / 8;

  using Sums = float[kFrags][kDim / 8][4];
  using Scores = float[kFrags][kTiles][4];
  using Operand = uint32_t[kFrags][kTiles / 2 + kFma][4];

  const uint32_t shared;
  const int lane, warp;
  // What this lane gives to ldmatrix_x4 at row 0, column 0: of its warp's rows, and of the columns
  // read by rows (`b` with _trans) and by columns (`b` without).
  const uint32_t row_base, col_base, pair_base;
  uint32_t resident1[kResident1 ? kFrags : 1][kResident1 ? kSteps : 1][4];
  uint32_t resident2[kResident2 ? kFrags : 1][kResident2 ? kSteps : 1][4];

  __device__ __forceinline__ explicit BackwardProducts(uint32_t shared_)
      : shared(shared_),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        row_base(MatrixCursor<T, kDim>(shared, warp * Tile::kWarpRows, lane).base[0]),
        col_base(MatrixCursor<T, kDim>(shared + Tile::kStages, 0, lane).base[0]),
        pair_base(MatrixCursor<T, kDim, MatrixOrder::kColumnsFirst>(shared + Tile::kStages, 0, lane)
                      .base[0]) {}

  // MatrixCursor::at from one register: tiles start at multiples of 128 bytes, so the swizzle of
  // the step is an XOR.
  static __device__ __forceinline__ uint32_t matrix_at(uint32_t base, int row, int step) {
    return (base ^ (step % 4 << 5)) + row * Layout::kRowBytes + step / 4 * 128;
  }

  // The same in a tile of columns. Which sum comes first decides what stays in registers.
  static __device__ __forceinline__ uint32_t column_at(uint32_t base, uint32_t tile, int row,
                                                       int step) {
    return kRowsAreKeys ? matrix_at(base, row, step) + tile : matrix_at(base + tile, row, step);
  }

  // Row m of the 2 * kFrags of which this thread holds elements.
  __device__ __forceinline__ int own_row(int m) const {
    return warp * Tile::kWarpRows + m * 8 + lane / 4;
  }

  __device__ __forceinline__ void keep_rows() {
#pragma unroll
    for (int f = 0; f < kFrags; ++f)
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if constexpr (kResident1) ldmatrix_x4(resident1[f][k], matrix_at(row_base, 16 * f, k));
        if constexpr (kResident2)
          ldmatrix_x4(resident2[f][k], matrix_at(row_base, 16 * f, k) + Tile::kRowBytes);
      }
  }

  // out = rows columns^T by fma, of rows at `row_tile` and columns at `col_tile`.
  __device__ __forceinline__ void multiply_fma(Scores& out, uint32_t row_tile, uint32_t col_tile,
                                               int dim) const {
    const uint32_t cols = shared + Tile::kStages + col_tile;
#pragma unroll
    for (int f = 0; f < kFrags; ++f)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[f][n][e] = 0.0f;
#pragma unroll 2
    for (int k = 0; k < (dim + 3) / 4; ++k) {
      float4 a[2 * kFrags];
#pragma unroll
      for (int m = 0; m < 2 * kFrags; ++m)
        a[m] = ld_shared_v4_f32(shared + row_tile + Layout::at(own_row(m), k));
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 b = ld_shared_v4_f32(cols + Layout::at(8 * n + lane % 4 * 2 + e, k));
#pragma unroll
          for (int m = 0; m < 2 * kFrags; ++m) {
            float& x = out[m / 2][n][m % 2 * 2 + e];
            x = fmaf(a[m].x, b.x, x);
            x = fmaf(a[m].y, b.y, x);
            x = fmaf(a[m].z, b.z, x);
            x = fmaf(a[m].w, b.w, x);
          }
        }
    }
  }

  // sum += p columns by fma. Lanes of a row exchange their elements of p. The products are summed
  // on their own first: added to `sum` one by one, each would be rounded at the size of what was
  // there before, which other columns may have made large.
  __device__ __forceinline__ void accumulate_fma(Sums& sum, const Scores& p,
                                                 uint32_t col_tile) const {
    constexpr int kWide = kDim == 64 ? 8 : 2;  // of n at a time, as registers allow
    const int t = lane % 4;
#pragma unroll
    for (int part = 0; part < kDim / 8; part += kWide) {
      float own[2 * kFrags][kWide][2] = {};
#pragma unroll
      for (int c = 0; c < Tile::kChunk; ++c) {
        float a[2 * kFrags];
#pragma unroll
        for (int m = 0; m < 2 * kFrags; ++m)
          a[m] = __shfl_sync(~0u, p[m / 2][c / 8][m % 2 * 2 + c % 2], c % 8 / 2, 4);
        // This lane's columns of sum: 8 n + 2 t, + 1.
        const uint32_t from = shared + Tile::kStages + col_tile + c * Layout::kRowBytes +
                              ((t / 2 ^ (Layout::turn(c) & 1)) << 4) + t % 2 * 8;
#pragma unroll
        for (int n = 0; n < kWide; ++n) {
          const float2 b =
              ld_shared_v2_f32(from + ((2 * (part + n) ^ (Layout::turn(c) & ~1)) << 4));
#pragma unroll
          for (int m = 0; m < 2 * kFrags; ++m) {
            own[m][n][0] = fmaf(a[m], b.x, own[m][n][0]);
            own[m][n][1] = fmaf(a[m], b.y, own[m][n][1]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 2 * kFrags; ++m)
#pragma unroll
        for (int n = 0; n < kWide; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) sum[m / 2][part + n][m % 2 * 2 + e] += own[m][n][e];
    }
  }

  // out = start(f, n) + rows columns^T on tensor cores.
  template <bool kResident, class Fragments, class Start>
  __device__ __forceinline__ void multiply(Scores& out, const Fragments& resident,
                                           uint32_t row_tile, uint32_t col_tile,
                                           const Start& start) const {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[kFrags][4];
      if constexpr (!kResident)
#pragma unroll
        for (int f = 0; f < kFrags; ++f)
          ldmatrix_x4(a[f], matrix_at(row_base, 16 * f, k) + row_tile);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, column_at(pair_base, col_tile, 8 * n, k));
#pragma unroll
        for (int f = 0; f < kFrags; ++f) {
          const uint32_t (&m)[4] = fragment<kResident>(resident, a, f, k);
          if (k == 0) {
            mma_m16n8k16(out[f][n], m, b[0], b[1], start(f, n), T{});
            mma_m16n8k16(out[f][n + 1], m, b[2], b[3], start(f, n + 1), T{});
          } else {
            mma_m16n8k16(out[f][n], m, b[0], b[1], T{});
            mma_m16n8k16(out[f][n + 1], m, b[2], b[3], T{});
          }
        }
      }
    }
  }
  template <bool kResident, class Fragments>
  static __device__ __forceinline__ const uint32_t (&fragment(const Fragments& resident,
                                                              const uint32_t (&loaded)[kFrags][4],
                                                              int f, int k))[4] {
    if constexpr (kResident)
      return resident[f][k];
    else
      return loaded[f];
  }

  __device__ __forceinline__ void accumulate(Sums& sum, const Operand& p, uint32_t col_tile) const {
#pragma unroll
    for (int k = 0; k < kTiles / 2; ++k)
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, column_at(col_base, col_tile, 16 * k, n));
#pragma unroll
        for (int f = 0; f < kFrags; ++f) {
          mma_m16n8k16(sum[f][2 * n], p[f][k], b[0], b[1], T{});
          mma_m16n8k16(sum[f][2 * n + 1], p[f][k], b[2], b[3], T{});
        }
      }
  }

  static __device__ __forceinline__ void round(Operand& out, const Scores& in) {
#pragma unroll
    for (int f = 0; f < kFrags; ++f)
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        out[f][n / 2][n % 2 * 2] = cvt_rn_x2(in[f][n][0], in[f][n][1], T{});
        out[f][n / 2][n % 2 * 2 + 1] = cvt_rn_x2(in[f][n][2], in[f][n][3], T{});
      }
  }
};

}  // namespace bigkernel
