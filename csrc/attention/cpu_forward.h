// Forward: one block of query rows against all keys that it sees, with a running base and sum for
// each row (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; tiled as
// in FlashAttention, Dao et al., 2022). Scores never leave a worker's scratch.
#pragma once

#include "attention/cpu_scores.h"
#include "attention/cpu_tiling.h"
#include "cpu/products.h"
#if defined(BK_ISA_AMX)
#include "cpu/amx.h"
#endif

namespace bigkernel::BK_ISA {

// Floats of a tile of packed keys and values.
template <class Words>
BK_INLINE int64_t packed_tile_floats(const Tiling& t) {
  return t.words_q * t.ld_s + t.block_k / Words::kPack * t.ld_v;
}

struct ForwardScratch {
  float *q, *weights, *out, *mask, *drop, *limit, *base, *sums, *tile;
};

template <class Words>
BK_INLINE ForwardScratch forward_scratch(Arena& arena, const Tiling& t) {
  ForwardScratch s;
  s.q = arena.take(t.block_q * t.ld_q);  // [block_q, words of dim]
#if defined(BK_ISA_AMX)
  s.weights = arena.take(2 * kMr * t.ld_s);  // [2, kMr, words of block_k]
#else
  s.weights = arena.take(kMr * t.ld_s);  // [kMr, words of block_k]
#endif
  s.out = arena.take(t.block_q * t.ld_v);       // [block_q, dim_v], not yet divided by the sum
  s.mask = arena.take(t.block_q * t.ld_s);      // [block_q, block_k]
  s.drop = arena.take(t.block_k + 4 * kLanes);  // [block_k]
  s.limit = arena.take(t.block_q);              // [block_q], the base of a row + kSlack
  s.base = arena.take(t.block_q);               // [block_q], 0 before there is one
  s.sums = arena.take(t.block_q * kLanes);      // [block_q, kLanes], of the weights
  s.tile = arena.take(packed_tile_floats<Words>(t));  // keys, values
  return s;
}

// Keys transposed [words of dim, block_k], then values [words of block_k, dim_v].
template <class Words>
void pack_tile(float* dst, const Tiling& t, const AttentionArgs& args, const AttentionSequence& seq,
               int64_t head, int64_t tile) {
  const int64_t key = tile * t.block_k;
  const int64_t n = seq.keys - key < t.block_k ? seq.keys - key : t.block_k;
  transposed_tile<Words>(dst, t.ld_s, args.k, args.dtype, seq.index, head, seq.first_k + key, n,
                         args.dim);
  float* values = dst + t.words_q * t.ld_s;
  column_tile<Words>(values, t.ld_v, args.v, args.dtype, seq.index, head, seq.first_k + key, n,
                     args.dim_v);
#if defined(BK_ISA_AMX)  // multiplies whole tiles
  for (int64_t w = words<Words>(n); w < round_up(words<Words>(n), kTile); ++w)
    fill(values + w * t.ld_v, 0, t.width_v, 0.0f);
#endif
}

void attention_pack(const AttentionArgs& args, int64_t unit_index, int64_t tile) {
  const AttentionUnit& unit = args.units[unit_index];
  with_words(args.dtype, [&](auto kind) {
    using Words = decltype(kind);
    const Tiling t = tiling<Words>(args.dim, args.dim_v, false);
    const int64_t floats = packed_tile_floats<Words>(t);
    pack_tile<Words>(args.packed_kv + (unit.first_tile + tile) * floats, t, args,
                     args.sequences[unit.sequence], unit.kv_head, tile);
  });
}

// One block of rows against one tile of keys. Rows are multiplied kMr at a time; where the block
// ends before a multiple of that, the last ones are zero and nobody reads what becomes of them.
struct ForwardTile {
  const ForwardScratch& w;
  const Tiling& t;
  const AttentionArgs& args;
  int64_t batch, head;
  int64_t begin, rows;  // the block
  int64_t offset;       // of the diagonal
  const Spans& spans;   // of the rows in the tile
  // The tile.
  const float *keys, *values;
  int64_t key;  // the first
  MaskTile mask;
};

// A row's weights are relative to its base, the highest score it has met, which follows only where
// one exceeds it by more than kSlack: results so far are rarely rescaled, and most tiles need no
// maximum across lanes.
constexpr float kSlack = 2.75f;  // no weight exceeds e^kSlack, about 16

// Scores of some rows on their way from registers and back, for what is rare or long.
struct Spilled {
  float at[kSoftmaxRows][kNr * kLanes];

  template <int N>
  BK_INLINE void save(const VecF (&x)[kSoftmaxRows][N]) {
#pragma GCC unroll 8
    for (int m = 0; m < kSoftmaxRows; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store(at[m] + n * kLanes, x[m][n]);
  }
  template <int N>
  BK_INLINE void restore(VecF (&x)[kSoftmaxRows][N]) const {
#pragma GCC unroll 8
    for (int m = 0; m < kSoftmaxRows; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) x[m][n] = load(at[m] + n * kLanes);
  }
};

// Products of rows [row, row + kSoftmaxRows) with keys from column c on to scores, which plain ones
// are already; closes what a row does not see.
template <int N, bool kPlain>
__attribute__((noinline)) void finish_scores(const ForwardTile& f, Spilled& s, int64_t row,
                                             int64_t c) {
  for (int m = 0; m < kSoftmaxRows; ++m) {
    if constexpr (!kPlain) {
      const int64_t r = row + m < f.rows ? row + m : f.rows - 1;
      const ScoreRow score =
          score_row(f.args, f.batch, f.head, f.begin + r + f.offset - f.key, f.mask.row(r));
      VecF capped;
      for (int n = 0; n < N; ++n) {
        float* at = s.at[m] + n * kLanes;
        store(at, score(load(at), c + n * kLanes, capped));
      }
    }
    const int32_t lo = f.spans.lo[row + m], hi = f.spans.hi[row + m];
    for (int n = 0; n < N; ++n) {
      const VecI key = lane_index() + int32_t(c + n * kLanes);
      float* at = s.at[m] + n * kLanes;
      const VecF x = select((key >= lo) & (key < hi), load(at), set1(-kInf));
      store(at, x == x ? x : set1(__builtin_nanf("")));  // `weights` needs low bits of 0 in a NaN
    }
  }
}

// Rows whose scores exceed the limit get another base, and what they have so far is rescaled: sums,
// results, and the weights of this tile, in their first `columns` columns.
template <class Words, int N>
__attribute__((noinline)) void raise_bases(const ForwardTile& f, const Spilled& s, int64_t row,
                                           float* weights, int64_t columns) {
  const ForwardScratch& w = f.w;
  for (int m = 0; m < kSoftmaxRows; ++m) {
    VecF most = load(s.at[m]);
    for (int n = 1; n < N; ++n) most = vmax(load(s.at[m] + n * kLanes), most);
    const float top = reduce_max(most);
    float &limit = w.limit[row + m], &base = w.base[row + m];
    if (!(top > limit)) continue;
    const VecF rescale = limit == -kInf ? VecF{} : exp_softmax(set1(base - top));
    base = top;
    limit = top + kSlack;
    const auto multiply_by = [&](float* p, int64_t n) {
      for (int64_t i = 0; i < n; i += kLanes) store(p + i, load(p + i) * rescale);
    };
    multiply_by(w.sums + (row + m) * kLanes, kLanes);
    multiply_by(w.out + (row + m) * f.t.ld_v, f.t.width_v);
    static_assert(Words::kPack == 1 || kNr * kLanes == kBlockK, "words cannot be rescaled");
    multiply_by(weights + m * f.t.ld_s, columns);
  }
}

// The weights of rows [row, row + kSoftmaxRows) for N vectors of keys from column c on: from
// products x in registers to words in `weights`, a row of which begins with column 0; `from` is the
// first column of these rows.
template <class Words, int N, bool kPlain>
BK_INLINE void weigh(const ForwardTile& f, VecF (&x)[kSoftmaxRows][N], float* words, int64_t row,
                     int64_t from, int64_t c) {
  const ForwardScratch& w = f.w;
  const Tiling& t = f.t;
  Spilled spilled;
  if constexpr (kPlain) {
    // Rounded here, not once in the exponent, because backward meets the same scores: the
    // probabilities that it gets from lse then add up to 1, however large the scores are.
#pragma GCC unroll 8
    for (int m = 0; m < kSoftmaxRows; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) x[m][n] = rounded(x[m][n] * f.args.scale);
  }
  if (!kPlain || f.spans.lo[row + kSoftmaxRows - 1] > c || f.spans.hi[row] < c + N * kLanes) {
    spilled.save(x);
    finish_scores<N, kPlain>(f, spilled, row, c);
    spilled.restore(x);
  }
  bool raise = false;
#pragma GCC unroll 8
  for (int m = 0; m < kSoftmaxRows; ++m) {
    VecF most = x[m][0];
#pragma GCC unroll 4
    for (int n = 1; n < N; ++n) most = vmax(x[m][n], most);
    raise |= any_greater(most, set1(w.limit[row + m]));
  }
  if (__builtin_expect(raise, 0)) {
    spilled.save(x);
    raise_bases<Words, N>(f, spilled, row, words + from, c - from);
    spilled.restore(x);
  }
  float* to = words + c / Words::kPack;
#pragma GCC unroll 8
  for (int m = 0; m < kSoftmaxRows; ++m) {
    weights<Words>(x[m], w.base[row + m]);
    float* sums = w.sums + (row + m) * kLanes;
    VecF total = load(sums);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) total += x[m][n];
    store(sums, total);
    if constexpr (!kPlain) {
      if (f.args.dropout_p > 0 && row + m < f.rows) {
        const int64_t start = c / (4 * kLanes) * (4 * kLanes);
        dropout_row(w.drop, f.args, f.batch, f.head, f.begin + row + m, f.key + start,
                    c + N * kLanes - start);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) x[m][n] = x[m][n] * load(w.drop + c - start + n * kLanes);
      }
    }
    if constexpr (Words::kPack > 1) {
#pragma GCC unroll 4
      for (int n = 0; n < N; n += 2)
        store(to + n / 2 * kLanes, Words::consecutive(x[m][n], n + 1 < N ? x[m][n + 1] : VecF{}));
    } else {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store(to + n * kLanes, x[m][n]);
    }
    to += t.ld_s;
  }
}

#if defined(BK_ISA_AMX)

// A tile that is loaded soon after vectors were stored to its memory, or the other way round, waits
// until they have arrived there. So the rows take turns: while those of one group are weighed, the
// products with keys of the next are under way, and those with values of the one before.
template <class Words, bool kPlain>
void forward_tile(const ForwardTile& f) {
  const Tiling& t = f.t;
  alignas(64) float products[2][kMr * kBlockK];
  struct {
    int64_t row, from, to;  // columns in whole tiles: where nobody looks weights are 0
  } groups[kBlockQ / kMr];
  int count = 0;
  for (int64_t row = 0; row < f.rows; row += kMr) {
    const int64_t lo = f.spans.lo[row], hi = f.spans.hi[row + kMr - 1];
    if (lo < hi)
      groups[count++] = {row, lo / (2 * kLanes) * (2 * kLanes), round_up(hi, 2 * kLanes)};
  }
  const auto weights_of = [&](int g) { return f.w.weights + g % 2 * kMr * t.ld_s; };
  const auto multiply_keys = [&](int g) {
    const auto [row, from, to] = groups[g];
    multiply<Words, false>({f.w.q + row * t.ld_q, t.ld_q, f.keys + from, t.ld_s, products[g % 2],
                            kBlockK, t.words_q, Start::kZero},
                           kMr, (to - from) / kLanes);
  };
  const auto multiply_values = [&](int g) {
    const auto [row, from, to] = groups[g];
    const int64_t word = from / Words::kPack;
    multiply<Words, false>(
        {weights_of(g) + word, t.ld_s, f.values + word * t.ld_v, t.ld_v, f.w.out + row * t.ld_v,
         t.ld_v, (to - from) / Words::kPack, Start::kAdd},
        kMr, t.width_v / kLanes);
  };
  if (count > 0) multiply_keys(0);
  for (int g = 0; g < count; ++g) {
    if (g + 1 < count) multiply_keys(g + 1);
    const auto [row, from, to] = groups[g];
    for (int64_t m = 0; m < kMr; m += kSoftmaxRows) {
      const float* at = products[g % 2] + m * kBlockK;
      const auto weigh_vectors = [&](auto n) {
        constexpr int N = decltype(n)::value;
        VecF x[kSoftmaxRows][N];
#pragma GCC unroll 8
        for (int i = 0; i < kSoftmaxRows; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < N; ++v) x[i][v] = load(at + i * kBlockK + v * kLanes);
        weigh<Words, N, kPlain>(f, x, weights_of(g) + m * t.ld_s, row + m, from, from);
      };
      if (to - from == kBlockK)
        weigh_vectors(std::integral_constant<int, 4>{});
      else
        weigh_vectors(std::integral_constant<int, 2>{});
    }
    if (g > 0) multiply_values(g - 1);
  }
  if (count > 0) multiply_values(count - 1);
}
static_assert(kBlockQ % kMr == 0 && kBlockK == kNr * kLanes);

#else

template <class Words, int N, bool kPlain>
void multiply_and_weigh(const ForwardTile& f, int64_t row, int64_t from, int64_t c) {
  const Tiling& t = f.t;
  VecF x[kMr][N];
  const float *q = f.w.q + row * t.ld_q, *keys = f.keys + c;
  if (t.depth_q <= kLongestSum) {
    accumulate<Words, kMr, N, false>(x, q, t.ld_q, keys, t.ld_s, t.depth_q);
  } else {  // as backward sums
    Spilled products;
    multiply<Words, false>(
        {q, t.ld_q, keys, t.ld_s, products.at[0], kNr * kLanes, t.depth_q, Start::kZero}, kMr, N);
    products.restore(x);
  }
  weigh<Words, N, kPlain>(f, x, f.w.weights, row, from, c);
}

template <class Words, bool kPlain>
void forward_tile(const ForwardTile& f) {
  const Tiling& t = f.t;
  const Spans& spans = f.spans;
  for (int64_t row = 0; row < f.rows; row += kMr) {
    const int64_t lo = spans.lo[row], hi = spans.hi[row + kMr - 1];
    const int64_t from = lo / kLanes * kLanes, to = round_up(hi, kLanes);
    if (lo >= hi) continue;
    for (int64_t c = from; c < to; c += kNr * kLanes)
      with_vectors((to - c) / kLanes, [&](auto n) {
        multiply_and_weigh<Words, decltype(n)::value, kPlain>(f, row, from, c);
      });
    const int64_t word = lo / Words::kPack;
    micro_row<Words, kMr, false>(
        {f.w.weights + word, t.ld_s, f.values + word * t.ld_v, t.ld_v, f.w.out + row * t.ld_v,
         t.ld_v, words<Words>(hi) - word, Start::kAdd},
        t.width_v / kLanes);
  }
}

#endif

template <class Words>
void forward_block(const AttentionArgs& args, const AttentionBlock& block, float* memory) {
  const Tiling t = tiling<Words>(args.dim, args.dim_v, false);
  Arena arena{memory};
  const ForwardScratch w = forward_scratch<Words>(arena, t);
  const AttentionUnit& unit = args.units[block.unit];
  const AttentionSequence& seq = args.sequences[unit.sequence];
  const int64_t head = unit.kv_head * args.group + block.member;
  const int64_t rows = seq.rows - block.begin < t.block_q ? seq.rows - block.begin : t.block_q;
  const int64_t padded = round_up(rows, kMr);
  const Reach reach = reach_of(args, seq);
  const bool plain = plain_scores(args) && args.dropout_p == 0;

  row_tile<Words>(w.q, t.ld_q, args.q, args.dtype, seq.index, head, seq.first_q + block.begin, rows,
                  args.dim);
  for (int64_t r = rows; r < padded; ++r) fill(w.q + r * t.ld_q, 0, t.ld_q, 0.0f);
  fill(w.limit, 0, padded, -kInf);
  fill(w.base, 0, padded, 0.0f);
  fill(w.sums, 0, padded * kLanes, 0.0f);
  for (int64_t r = 0; r < padded; ++r) fill(w.out + r * t.ld_v, 0, t.width_v, 0.0f);

  Spans spans;
  ForwardTile f{w, t, args, seq.index, head, block.begin, rows, reach.off, spans};
  const int64_t first = reach.lo(block.begin) / t.block_k;
  const int64_t last = (reach.hi(block.begin + rows - 1) + t.block_k - 1) / t.block_k;
  for (int64_t tile = first; tile < last; ++tile) {
    f.key = tile * t.block_k;
    const int64_t keys = seq.keys - f.key < t.block_k ? seq.keys - f.key : t.block_k;
    if (!load_mask_tile(f.mask, w.mask, t.ld_s, args, seq.index, head, block.begin, rows, f.key,
                        keys))
      continue;
    f.keys = w.tile;
    if (args.packed_kv != nullptr)
      f.keys = args.packed_kv + (unit.first_tile + tile) * packed_tile_floats<Words>(t);
    else
      pack_tile<Words>(w.tile, t, args, seq, unit.kv_head, tile);
    f.values = f.keys + t.words_q * t.ld_s;
    spans.set(reach, block.begin, rows, f.key, keys, kMr);
    if (plain)
      forward_tile<Words, true>(f);
    else
      forward_tile<Words, false>(f);
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = seq.first_q + block.begin + r;
    const float sum = reduce_sum(load(w.sums + r * kLanes));
    const bool dead = w.limit[r] == -kInf && sum == 0;
    pack_row(row_of(args.out, args.dtype, seq.index, head, i), w.out + r * t.ld_v,
             dead ? 0.0f : 1.0f / sum, args.dtype, args.dim_v);
    float* lse = static_cast<float*>(args.lse.data) + offset_of(args.lse, seq.index, head, i);
    // To twice the digits of a float: backward's probabilities all have the error of their lse.
    const double base = double(w.base[r]), log_sum = __builtin_log(double(sum));
    lse[0] = dead ? -kInf : float(base + log_sum);
    lse[1] = dead ? 0.0f : float((base - double(lse[0])) + log_sum);
  }
}

void attention_fwd_block(const AttentionArgs& args, const AttentionBlock& block, float* memory) {
  BK_TILES;
  with_words(args.dtype, [&](auto kind) { forward_block<decltype(kind)>(args, block, memory); });
}

}  // namespace bigkernel::BK_ISA
