// Attention backward on the GPU, for one block of rows (formula: attention.h; the algorithm is
// FlashAttention-2's, Dao, 2023): scores are recomputed from lse, tile by tile.
//
//   P = exp(score - lse), P' = P * drop, dP = (dout v^T) * drop, delta = <dout, out> - dlse
//   dS = P * (dP - delta), through softcap: * (1 - tanh^2)
//   dv = P'^T dout, dk = scale * dS^T q, dq = scale * dS k
//
// One body for two kernels. A block keeps its rows and streams tiles of columns past them: for dk
// and dv rows are keys, and columns the queries of the heads of a group; for dq rows are
// queries, and columns keys. Each gradient has one owner and one order of summation: the same bits
// at each run, without atomics, and without memory beyond two floats a row, or dk and dv in fp32
// for each split of a group where keys are few (split_attention_bwd). The price is 7 products of
// tiles instead of 5. A single kernel would have to read and write a fp32 tile of dq for each pair
// of tiles, and to keep a copy of dq for each block that works on a head at the same time; where
// those copies outgrow the L2 cache, that costs what the two products do. P and dS stay in the
// registers that mma left them in, which are the operand `a` of the next product: nothing but the
// inputs passes through shared memory.
//
//   kDim           rows   columns   warps   shared memory
//   16 bits   64    128      32     4, 8    2 x 16 KB + 2 x 8.25 KB (8 warps: the general kernel)
//            128    128      32        8    2 x 32 KB + 2 x 16.25 KB
//            128    128      64        8    2 x 32 KB, columns in the place of rows (dq, plain)
//            256     64      16        4    2 x 32 KB + 2 x 16.13 KB
//   fp32      64     64      32        4    2 x 16 KB + 2 x 16.25 KB
//            128     64      16        4    2 x 32 KB + 2 x 16.13 KB
//            256     32       8        2    2 x 32 KB + 2 x 16.06 KB
// Below 99 KB, so that every GPU from sm_80 on has room. dk and dv of kDim 256 are two kernels:
// their sums would fill 256 registers.
//
// The plain kernel takes causality and windows, and has an inner loop without any masking for the
// tiles that every row sees; the general one takes everything: softcap, ALiBi, masks, dropout, rows
// that are not 16-byte aligned. fp32 multiplies by fma, so it keeps fp32's accuracy, in mma's
// layout: lane 4 g + t has rows g, g + 8 and columns 2 t, 2 t + 1 of each 16 x 8.
#pragma once
#include "attention/cuda_order.h"
#include "attention/sm80_bwd_tile.h"

namespace bigkernel {

// What attention_bwd_rows_kernel leaves of each row, in planes of args.delta: -lse (-inf where no
// key is open; in 16 bits times log2 e) and -delta. For the general kernel, whose mask may put lse
// so far from 0 that one float loses the log sum, lse's two summands: the negative of the highest
// score, -delta, and the negative of the log sum (in 16 bits times log2 e).
__device__ __forceinline__ int64_t stat_plane(const AttentionCudaArgs& args) {
  return args.heads_q * (args.cu_q != nullptr ? args.total_q : int64_t(args.batch) * args.max_q);
}

// What blocks that share a tile of keys leave in args.parts for attention_bwd_sum_kernel: the sums
// [heads_kv * splits, rows, width] for dk, then for dv; rows: the keys of the batch, one sequence
// after the other.
struct AttentionParts {
  int64_t rows;
  int dk_width, dv_width;
  float *dk, *dv;

  __device__ __forceinline__ explicit AttentionParts(const AttentionCudaArgs& args)
      : rows(args.cu_q != nullptr ? args.total_k : int64_t(args.batch) * args.max_k),
        dk_width(attention_part_width(args.dim)),
        dv_width(attention_part_width(args.dim_v)),
        dk(args.parts),
        dv(args.parts + int64_t(args.heads_kv) * args.splits * rows * dk_width) {}

  // Of a split of a head of keys and a key of a sequence.
  __device__ __forceinline__ int64_t row(const AttentionCudaArgs& args, const DeviceSequence& seq,
                                         int unit, int key) const {
    const int64_t first = args.cu_q != nullptr ? seq.first_k : int64_t(seq.index) * args.max_k;
    return unit * rows + first + key;
  }
};

template <class T, int kDim, Part kPart, bool kGeneral>
struct Backward : BackwardProducts<T, kDim, kPart, kGeneral> {
  using Products = BackwardProducts<T, kDim, kPart, kGeneral>;
  using Products::kFma, Products::kFrags, Products::kResident1, Products::kResident2;
  using Products::kRowsAreKeys, Products::kTiles;
  using Products::lane, Products::own_row, Products::resident1, Products::resident2;
  using Products::shared, Products::warp;
  using typename Products::Layout, typename Products::Operand, typename Products::Scores;
  using typename Products::Sums, typename Products::Tile;
  using ColumnLoader = TileLoader<T, Tile::kCols, kDim, Tile::kThreads>;
  using RowLoader = TileLoader<T, Tile::kRows, kDim, Tile::kThreads>;
  static constexpr bool kNeedsDs = kPart != Part::kValues;  // the gradient of the score
  static constexpr bool kNeedsP = kPart == Part::kKeysValues || kPart == Part::kValues;

  const AttentionCudaArgs& args;
  const float* const stats;
  const int unit;  // for dq a head; for dk and dv `members` heads of a group, which it sums over
  const DeviceSequence seq;
  const DeviceReach reach;
  const bool aligned;
  int row0, rows_all, cols_all;  // rows of the block start at row0
  int first, last;               // tiles of columns that any row sees
  int full_first, full_last;     // and those that all rows see
  Sums sum1, sum2;               // of dS and rows 1; of P and rows 2
  float row_lse[kFrags][2], row_delta[kFrags][2], row_log_sum[kFrags][2];

  __device__ __forceinline__ const AttentionTensor& rows1() const {
    return kRowsAreKeys ? args.k : args.q;
  }
  __device__ __forceinline__ const AttentionTensor& rows2() const {
    return kRowsAreKeys ? args.v : args.dout;
  }
  __device__ __forceinline__ const AttentionTensor& cols1() const {
    return kRowsAreKeys ? args.q : args.k;
  }
  __device__ __forceinline__ const AttentionTensor& cols2() const {
    return kRowsAreKeys ? args.dout : args.v;
  }
  __device__ __forceinline__ int64_t first_of_rows() const {
    return kRowsAreKeys ? seq.first_k : seq.first_q;
  }
  __device__ __forceinline__ int64_t first_of_cols() const {
    return kRowsAreKeys ? seq.first_q : seq.first_k;
  }
  __device__ __forceinline__ int row_head() const {
    return kRowsAreKeys ? unit / args.splits : unit;
  }
  __device__ __forceinline__ int column_head(int member) const {
    return kRowsAreKeys ? unit * args.members + member : unit / args.group;
  }

  __device__ __forceinline__ Backward(const AttentionCudaArgs& args_, char* memory, int batch,
                                      int unit_, int tile)
      : Products(shared_address(memory)),
        args(args_),
        stats(reinterpret_cast<const float*>(memory + Tile::kStats)),
        unit(unit_),
        seq(sequence_of(args_, batch)),
        reach(reach_of(args_, seq)),
        aligned(!kGeneral || args_.aligned) {
    row0 = tile * Tile::kRows;
    rows_all = kRowsAreKeys ? seq.keys : seq.rows;
    cols_all = kRowsAreKeys ? seq.rows : seq.keys;
    const int top = row0, bottom = min(row0 + Tile::kRows, rows_all) - 1;
    first = low(top) / Tile::kCols;
    last = (high(bottom) + Tile::kCols - 1) / Tile::kCols;
    full_first = (low(bottom) + Tile::kCols - 1) / Tile::kCols;
    full_last = high(top) / Tile::kCols;
  }

  // The columns [low, high) that a row sees.
  __device__ __forceinline__ int low(int row) const {
    return kRowsAreKeys ? reach.first_row(row) : reach.lo(row);
  }
  __device__ __forceinline__ int high(int row) const {
    return kRowsAreKeys ? reach.end_row(row, seq.rows) : reach.hi(row);
  }

  __device__ __forceinline__ ColumnLoader loader(const AttentionTensor& t, int dim,
                                                 int member) const {
    return ColumnLoader(row_pointer<T>(t, seq.index, column_head(member), first_of_cols()), t.row,
                        dim, threadIdx.x);
  }

  // Starts the copies of any tile of columns.
  __device__ __forceinline__ void start(int member, int tile, int stage) const {
    const ColumnLoader a = loader(cols1(), args.dim, member);
    const ColumnLoader b = loader(cols2(), args.dim_v, member);
    const uint32_t to = shared + Tile::kStages + stage * Tile::kStageBytes;
    const int col = tile * Tile::kCols;
    if (aligned) {
      a.load_bounded(to, col, cols_all);
      b.load_bounded(to + Tile::kColBytes, col, cols_all);
    } else {
      a.load_unaligned(to, col, cols_all);
      b.load_unaligned(to + Tile::kColBytes, col, cols_all);
    }
    if (kRowsAreKeys && threadIdx.x < Tile::kStatPlanes * Tile::kCols) {
      const int i = col + int(threadIdx.x) % Tile::kCols;
      cp_async_4(stat_address(stage), stat_of(member, i < cols_all ? i : 0), i < cols_all ? 4 : 0);
    }
  }

  // Of this thread: one of the first plane for the first kCols threads, of the second for the next.
  __device__ __forceinline__ uint32_t stat_address(int stage) const {
    return shared + Tile::kStats + stage * Tile::kStatBytes + threadIdx.x * 4;
  }
  __device__ __forceinline__ const float* stat_of(int member, int row) const {
    const int64_t plane = threadIdx.x / Tile::kCols * stat_plane(args);
    return row_pointer<float>(args.delta, seq.index, column_head(member), seq.first_q) + plane +
           row;
  }

  __device__ __forceinline__ void load_rows() {
    const RowLoader a(row_pointer<T>(rows1(), seq.index, row_head(), first_of_rows()), rows1().row,
                      args.dim, threadIdx.x);
    const RowLoader b(row_pointer<T>(rows2(), seq.index, row_head(), first_of_rows()), rows2().row,
                      args.dim_v, threadIdx.x);
    if (aligned) {
      a.load_bounded(shared, row0, rows_all);
      if (kNeedsDs) b.load_bounded(shared + Tile::kRowBytes, row0, rows_all);
    } else {
      a.load_unaligned(shared, row0, rows_all);
      if (kNeedsDs) b.load_unaligned(shared + Tile::kRowBytes, row0, rows_all);
    }
    if constexpr (!kRowsAreKeys) {
      const float* p = row_pointer<float>(args.delta, seq.index, unit, seq.first_q);
#pragma unroll
      for (int m = 0; m < 2 * kFrags; ++m) {
        const int row = row0 + own_row(m);
        row_lse[m / 2][m % 2] = row < rows_all ? p[row] : 0.0f;
        row_delta[m / 2][m % 2] = row < rows_all ? p[stat_plane(args) + row] : 0.0f;
        if constexpr (kGeneral)
          row_log_sum[m / 2][m % 2] = row < rows_all ? p[2 * stat_plane(args) + row] : 0.0f;
      }
    }
  }

  // Whether the elements of this thread are kept by dropout: bit 4 n + e for element e of tile n. A
  // call of Philox serves four keys of a row: lanes that share one divide the calls.
  __device__ __forceinline__ uint32_t kept(const DeviceDropout& dropout, int f, int col) const {
    const int g = lane / 4, t = lane % 4, row = row0 + warp * Tile::kWarpRows + 16 * f;
    uint32_t bits = 0;
#pragma unroll 1
    for (int n = 0; n < kTiles; ++n, col += 8) {
      uint32_t four = 0;
      if constexpr (kRowsAreKeys) {
        const int c = g % 4;
        const uint32_t mine = dropout.kept(col + 2 * t + c % 2, (row + g / 4 * 4 + c / 2 * 8) / 4);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          four |= (__shfl_sync(~0u, mine, (g / 4 * 4 + e) * 4 + t) >> c & 1) << e;
      } else {
        const int odd = t % 2;
        const uint32_t mine = dropout.kept(row + g + 8 * odd, col / 4 + t / 2);
        const uint32_t other = __shfl_xor_sync(~0u, mine, 1);
        four = ((odd ? other : mine) >> 2 * odd & 3) | ((odd ? mine : other) >> 2 * odd & 3) << 2;
      }
      bits |= four << 4 * n;
    }
    return bits;
  }

  // P' and dS of kChunk columns from col0 on, which are the columns from `part` on of `stage`.
  template <bool kMasked>
  __device__ __forceinline__ void differentiate(Scores& s, Scores& ds, int member, int col0,
                                                int stage, int part) {
    const uint32_t to = stage * Tile::kStageBytes + part * Layout::kRowBytes;
    const float2* lse =
        reinterpret_cast<const float2*>(stats + stage * (Tile::kStatBytes / 4) + part);
    const float2* delta = lse + Tile::kCols / 2;
    const float2* log_sum = delta + Tile::kCols / 2;
    const int t = lane % 4;
    // -lse, -delta or -log sum of element e of tile n.
    const auto stat = [&](const float2* of_columns, const float (&of_rows)[2], int n, int e) {
      if constexpr (kRowsAreKeys)
        return e % 2 ? of_columns[4 * n + t].y : of_columns[4 * n + t].x;
      else
        return of_rows[e / 2];
    };

    // dP - delta: without dropout, the sum can start with -delta.
    float zero[4] = {}, minus_delta[kRowsAreKeys ? kTiles : kFrags][4] = {};
    if constexpr (!kGeneral) {
#pragma unroll
      for (int i = 0; i < (kRowsAreKeys ? kTiles : kFrags); ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          minus_delta[i][e] = stat(delta, row_delta[kRowsAreKeys ? 0 : i], i, e);
    }
    if constexpr (kFma) {
      this->multiply_fma(s, 0, to, args.dim);
      if constexpr (kNeedsDs)
        this->multiply_fma(ds, Tile::kRowBytes, to + Tile::kColBytes, args.dim_v);
    } else {
      this->template multiply<kResident1>(s, resident1, 0, to,
                                          [&](int, int) -> const float (&)[4] { return zero; });
      if constexpr (kNeedsDs)
        this->template multiply<kResident2>(
            ds, resident2, Tile::kRowBytes, to + Tile::kColBytes,
            [&](int f, int n) -> const float (&)[4] { return minus_delta[kRowsAreKeys ? n : f]; });
    }

    if constexpr (kGeneral) {
      const int query_head = kRowsAreKeys ? column_head(member) : unit;
      const DeviceScores scores(args, seq, query_head);
      const DeviceDropout dropout(args, seq, query_head);
      Scores slope;
      const auto seen = [&](int row, int col) {
        return row < rows_all && col >= low(row) && col < high(row);
      };
      // One feature at a time: those that are absent cost one branch for all.
      const auto for_each = [&](const auto& visit) {
#pragma unroll
        for (int f = 0; f < kFrags; ++f)
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int row = row0 + own_row(2 * f + e / 2), col = col0 + 8 * n + 2 * t + e % 2;
              visit(s[f][n][e], slope[f][n][e], kRowsAreKeys ? col : row, kRowsAreKeys ? row : col);
            }
      };
      for_each([&](float& x, float& slope_of_cap, int, int) {
        x = scores.scaled(x);
        slope_of_cap = 1.0f;
      });
      if (scores.softcap > 0)
        for_each(
            [&](float& x, float& slope_of_cap, int, int) { x = scores.capped(x, slope_of_cap); });
      if (scores.slope != 0)
        for_each([&](float& x, float&, int i, int j) { x = scores.biased(x, i, j); });
      scores.with_mask([&](auto tag) {
        const int col = col0 + 2 * t;
#pragma unroll
        for (int m = 0; m < 2 * kFrags; ++m) {
          const int row = row0 + own_row(m);
          scores.template mask_line<decltype(tag), kRowsAreKeys, kTiles>(
              kRowsAreKeys ? col : row, kRowsAreKeys ? row : col,
              row < rows_all ? cols_all - col : 0,
              [&](int n, int e) -> float& { return s[m / 2][n][m % 2 * 2 + e]; });
        }
      });
#pragma unroll
      for (int f = 0; f < kFrags; ++f) {
        const uint32_t keep = args.seed != nullptr ? kept(dropout, f, col0) : ~0u;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = row0 + own_row(2 * f + e / 2), col = col0 + 8 * n + 2 * t + e % 2;
            const float p = seen(row, col) ? exponential(s[f][n][e] + stat(lse, row_lse[f], n, e),
                                                         stat(log_sum, row_log_sum[f], n, e))
                                           : 0.0f;
            const float factor = keep >> (4 * n + e) & 1 ? dropout.scale : 0.0f;
            s[f][n][e] = p * factor;
            ds[f][n][e] = p * (ds[f][n][e] * factor + stat(delta, row_delta[f], n, e));
            if constexpr (kPart != Part::kMask) ds[f][n][e] *= slope[f][n][e];
          }
      }
    } else {
      const float scale = args.scale * kLog2E;
#pragma unroll
      for (int f = 0; f < kFrags; ++f)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float p = ex2_approx_ftz(fmaf(s[f][n][e], scale, stat(lse, row_lse[f], n, e)));
            if constexpr (kMasked) {
              const int row = row0 + own_row(2 * f + e / 2), col = col0 + 8 * n + 2 * t + e % 2;
              if (col < low(row) || col >= high(row)) p = 0.0f;
            }
            s[f][n][e] = p;
            ds[f][n][e] *= p;
          }
    }
  }

  static __device__ __forceinline__ float exponential(float score, float log_sum) {
    return kFma ? expf(score + log_sum) : ex2_approx_ftz(fmaf(score, kLog2E, log_sum));
  }

  template <bool kMasked>
  __device__ __forceinline__ void step(int member, int tile, int stage) {
#pragma unroll
    for (int part = 0; part < Tile::kCols; part += Tile::kChunk) {
      Scores s, ds;
      differentiate<kMasked>(s, ds, member, tile * Tile::kCols + part, stage, part);
      const uint32_t cols1 = stage * Tile::kStageBytes + part * Layout::kRowBytes;
      const uint32_t cols2 = cols1 + Tile::kColBytes;
      if constexpr (kFma) {
        if constexpr (kNeedsP) this->accumulate_fma(sum2, s, cols2);
        if constexpr (kNeedsDs) this->accumulate_fma(sum1, ds, cols1);
      } else {
        Operand rounded;
        if constexpr (kNeedsP) {
          this->round(rounded, s);
          this->accumulate(sum2, rounded, cols2);
        }
        if constexpr (kNeedsDs) {
          this->round(rounded, ds);
          this->accumulate(sum1, rounded, cols1);
        }
      }
    }
  }

  __device__ __forceinline__ int members() const { return kRowsAreKeys ? args.members : 1; }

  // Whether the mask closes a tile of columns. Where there is a mask, the whole block asks.
  __device__ __forceinline__ bool closed(int member, int tile) const {
    if (args.mask.kind == MaskKind::kNone) return false;
    const DeviceScores scores(args, seq, kRowsAreKeys ? column_head(member) : unit);
    const int col0 = tile * Tile::kCols;
    if constexpr (kRowsAreKeys)
      return mask_closes<Tile::kCols, Tile::kRows, Tile::kThreads>(scores, col0, cols_all - col0,
                                                                   row0, rows_all - row0);
    else
      return mask_closes<Tile::kRows, Tile::kCols, Tile::kThreads>(scores, row0, rows_all - row0,
                                                                   col0, cols_all - col0);
  }

  // Goes on to the first tile from this one on, of this member or the next ones, that the mask does
  // not close.
  __device__ __forceinline__ void find_open(int& member, int& tile) const {
#pragma unroll 1
    for (;; ++tile) {
      if (tile == last) {
        tile = first;
        if (++member == members()) return;
      }
      if (!closed(member, tile)) return;
    }
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int f = 0; f < kFrags; ++f)
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum1[f][n][e] = sum2[f][n][e] = 0.0f;
    if constexpr (kGeneral) {
      if (first < last) stream_open();
    } else if (first < last) {
      load_rows();
      if (!kResident2) start(0, first, 0);
      cp_async_commit_group();
      if (kResident1) {
        cp_async_wait_group<0>();
        __syncthreads();
        this->keep_rows();
      }
      if (kResident2) {  // columns take the place of rows
        __syncthreads();
        start(0, first, 0);
        cp_async_commit_group();
      }
      stream();
      if (kResident2) __syncthreads();
    }
    __syncwarp();
    if constexpr (kRowsAreKeys) {
      const AttentionParts parts(args);
      if (kNeedsDs) {
        if (args.splits > 1)
          store_part(sum1, args.scale, parts.dk, parts.dk_width);
        else
          store(sum1, args.scale, args.dk, args.dim, 0);
      }
      if (kNeedsP) {
        if (args.splits > 1)
          store_part(sum2, 1.0f, parts.dv, parts.dv_width);
        else
          store(sum2, 1.0f, args.dv, args.dim_v, Tile::kRowBytes);
      }
    } else {
      store(sum1, args.scale, args.dq, args.dim, 0);
    }
  }

  // The general kernel's: every tile that the mask leaves open.
  __device__ __forceinline__ void stream_open() {
    int stage = 0, member = 0, tile = first - 1;  // before the first: the search stands here once
#pragma unroll 1
    do {
      const bool begun = tile >= first;
      int next_member = member, next = tile + 1;
      find_open(next_member, next);
      if (begun) {
        cp_async_wait_group<0>();
        __syncthreads();
        stage ^= 1;
      } else if (next_member < members()) {
        load_rows();
      }
      if (next_member < members()) start(next_member, next, stage);
      cp_async_commit_group();
      if (begun) step<true>(member, tile, stage ^ 1);
      member = next_member;
      tile = next;
    } while (member < members());
  }

  __device__ __forceinline__ void stream() {
    int stage = 0;
#pragma unroll 1
    for (int member = 0; member < members(); ++member) {
      const ColumnLoader a = loader(cols1(), args.dim, member);
      const ColumnLoader b = loader(cols2(), args.dim_v, member);
      const float* const stat = stat_of(member, threadIdx.x % Tile::kCols);
      // Their loads leave these columns alone.
      if (member == 0 && a.dim < kDim) a.pad(shared + Tile::kStages + Tile::kStageBytes);
      if (member == 0 && b.dim < kDim)
        b.pad(shared + Tile::kStages + Tile::kStageBytes + Tile::kColBytes);
#pragma unroll 1
      for (int tile = first; tile < last; ++tile) {
        // The main loop: this tile and the next are seen by all rows.
        const int64_t next = int64_t(tile + 1) * Tile::kCols;
        ColumnLoader next_a = a, next_b = b;
        next_a.from += next * a.row_bytes;
        next_b.from += next * b.row_bytes;
        const float* next_stat = stat + next;
#pragma unroll 1
        for (; tile >= full_first && tile + 1 < full_last; ++tile) {
          cp_async_wait_group<0>();
          __syncthreads();
          stage ^= 1;
          uint32_t to = shared + Tile::kStages + stage * Tile::kStageBytes;
          asm volatile("" : "+r"(to));  // or each copy's branch derives it anew
          next_a.load(to, 0);
          next_b.load(to + Tile::kColBytes, 0);
          if (kRowsAreKeys && threadIdx.x < Tile::kStatPlanes * Tile::kCols)
            cp_async_4(stat_address(stage), next_stat, 4);
          next_a.from += Tile::kCols * next_a.row_bytes;
          next_b.from += Tile::kCols * next_b.row_bytes;
          next_stat += Tile::kCols;
          cp_async_commit_group();
          step<false>(member, tile, stage ^ 1);
        }
        cp_async_wait_group<0>();
        __syncthreads();
        stage ^= 1;
        if (tile + 1 < last)
          start(member, tile + 1, stage);
        else if (member + 1 < members())
          start(member + 1, first, stage);
        cp_async_commit_group();
        step<true>(member, tile, stage ^ 1);
      }
    }
  }

  // In fp32: four lanes write a whole sector.
  __device__ __forceinline__ void store_part(const Sums& sum, float factor, float* part,
                                             int width) const {
    const AttentionParts parts(args);
#pragma unroll
    for (int m = 0; m < 2 * kFrags; ++m) {
      const int row = row0 + own_row(m);
      if (row >= rows_all) continue;
      float* const to = part + parts.row(args, seq, unit, row) * width + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
        if (8 * n < width)
          st_global_v2_f32(to + 8 * n, sum[m / 2][n][m % 2 * 2] * factor,
                           sum[m / 2][n][m % 2 * 2 + 1] * factor);
    }
  }

  // Leaves rows of this warp through its own rows of a tile that it no longer needs, to write whole
  // sectors.
  __device__ __forceinline__ void store(const Sums& sum, float factor, const AttentionTensor& t,
                                        int dim, uint32_t tile) const {
    const uint32_t own = shared + tile;
#pragma unroll
    for (int m = 0; m < 2 * kFrags; ++m)
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float x = sum[m / 2][n][m % 2 * 2] * factor;
        const float y = sum[m / 2][n][m % 2 * 2 + 1] * factor;
        if constexpr (kFma)
          st_shared_v2_f32(own + Layout::at(own_row(m), 2 * n + lane % 4 / 2) + lane % 2 * 8, x, y);
        else
          st_shared(own + Layout::at(own_row(m), n) + lane % 4 * 4, cvt_rn_x2(x, y, T{}));
      }
    __syncwarp();
    T* const data = row_pointer<T>(t, seq.index, row_head(), first_of_rows());
#pragma unroll 1
    for (int i = lane; i < Tile::kWarpRows * Layout::kChunks; i += 32) {
      const int row = warp * Tile::kWarpRows + i / Layout::kChunks, chunk = i % Layout::kChunks;
      const int left = dim - chunk * Layout::kChunk;
      if (row0 + row >= rows_all || left <= 0) continue;
      union {
        uint4 whole;
        T element[Layout::kChunk];
      } value{ld_shared_v4(own + Layout::at(row, chunk))};
      T* const to = data + int64_t(row0 + row) * t.row + chunk * Layout::kChunk;
      if (aligned) {
        st_global_v4(to, value.whole);
      } else {
#pragma unroll
        for (int e = 0; e < Layout::kChunk; ++e)
          if (e < left) to[e] = value.element[e];
      }
    }
  }
};

// Which block has what: the tiles that see most under a causal mask go first: of queries the last,
// of keys those that are furthest from the end of their sequence.
template <class T, int kDim, Part kPart, bool kGeneral>
__global__ void __launch_bounds__(BackwardTile<T, kDim, kPart, kGeneral>::kThreads,
                                  BackwardTile<T, kDim, kPart, kGeneral>::kBlocksPerSm)
    attention_bwd_kernel(const __grid_constant__ AttentionCudaArgs args) {
  extern __shared__ __align__(128) char memory[];
  using Block = Backward<T, kDim, kPart, kGeneral>;
  const auto tiles = [](int rows) { return (rows + Block::Tile::kRows - 1) / Block::Tile::kRows; };
  const int most = tiles(Block::kRowsAreKeys ? args.max_k : args.max_q);
  const int heads = Block::kRowsAreKeys ? args.heads_kv * args.splits : args.heads_q;
  const BlockPlace place =
      block_place(blockIdx.x, uint32_t(args.batch * heads), uint32_t(most), args.together);
  const int batch = int(place.head) / heads, rank = int(place.rank);
  int tile = most - 1 - rank;
  if constexpr (Block::kRowsAreKeys) tile = tiles(sequence_of(args, batch).keys) - 1 - tile;
  if (tile < 0) return;
  Block block(args, memory, batch, int(place.head) % heads, tile);
  if (block.row0 < block.rows_all) block.run();
}

}  // namespace bigkernel
