// Backward (Dao et al., 2022): probabilities are recomputed from lse, tile by tile.
//
//   P = exp(score - lse), P' = P * drop, dP = (dout v^T) * drop, delta = <dout, out>
//   dS = P * (dP - delta + dlse), through softcap: * (1 - tanh^2)
//   dv = P'^T dout, dk = scale * dS^T q, dq = scale * dS k, dmask = dS before softcap
//
// A work item owns a run of keys of one key head and sums dk and dv over the query heads and rows
// in a fixed order. Its share of dq goes to a buffer of its own; how many there are depends on
// shapes alone, and their sum has one order too: results do not depend on the number of threads.
#pragma once

#include "attention/cpu_forward.h"

namespace bigkernel::BK_ISA {

#if defined(BK_ISA_AMX)
static_assert(kBlockQBackward / Bf16Words::kPack <= kMostTransposed);
#endif

struct BackwardScratch {
  float *keys, *keys_t, *values_t, *p, *ds, *paired_p, *paired_ds, *dk, *dv, *mask, *drop, *slopes;
};

template <class Words>
BK_INLINE BackwardScratch backward_scratch(Arena& arena, const Tiling& t) {
  BackwardScratch s;
  s.keys = arena.take(t.block_k / Words::kPack * t.ld_q);  // [words of block_k, dim]
  s.keys_t = arena.take(t.words_q * t.ld_s);               // [words of dim, block_k]
  s.values_t = arena.take(t.words_v * t.ld_s);             // [words of dim_v, block_k]
  s.p = arena.take(t.block_q * t.ld_s);                    // [block_q, block_k] P'
  s.ds = arena.take(t.block_q * t.ld_s);  // [block_q, block_k] dP, then dS, then words along it
  s.paired_p = s.p;                       // [words of block_q, block_k] P'
  s.paired_ds = s.ds;                     // [words of block_q, block_k] dS
  if (Words::kPack > 1) {
    s.paired_p = arena.take(t.block_q / Words::kPack * t.ld_s);
    s.paired_ds = arena.take(t.block_q / Words::kPack * t.ld_s);
  }
  s.dk = arena.take(t.block_k * t.ld_q);  // [block_k, dim]
  s.dv = arena.take(t.block_k * t.ld_v);  // [block_k, dim_v]
  s.mask = arena.take(t.block_q * t.ld_s);
  s.drop = arena.take(t.block_k + 4 * kLanes);
  s.slopes = arena.take(t.block_k);  // 1 - tanh^2 of a row
  return s;
}

// <a_i, b_i> of n words for N rows, summed up in the order in which `multiply` sums: for a row that
// sees a single key, out is that value, and dP - delta is exactly 0.
template <class Words, int N>
BK_INLINE void dot_rows(float* dst, const float* a, int64_t lda, const float* b, int64_t ldb,
                        int64_t n) {
  float total[N] = {};
  for (int64_t d = 0; d < n;) {
    const int64_t end = n - d > kLongestSum ? d + kLongestSum / 2 : n;
    float sum[N] = {};
    for (; d < end; ++d)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sum[i] = Words::dot_one(a[i * lda + d], b[i * ldb + d], sum[i]);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) total[i] += sum[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) dst[i] = total[i];
}

// Rows [begin, begin + rows) of q and dout as words along the rows, and their delta.
template <class Words>
void pack_rows(float* q, float* dout, float* delta, const Tiling& t, const AttentionArgs& args,
               const AttentionSequence& seq, int64_t head, int64_t begin, int64_t rows) {
  constexpr int kAtOnce = 8;
  alignas(64) float out[kAtOnce * (kMostDim + 16)];
  const int64_t first = seq.first_q + begin;
  row_tile<Words>(q, t.ld_q, args.q, args.dtype, seq.index, head, first, rows, args.dim);
  row_tile<Words>(dout, t.ld_v, args.dout, args.dtype, seq.index, head, first, rows, args.dim_v);
  for (int64_t r = 0; r < rows; r += kAtOnce) {
    const int64_t n = rows - r < kAtOnce ? rows - r : kAtOnce;
    row_tile<Words>(out, t.ld_v, args.out, args.dtype, seq.index, head, first + r, n, args.dim_v);
    if (n == kAtOnce)
      dot_rows<Words, kAtOnce>(delta + r, dout + r * t.ld_v, t.ld_v, out, t.ld_v, t.depth_v);
    else
      for (int64_t i = 0; i < n; ++i)
        dot_rows<Words, 1>(delta + r + i, dout + (r + i) * t.ld_v, t.ld_v, out + i * t.ld_v, t.ld_v,
                           t.depth_v);
  }
}

// The place of a query row among the packed ones; even where a block begins.
BK_INLINE int64_t packed_row(const AttentionUnit& unit, const AttentionSequence& seq,
                             int64_t member, int64_t row) {
  return unit.first_row + member * round_up(seq.rows, 2) + row;
}

template <class Words>
void backward_prepare(const AttentionArgs& args, const AttentionBlock& block) {
  const Tiling t = tiling<Words>(args.dim, args.dim_v, true);
  const AttentionUnit& unit = args.units[block.unit];
  const AttentionSequence& seq = args.sequences[unit.sequence];
  const int64_t at = packed_row(unit, seq, block.member, block.begin);
  const int64_t head = unit.kv_head * args.group + block.member;
  const int64_t rows = seq.rows - block.begin < t.block_q ? seq.rows - block.begin : t.block_q;
  pack_rows<Words>(args.packed_q + at * t.ld_q, args.packed_do + at * t.ld_v, args.delta + at, t,
                   args, seq, head, block.begin, rows);
  if constexpr (Words::kPack > 1) {
    const int64_t first = seq.first_q + block.begin, pair = at / Words::kPack;
    column_tile<Words>(args.paired_q + pair * t.ld_q, t.ld_q, args.q, args.dtype, seq.index, head,
                       first, rows, args.dim);
    column_tile<Words>(args.paired_do + pair * t.ld_v, t.ld_v, args.dout, args.dtype, seq.index,
                       head, first, rows, args.dim_v);
  }
}

void attention_bwd_prepare(const AttentionArgs& args, const AttentionBlock& block) {
  with_words(args.dtype, [&](auto kind) { backward_prepare<decltype(kind)>(args, block); });
}

// What the tiles of one query head and one block of its rows share.
struct BackwardRows {
  const float *q, *dout, *delta;  // [rows, ld_q], [rows, ld_v], [rows]
  int64_t pair;                   // the first of its words in paired_q and paired_do
  int64_t head, begin, rows;
};

template <class Words>
BK_INLINE BackwardRows backward_rows(const AttentionArgs& args, const Tiling& t,
                                     const AttentionUnit& unit, const AttentionSequence& seq,
                                     int64_t member, int64_t begin) {
  const int64_t at = packed_row(unit, seq, member, begin);
  return BackwardRows{args.packed_q + at * t.ld_q,
                      args.packed_do + at * t.ld_v,
                      args.delta + at,
                      at / Words::kPack,
                      unit.kv_head * args.group + member,
                      begin,
                      seq.rows - begin < t.block_q ? seq.rows - begin : t.block_q};
}

template <class Words>
void pack_tile_backward(const BackwardScratch& w, const Tiling& t, const AttentionArgs& args,
                        const AttentionSequence& seq, int64_t head, int64_t key, int64_t keys) {
  const int64_t first = seq.first_k + key;
  column_tile<Words>(w.keys, t.ld_q, args.k, args.dtype, seq.index, head, first, keys, args.dim);
  transposed_tile<Words>(w.keys_t, t.ld_s, args.k, args.dtype, seq.index, head, first, keys,
                         args.dim);
  transposed_tile<Words>(w.values_t, t.ld_s, args.v, args.dtype, seq.index, head, first, keys,
                         args.dim_v);
}

// What a row has of its own.
struct GradientRow {
  float top, rest;  // the summands of lse
  float delta, dlse;
  const float* drop;  // of the tile's keys, null without dropout
  int64_t from, to;   // the columns that were multiplied, whole vectors
  int64_t lo, hi;     // those that the row sees
  bool is_whole;      // it sees no key of another tile
};

// One row of w.p and w.ds from the products of q with the keys and of dout with the values.
//
// Where dP - delta cancels, what is left are their rounding errors. A row that is whole sums up its
// delta from the very dP that it is subtracted from, P dP in place of dout out, so that most of
// their errors are the same.
template <bool kPlain>
BK_INLINE void gradient_row(float* p, float* ds, float* slopes, const GradientRow& row,
                            const ScoreRow& score, bool through_softcap) {
  const bool is_capped = !kPlain && score.softcap > 0 && through_softcap;
  const float* drop = kPlain ? nullptr : row.drop;
  const auto finish = [&](int64_t c, VecF probability, VecF dp, VecF slope, float delta) {
    VecF gradient = probability * ((dp - delta) + row.dlse);
    if (is_capped) gradient = gradient * slope;
    store(p + c, drop == nullptr ? probability : probability * load(drop + c));
    store(ds + c, gradient);
  };
  VecF sum{};
  for (int64_t c = row.from; c < row.to; c += kLanes) {
    const VecF product = load(p + c);
    VecF capped{}, slope{};
    const VecF s = kPlain ? rounded(product * score.scale) : score(product, c, capped);
    VecF probability = exp_softmax<true>((s - row.top) - row.rest);
    VecF dp = load(ds + c);
    if (drop != nullptr) dp = dp * load(drop + c);
    if (is_capped) slope = tanh_slope(capped);
    if (!row.is_whole) {
      finish(c, probability, dp, slope, row.delta);
      continue;
    }
    const VecI key = lane_index() + int32_t(c);
    const VecI seen = (key >= int32_t(row.lo)) & (key < int32_t(row.hi));
    probability = select(seen, probability, VecF{});
    dp = select(seen, dp, VecF{});
    sum = fma(probability, dp, sum);
    store(p + c, probability);
    store(ds + c, dp);
    if (is_capped) store(slopes + c, slope);
  }
  if (!row.is_whole) return;
  const float delta = reduce_sum(sum);
  for (int64_t c = row.from; c < row.to; c += kLanes)
    finish(c, load(p + c), load(ds + c), is_capped ? load(slopes + c) : VecF{}, delta);
}

// Fills w.p with P' and w.ds with dS; both are zero wherever a row does not see a key, in all of
// [0, block_k) of every row that sees any. Returns false if the mask closes the whole tile.
template <class Words>
bool gradient_tile(const BackwardScratch& w, const Tiling& t, const AttentionArgs& args,
                   const AttentionSequence& seq, const Reach& reach, const Spans& spans,
                   const BackwardRows& b, int64_t key, int64_t keys, bool through_softcap) {
  MaskTile mask;
  if (!load_mask_tile(mask, w.mask, t.ld_s, args, seq.index, b.head, b.begin, b.rows, key, keys))
    return false;
  const bool plain = plain_scores(args) && args.dropout_p == 0;
  for (int64_t r = 0; r < b.rows; r += kMr) {
    const int64_t n = b.rows - r < kMr ? b.rows - r : kMr;
    const int64_t from = spans.lo[r] / kLanes * kLanes;
    const int64_t to = round_up(spans.hi[r + n - 1], kLanes);
    if (from >= to) continue;
    multiply<Words, false>({b.q + r * t.ld_q, t.ld_q, w.keys_t + from, t.ld_s,
                            w.p + r * t.ld_s + from, t.ld_s, t.depth_q, Start::kZero},
                           n, (to - from) / kLanes);
    multiply<Words, false>({b.dout + r * t.ld_v, t.ld_v, w.values_t + from, t.ld_s,
                            w.ds + r * t.ld_s + from, t.ld_s, t.depth_v, Start::kZero},
                           n, (to - from) / kLanes);
    for (int64_t m = r; m < r + n; ++m) {
      float* p = w.p + m * t.ld_s;
      float* ds = w.ds + m * t.ld_s;
      const int64_t i = seq.first_q + b.begin + m;
      const float* lse =
          static_cast<const float*>(args.lse.data) + offset_of(args.lse, seq.index, b.head, i);
      // Not part of delta, whose rounding would then hide it where dP and delta cancel.
      const float dlse = args.dlse.data == nullptr
                             ? 0.0f
                             : static_cast<const float*>(
                                   args.dlse.data)[offset_of(args.dlse, seq.index, b.head, i)];
      int64_t lo = spans.lo[m], hi = spans.hi[m];
      if (lse[0] == -kInf) lo = hi = t.block_k;  // a row without any open key
      if (lo < hi) {
        const float* drop = nullptr;
        if (args.dropout_p > 0) {
          const int64_t start = from / (4 * kLanes) * (4 * kLanes);
          dropout_row(w.drop + start, args, seq.index, b.head, b.begin + m, key + start,
                      to - start);
          drop = w.drop;
        }
        const ScoreRow score =
            score_row(args, seq.index, b.head, b.begin + m + reach.off - key, mask.row(m));
        const bool is_whole = reach.lo(b.begin + m) >= key && reach.hi(b.begin + m) <= key + keys;
        const GradientRow row{lse[0], lse[1], b.delta[m], dlse, drop, from, to, lo, hi, is_whole};
        if (plain)
          gradient_row<true>(p, ds, w.slopes, row, score, through_softcap);
        else
          gradient_row<false>(p, ds, w.slopes, row, score, through_softcap);
      }
      fill(p, 0, lo, 0.0f);
      fill(ds, 0, lo, 0.0f);
      fill(p, hi, t.block_k, 0.0f);
      fill(ds, hi, t.block_k, 0.0f);
    }
  }
  return true;
}

// P' and dS as words: down the columns for dv and dk, along the rows for dq.
template <class Words>
BK_INLINE void pack_gradients(const BackwardScratch& w, const Tiling& t, const Spans& spans,
                              int64_t rows) {
  if constexpr (Words::kPack > 1) {
    for (int64_t r = 0; r < rows; r += 2) {
      const int64_t group = r / kMr * kMr;
      const int64_t last = group + kMr < rows ? group + kMr - 1 : rows - 1;
      if (spans.lo[group] / kLanes * kLanes >= round_up(spans.hi[last], kLanes)) continue;
      float* p = w.p + r * t.ld_s;
      float* ds = w.ds + r * t.ld_s;
      float* paired_p = w.paired_p + r / 2 * t.ld_s;
      float* paired_ds = w.paired_ds + r / 2 * t.ld_s;
      const bool both = r + 1 < rows;
      for (int64_t c = 0; c < t.block_k; c += kLanes) {
        store(paired_p + c, Words::pair(load(p + c), both ? load(p + t.ld_s + c) : VecF{}));
        store(paired_ds + c, Words::pair(load(ds + c), both ? load(ds + t.ld_s + c) : VecF{}));
      }
      pack_in_place<Words>(ds, 0, t.block_k);
      if (both) pack_in_place<Words>(ds + t.ld_s, 0, t.block_k);
    }
  }
}

template <class Words>
void backward_keys(const AttentionArgs& args, const AttentionChunk& chunk, float* memory) {
  const Tiling t = tiling<Words>(args.dim, args.dim_v, true);
  Arena arena{memory};
  const BackwardScratch w = backward_scratch<Words>(arena, t);
  const AttentionUnit& unit = args.units[chunk.unit];
  const AttentionSequence& seq = args.sequences[unit.sequence];
  const Reach reach = reach_of(args, seq);
  const int64_t vectors_q = t.width_q / kLanes, vectors_v = t.width_v / kLanes;
  float* dq = args.partial_dq + (chunk.chunk * args.round_rows + unit.first_row) * t.ld_q;
  for (int64_t r = 0; r < args.group * round_up(seq.rows, 2); ++r)
    fill(dq + r * t.ld_q, 0, t.width_q, 0.0f);

  for (int64_t tile = chunk.first; tile < chunk.last; ++tile) {
    const int64_t key = tile * t.block_k;
    const int64_t keys = seq.keys - key < t.block_k ? seq.keys - key : t.block_k;
    pack_tile_backward<Words>(w, t, args, seq, unit.kv_head, key, keys);
    for (int64_t j = 0; j < keys; ++j) {
      fill(w.dk + j * t.ld_q, 0, t.width_q, 0.0f);
      fill(w.dv + j * t.ld_v, 0, t.width_v, 0.0f);
    }
    for (int64_t member = 0; member < args.group; ++member) {
      for (int64_t begin = 0; begin < seq.rows; begin += t.block_q) {
        const BackwardRows b = backward_rows<Words>(args, t, unit, seq, member, begin);
        if (reach.hi(begin + b.rows - 1) <= key || reach.lo(begin) >= key + keys) continue;
        Spans spans;
        spans.set(reach, begin, b.rows, key, keys);
        if (!gradient_tile<Words>(w, t, args, seq, reach, spans, b, key, keys, true)) continue;
        pack_gradients<Words>(w, t, spans, b.rows);

        // The rows that see keys [j, j + kMr) are consecutive, and so are the keys a row sees.
        int64_t top = 0, bottom = 0;
        for (int64_t j = 0; j < keys; j += kMr) {
          const int64_t n = keys - j < kMr ? keys - j : kMr;
          while (top < b.rows && spans.hi[top] <= j) ++top;
          while (bottom < b.rows && spans.lo[bottom] < j + n) ++bottom;
          if (top >= bottom) continue;
          const int64_t from = top / Words::kPack, depth = words<Words>(bottom) - from;
          multiply<Words, true>(
              {w.paired_p + from * t.ld_s + j, t.ld_s, args.paired_do + (b.pair + from) * t.ld_v,
               t.ld_v, w.dv + j * t.ld_v, t.ld_v, depth, Start::kAdd},
              n, vectors_v);
          multiply<Words, true>(
              {w.paired_ds + from * t.ld_s + j, t.ld_s, args.paired_q + (b.pair + from) * t.ld_q,
               t.ld_q, w.dk + j * t.ld_q, t.ld_q, depth, Start::kAdd},
              n, vectors_q);
        }
        for (int64_t r = 0; r < b.rows; r += kMr) {
          const int64_t n = b.rows - r < kMr ? b.rows - r : kMr;
          const int64_t lo = spans.lo[r], hi = spans.hi[r + n - 1];
          if (lo >= hi) continue;
          const int64_t from = lo / Words::kPack, to = words<Words>(hi);
          float* sum = dq + (packed_row(unit, seq, member, begin + r) - unit.first_row) * t.ld_q;
          multiply<Words, false>({w.ds + r * t.ld_s + from, t.ld_s, w.keys + from * t.ld_q, t.ld_q,
                                  sum, t.ld_q, to - from, Start::kAdd},
                                 n, vectors_q);
        }
      }
    }
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = seq.first_k + key + j;
      pack_row(row_of(args.dk, args.dtype, seq.index, unit.kv_head, at), w.dk + j * t.ld_q,
               args.scale, args.dtype, args.dim);
      pack_row(row_of(args.dv, args.dtype, seq.index, unit.kv_head, at), w.dv + j * t.ld_v, 1.0f,
               args.dtype, args.dim_v);
    }
  }
}

void attention_bwd_keys(const AttentionArgs& args, const AttentionChunk& chunk, float* memory) {
  BK_TILES;
  with_words(args.dtype, [&](auto kind) { backward_keys<decltype(kind)>(args, chunk, memory); });
}

// dq of a block of rows: the sum over the chunks, always in the same order.
void attention_bwd_queries(const AttentionArgs& args, const AttentionBlock& block, int64_t chunks) {
  const Tiling t = tiling<Fp32Words>(args.dim, args.dim_v, true);
  const AttentionUnit& unit = args.units[block.unit];
  const AttentionSequence& seq = args.sequences[unit.sequence];
  const int64_t head = unit.kv_head * args.group + block.member;
  const int64_t rows = seq.rows - block.begin < t.block_q ? seq.rows - block.begin : t.block_q;
  const int64_t at = packed_row(unit, seq, block.member, block.begin);
  alignas(64) float sum[kMostDim + 16];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < t.width_q; d += kLanes) {
      VecF total{};
      for (int64_t c = 0; c < chunks; ++c)
        total += load(args.partial_dq + (c * args.round_rows + at + r) * t.ld_q + d);
      store(sum + d, total);
    }
    pack_row(row_of(args.dq, args.dtype, seq.index, head, seq.first_q + block.begin + r), sum,
             args.scale, args.dtype, args.dim);
  }
}

}  // namespace bigkernel::BK_ISA
