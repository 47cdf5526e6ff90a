// Attention forward on the GPU, for one block of query rows (formula: attention.h):
//   for each tile of keys that a row of the block sees:
//     S = Q K^T;  m' = max(m, max_j S);  P = 2^((S - m') f);  c = 2^((m - m') f)
//     l = c l + sum_j P;  O = c O + drop(P) V;  m = m'
//   out = O / l;  lse = m f ln 2 + ln l          f = scale log2 e, or log2 e where scores are not
//                                                just scaled products
// The algorithm is FlashAttention-2's (Dao, 2023).
//
// A block of 4 warps (2 in fp32 with wide heads) holds 64 or 128 rows, 16 or 32 a warp. Shared
// memory: the tiles of Q, K and V, 16-byte chunks swizzled (cuda_tile.h), at most 96 KB so that
// every GPU from sm_80 on has room; in fp32 also P. K and V are two stages of one pipeline: while a
// tile's scores are computed its values are on their way, while they are weighted the next keys.
//
// Two kernels for each type and width of head: the plain one takes causality and windows, and runs
// an inner loop without any masking over the tiles that the whole block sees; the general one takes
// everything: softcap, ALiBi, mask, dropout, any scale, rows that are not 16-byte aligned.
// bf16 and fp16 multiply by mma.m16n8k16, fp32 by fma, so it keeps fp32's accuracy; all keep scores
// in mma's layout: lane 4 g + t has rows g, g + 8 and keys 2 t, 2 t + 1 of each 16 x 8.
#pragma once
#include <type_traits>

#include "attention/cuda_scores.h"
#include "attention/cuda_tile.h"

namespace bigkernel {

template <class T, int kDim_, bool kGeneral_>
struct ForwardShape {
  using Element = T;
  static constexpr int kDim = kDim_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr bool kFma = sizeof(T) == 4;
  static constexpr int kThreads = kFma && kDim > 128 ? 64 : 128;
  // Two row tiles a warp halve the loads of K and V. O and S then fill the registers: 16 keys more
  // and the compiler spills in the inner loop.
  static constexpr int kRowTiles = kFma || kGeneral || kDim > 128 ? 1 : 2;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kThreads / 32 * kWarpRows;
  static constexpr int kKeys = kFma             ? (kDim > 128 ? 16 : 32)
                               : kRowTiles == 2 ? (kDim > 96   ? 48
                                                   : kDim > 64 ? 64
                                                   : kDim > 32 ? 96
                                                               : 128)
                                                : (kDim > 192 ? 32 : 64);
  // Blocks on a multiprocessor that the compiler is to leave registers for, 0 where it does so
  // unasked: as many as there can be without spills in the loop over tiles (make cuda-report).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int kWanted = kDim == 64 ? 4 : kDim == 96 ? 3 : 0;
#else
  static constexpr int kWanted = 0;
#endif
  static constexpr int kBlocksPerSm = !kGeneral ? 0 : !kFma ? kWanted : kDim == 32 ? 5 : 0;
  static constexpr int kRowBytes = kDim * int(sizeof(T));
  static constexpr int kKeyTile = kRows * kRowBytes;                  // K starts here
  static constexpr int kValueTile = kKeyTile + kKeys * kRowBytes;     // V
  static constexpr int kWeightTile = kValueTile + kKeys * kRowBytes;  // P, fp32 only
  static constexpr int kShared = kWeightTile + (kFma ? kRows * kKeys * 4 : 0);
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

template <class Shape>
struct Forward {
  using T = typename Shape::Element;
  using Layout = TileLayout<T, Shape::kDim>;
  static constexpr int kDim = Shape::kDim, kKeys = Shape::kKeys, kRowTiles = Shape::kRowTiles;
  static constexpr int kKeyGroups = kKeys / 8, kDimGroups = kDim / 8;
  // Scores are held in natural logarithms; else they are products, scaled as they are
  // exponentiated. In fp32 the plain kernel then gives the general one's bits.
  static constexpr bool kNatural = Shape::kGeneral || Shape::kFma;
  using QLoader = TileLoader<T, Shape::kRows, kDim, Shape::kThreads>;
  using KLoader = TileLoader<T, kKeys, kDim, Shape::kThreads>;
  using RowCursor = MatrixCursor<T, kDim>;
  using KeyCursor = MatrixCursor<T, kDim, MatrixOrder::kColumnsFirst>;
  using Scores = float[kRowTiles][kKeyGroups][4];

  const AttentionCudaArgs& args;
  const DeviceSequence sequence;
  const DeviceReach reach;
  const int head, first_row, lane, warp_row;
  const uint32_t shared;
  const bool aligned;
  float factor;

  float o[kRowTiles][kDimGroups][4];
  float top[kRowTiles][2];  // m
  float sum[kRowTiles][2];  // l, of this lane's keys

  __device__ Forward(const AttentionCudaArgs& args_, const DeviceSequence& sequence_, int head_,
                     int first_row_, uint32_t shared_)
      : args(args_),
        sequence(sequence_),
        reach(reach_of(args_, sequence_)),
        head(head_),
        first_row(first_row_),
        lane(threadIdx.x % 32),
        warp_row(threadIdx.x / 32 * Shape::kWarpRows),
        shared(shared_),
        aligned(!Shape::kGeneral || args_.aligned),
        factor(kNatural ? kLog2E : args_.scale * kLog2E) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kDimGroups; ++n)
#pragma unroll
        for (int x = 0; x < 4; ++x) o[i][n][x] = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        top[i][e] = -BK_INFINITY;
        sum[i][e] = 0;
      }
    }
  }

  __device__ __forceinline__ int row_of(int i, int e) const {
    return first_row + warp_row + 16 * i + 8 * e + lane / 4;
  }

  template <class Loader>
  __device__ __forceinline__ void load_edge(const Loader& loader, uint32_t tile, int first,
                                            int rows) const {
    if (aligned)
      loader.load_bounded(tile, first, rows);
    else
      loader.load_unaligned(tile, first, rows);
  }

  // Places in the tile of P (fp32 only), one for each chunk of four keys; writing pairs of keys and
  // reading chunks of 8 rows are both free of bank conflicts.
  static __device__ __forceinline__ uint32_t weight_at(int row, int chunk) {
    const int turn = kKeys % 32 == 0 ? row & 3 : row >> 1 & 1;
    return Shape::kWeightTile + row * kKeys * 4 + ((chunk ^ 2 * turn) << 4);
  }

  // S = scale Q K^T in fp32, unless `score` will scale: the same elements as mma's layout gives
  // this lane.
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
          s[0][n][x] = __fmul_rn(s[0][n][x], args.scale);
    }
  }

  // O = c O + P V in fp32. This lane's columns of O: 16 j + 4 t .. + 3, in o[0][2 j] and
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

  // S = Q K^T, on tensor cores.
  __device__ __forceinline__ void multiply_keys(Scores& s, const RowCursor& rows,
                                                const KeyCursor& keys) const {
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

  // O += P V, on tensor cores.
  __device__ __forceinline__ void add_values(const Scores& p, const RowCursor& values) {
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

  // The part of the tile's keys that a row sees.
  __device__ __forceinline__ void hide(Scores& s, int first_key) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int lo = reach.lo(row_of(i, e)) - first_key, hi = reach.hi(row_of(i, e)) - first_key;
#pragma unroll
        for (int n = 0; n < kKeyGroups; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int key = 8 * n + lane % 4 * 2 + c;
            if (key < lo || key >= hi) s[i][n][2 * e + c] = -BK_INFINITY;
          }
        }
      }
    }
  }

  // f(score, row, key) of all scores.
  template <class F>
  __device__ __forceinline__ void for_each(Scores& s, int first_key, F&& f) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int n = 0; n < kKeyGroups; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            f(s[i][n][2 * e + c], row_of(i, e), first_key + 8 * n + lane % 4 * 2 + c);
  }

  // Products into scores, one step for all of them at a time: what a call lacks then costs a branch
  // a tile and not one for each score.
  __device__ __forceinline__ void score(Scores& s, const DeviceScores& rule, int first_key) const {
    for_each(s, first_key, [&](float& x, int, int) { x = rule.scaled(x); });
    if (rule.softcap > 0)
      for_each(s, first_key, [&](float& x, int, int) {
        float unused;
        x = rule.capped(x, unused);
      });
    if (rule.slope != 0)
      for_each(s, first_key, [&](float& x, int row, int key) { x = rule.biased(x, row, key); });
    rule.with_mask([&](auto tag) {
      const int key = first_key + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = row_of(i, e);
          rule.template mask_line<decltype(tag), false, kKeyGroups>(
              row, key, row < sequence.rows ? sequence.keys - key : 0,
              [&](int n, int c) -> float& { return s[i][n][2 * e + c]; });
        }
    });
    hide(s, first_key);
  }

  // The first step from this one on whose tile the mask does not close.
  __device__ __forceinline__ int open_step(const ForwardSteps& steps, int step) const {
    if (args.mask.kind == MaskKind::kNone) return step;
    const DeviceScores rule(args, sequence, head);
#pragma unroll 1
    for (; step < steps.count; ++step) {
      const int first_key = steps.tile(step) * kKeys;
      if (!mask_closes<Shape::kRows, kKeys, Shape::kThreads>(
              rule, first_row, sequence.rows - first_row, first_key, sequence.keys - first_key))
        break;
    }
    return step;
  }

  __device__ __forceinline__ void drop(Scores& p, const DeviceDropout& dropout,
                                       int first_key) const {
    const int odd = lane & 1;
    static_assert(kKeyGroups <= 8, "a bit for each element");
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      uint32_t bits = 0;  // 4 n + 2 e + c: all at a time, the draws would not fit the registers
#pragma unroll 2
      for (int n = 0; n < kKeyGroups; ++n) {
        // Two lanes share a quad of keys: each draws it for one of their two rows.
        const uint32_t mine = dropout.kept(row_of(i, odd), first_key / 4 + 2 * n + lane % 4 / 2);
        const uint32_t other = __shfl_xor_sync(0xffffffffu, mine, 1);
        const uint32_t low = (odd ? other : mine) >> 2 * odd & 3;
        const uint32_t high = (odd ? mine : other) >> 2 * odd & 3;
        bits |= (low | high << 2) << 4 * n;
      }
#pragma unroll
      for (int n = 0; n < kKeyGroups; ++n)
#pragma unroll
        for (int x = 0; x < 4; ++x)
          if (!(bits >> (4 * n + x) & 1)) p[i][n][x] = 0;
    }
  }

  // S -> P; scales what was summed before, but for O in fp32, which gets the factor `c` later.
  // kEdge: a row may have seen no key yet.
  template <bool kEdge>
  __device__ __forceinline__ void softmax(Scores& s, float (&c)[2]) {
    // (s - m) f: exactly 0 at the largest. In 16 bits, s f - m f is as good and one step shorter.
    constexpr bool kExact = kNatural;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float now = top[i][e];
#pragma unroll
        for (int n = 0; n < kKeyGroups; ++n)
          now = fmaxf(now, fmaxf(s[i][n][2 * e], s[i][n][2 * e + 1]));
        now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
        now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
        const float from = kEdge && now == -BK_INFINITY ? 0.0f : now;
        float base = from * factor;
        const float shrink =
            ex2_approx_ftz(kExact ? (top[i][e] - from) * factor : top[i][e] * factor - base);
        top[i][e] = now;
        // In fp32 a tile is summed on its own, as add_values does; in 16 bits that is a step more.
        float total = Shape::kFma ? 0.0f : sum[i][e] * shrink;
#pragma unroll
        for (int n = 0; n < kKeyGroups; ++n) {
          // Adds 0, and makes the other keys wait for the sum of the first. Else the compiler puts
          // all sums off to the end of the round: the exponentials, kept until then next to their
          // roundings, leave too few registers.
          if (!kExact && n == 2) base = fmaf(total, 0.0f, base);
          float& x = s[i][n][2 * e];
          float& y = s[i][n][2 * e + 1];
          x = ex2_approx_ftz(kExact ? (x - from) * factor : fmaf(x, factor, -base));
          y = ex2_approx_ftz(kExact ? (y - from) * factor : fmaf(y, factor, -base));
          total += x + y;
        }
        sum[i][e] = Shape::kFma ? fmaf(sum[i][e], shrink, total) : total;
        if constexpr (Shape::kFma) {
          c[e] = shrink;
          continue;
        }
#pragma unroll
        for (int n = 0; n < kDimGroups; ++n) {
          o[i][n][2 * e] *= shrink;
          o[i][n][2 * e + 1] *= shrink;
        }
      }
    }
  }

  __device__ void run() {
    const int last_row = min(first_row + Shape::kRows, sequence.rows) - 1;
    const ForwardSteps steps(reach, first_row, last_row, kKeys);
    const int kv_head = head / args.group;
    KLoader keys(row_pointer<T>(args.k, sequence.index, kv_head, sequence.first_k), args.k.row,
                 args.dim, threadIdx.x);
    KLoader values(row_pointer<T>(args.v, sequence.index, kv_head, sequence.first_k), args.v.row,
                   args.dim_v, threadIdx.x);
    const uint32_t key_tile = shared + Shape::kKeyTile, value_tile = shared + Shape::kValueTile;

    auto begin = [&](int step) {
      if (step < steps.count) {
        const QLoader queries(row_pointer<T>(args.q, sequence.index, head, sequence.first_q),
                              args.q.row, args.dim, threadIdx.x);
        load_edge(queries, shared, first_row, sequence.rows);
        load_edge(keys, key_tile, steps.tile(step) * kKeys, sequence.keys);
        if (!Shape::kGeneral) values.pad(value_tile);
      }
      cp_async_commit_group();
    };
    if (!Shape::kGeneral) begin(0);

    RowCursor row_cursor(shared, warp_row, lane), value_cursor(value_tile, 0, lane);
    KeyCursor key_cursor(key_tile, 0, lane);
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
      Scores s = {};
      row_cursor.refresh();
      key_cursor.refresh();
      value_cursor.refresh();
      if constexpr (Shape::kFma)
        multiply_keys(s);
      else
        multiply_keys(s, row_cursor, key_cursor);
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
        score(s, DeviceScores(args, sequence, head), first_key);
      else if constexpr (kEdge)
        hide(s, first_key);
      float shrink[2];
      softmax<kEdge>(s, shrink);
      if constexpr (Shape::kGeneral) {
        if (args.seed != nullptr) drop(s, DeviceDropout(args, sequence, head), first_key);
      }
      if constexpr (Shape::kFma)
        add_values(s, shrink);
      else
        add_values(s, value_cursor);
    };
    if constexpr (Shape::kGeneral) {
      int step = -1;  // the search for open tiles is long code: it stands here once
#pragma unroll 1
      do {
        const int next = open_step(steps, step + 1);
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
    finish();
  }

  // out and lse. O goes through the warp's own rows of the tile of Q, to leave in whole sectors.
  __device__ __forceinline__ void finish() {
    const float kept = Shape::kGeneral && args.seed != nullptr ? args.dropout_scale : 1.0f;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float total = sum[i][e];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const bool dead = total == 0;
        const float inverse = dead ? 0.0f : kept / total;
        const int row = row_of(i, e), local = row - first_row;
        if (lane % 4 == 0 && row < sequence.rows)
          *reinterpret_cast<float2*>(
              row_pointer<float>(args.lse, sequence.index, head, sequence.first_q + row)) =
              dead ? make_float2(-BK_INFINITY, 0.0f)
                   : make_float2(top[i][e] * (kNatural ? 1.0f : args.scale), logf(total));
#pragma unroll
        for (int n = 0; n < kDimGroups; ++n) {
          const float low = o[i][n][2 * e] * inverse, high = o[i][n][2 * e + 1] * inverse;
          if constexpr (Shape::kFma)
            st_shared_v2_f32(shared + Layout::at(local, n / 2 * 4 + lane % 4) + n % 2 * 8, low,
                             high);
          else
            st_shared(shared + Layout::at(local, n) + lane % 4 * 4, cvt_rn_x2(low, high, T{}));
        }
      }
    }
    __syncwarp();
    constexpr int kChunks = Layout::kChunks;
#pragma unroll
    for (int j = 0; j < Shape::kWarpRows * kChunks / 32; ++j) {
      const int at = j * 32 + lane, local = warp_row + at / kChunks, chunk = at % kChunks;
      const int row = first_row + local, column = chunk * Layout::kChunk;
      if (row >= sequence.rows || column >= args.dim_v) continue;
      const uint4 value = ld_shared_v4(shared + Layout::at(local, chunk));
      T* to = row_pointer<T>(args.out, sequence.index, head, sequence.first_q + row) + column;
      if (aligned) {
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
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    attention_fwd_kernel(const __grid_constant__ AttentionCudaArgs args) {
  extern __shared__ __align__(128) uint4 attention_shared[];
  // The tiles of a head side by side, so that its keys stay in the cache; the last rows, which
  // under a causal mask see most, first.
  const uint32_t tiles = (args.max_q + Shape::kRows - 1) / Shape::kRows;
  const int tile = tiles - 1 - blockIdx.x % tiles;
  const int head = blockIdx.x / tiles % args.heads_q, batch = blockIdx.x / tiles / args.heads_q;
  const DeviceSequence sequence = sequence_of(args, batch);
  if (tile * Shape::kRows >= sequence.rows) return;
  Forward<Shape>(args, sequence, head, tile * Shape::kRows, shared_address(attention_shared)).run();
}

template <class Shape>
AttentionLaunch forward_launch(const char* name) {
  AttentionLaunch launch{};
  launch.name = name;
  launch.kernel = reinterpret_cast<const void*>(&attention_fwd_kernel<Shape>);
  launch.threads = Shape::kThreads;
  launch.shared = Shape::kShared;
  launch.tile_rows = Shape::kRows;
  launch.tile_keys = Shape::kKeys;
  launch.tile_dim = Shape::kDim;
  launch.general = Shape::kGeneral;
  return launch;
}

template <class T, int kDim, int... kWider>
AttentionLaunch choose_forward(const char* name, int32_t dim, bool general) {
  if constexpr (sizeof...(kWider) > 0) {
    if (dim > kDim) return choose_forward<T, kWider...>(name, dim, general);
  }
  return general ? forward_launch<ForwardShape<T, kDim, true>>(name)
                 : forward_launch<ForwardShape<T, kDim, false>>(name);
}

}  // namespace bigkernel
