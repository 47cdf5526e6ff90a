// Forward: one block of query rows against all keys that it sees, with a running maximum and sum
// for each row (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; tiled as
// in FlashAttention, Dao et al., 2022). Scores never leave a worker's scratch.
#pragma once

namespace bigkernel::BK_ISA {

// Floats of a tile of packed keys and values.
template <class Words>
BK_INLINE int64_t packed_tile_floats(const Tiling& t) {
  return t.words_q * t.ld_s + t.block_k / Words::kPack * t.ld_v;
}

struct ForwardScratch {
  float *q, *scores, *out, *mask, *drop, *top, *base, *sum, *factor, *lanes, *tile;
};

template <class Words>
BK_INLINE ForwardScratch forward_scratch(Arena& arena, const Tiling& t) {
  ForwardScratch s;
  s.q = arena.take(t.block_q * t.ld_q);         // [block_q, words of dim]
  s.scores = arena.take(t.block_q * t.ld_s);    // [block_q, block_k]
  s.out = arena.take(t.block_q * t.ld_v);       // [block_q, dim_v], not yet divided by sum
  s.mask = arena.take(t.block_q * t.ld_s);      // [block_q, block_k]
  s.drop = arena.take(t.block_k + 4 * kLanes);  // [block_k]
  s.top = arena.take(t.block_q);             // [block_q], the highest score so far, not yet scaled
  s.base = arena.take(t.block_q);            // [block_q], the same, or 0 for -inf
  s.sum = arena.take(t.block_q);             // [block_q], of exp(scale * (score - base))
  s.factor = arena.take(t.block_q);          // [block_q], exp(scale * (base before - base))
  s.lanes = arena.take(t.block_q * kLanes);  // [block_q, kLanes], rows not yet reduced
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
  column_tile<Words>(dst + t.words_q * t.ld_s, t.ld_v, args.v, args.dtype, seq.index, head,
                     seq.first_k + key, n, args.dim_v);
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

// kMr rows of a block, and the columns of a tile, in whole vectors, that any of them sees.
struct RowGroup {
  int64_t first, rows;
  int64_t from, to;
};

BK_INLINE RowGroup row_group(const Spans& spans, int64_t first, int64_t rows) {
  const int64_t n = rows - first < kMr ? rows - first : kMr;
  return RowGroup{first, n, spans.lo[first] / kLanes * kLanes,
                  round_up(spans.hi[first + n - 1], kLanes)};
}

// What a row sees of a tile.
struct RowSpan {
  int64_t from, to;  // columns that are computed
  int64_t lo, hi;    // of those, the open ones
};

BK_INLINE RowSpan row_span(const Spans& spans, const RowGroup& group, int64_t r) {
  return RowSpan{group.from, group.to, spans.lo[r], spans.hi[r]};
}

// The maximum of the open columns, still a vector; closes the others.
BK_INLINE VecF close_and_maximum(float* s, const RowSpan& span) {
  VecF most = set1(-kInf);
  if (span.from >= span.to) return most;
  fill(s, span.from, span.lo, -kInf);
  fill(s, span.hi, span.to, -kInf);
  for (int64_t c = span.from; c < span.to; c += kLanes) most = vmax(load(s + c), most);
  return most;
}

// s = exp(scale * (s - base)) in place; returns the sum, still a vector.
BK_INLINE VecF exponentiate(float* s, const RowSpan& span, float scale, float base) {
  constexpr int kAtOnce = 4;
  const float factor = scale * kLog2E;
  VecF total{};
  int64_t c = span.from;
  for (; c + kAtOnce * kLanes <= span.to; c += kAtOnce * kLanes) {
    VecF p[kAtOnce];
#pragma GCC unroll 8
    for (int n = 0; n < kAtOnce; ++n) p[n] = load(s + c + n * kLanes) - base;
    exp_softmax(p, factor);
#pragma GCC unroll 8
    for (int n = 0; n < kAtOnce; ++n) {
      total += p[n];
      store(s + c + n * kLanes, p[n]);
    }
  }
  for (; c < span.to; c += kLanes) {
    const VecF p = exp_softmax(load(s + c) - base, factor);
    total += p;
    store(s + c, p);
  }
  return total;
}

// Takes the maxima of a tile's rows, vectors in w.lanes, into the running ones. `factor` is what
// the rows' results so far must be multiplied with. Reductions across lanes are done for kLanes
// rows at a time.
inline void take_maxima(const ForwardScratch& w, int64_t rows, float scale) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const VecF previous = load(w.top + r);
    const VecF highest = maximum_of_rows(w.lanes + r * kLanes);
    const VecF top = highest > previous ? highest : previous;
    // A row that has met no open key yet: exp of -inf, not of -inf + inf.
    const VecF base = top == -kInf ? VecF{} : top;
    store(w.top + r, top);
    store(w.base + r, base);
    store(w.factor + r, exp_softmax(previous - base, scale * kLog2E));
  }
}

inline void take_sums(const ForwardScratch& w, int64_t rows) {
  for (int64_t r = 0; r < rows; r += kLanes)
    store(w.sum + r, load(w.sum + r) * load(w.factor + r) + sum_of_rows(w.lanes + r * kLanes));
}

// Products to scores, where there is more to it than a factor.
inline void finish_scores(float* s, const RowGroup& group, const ScoreRow& score) {
  VecF capped;
  for (int64_t c = group.from; c < group.to; c += kLanes)
    store(s + c, score(load(s + c), c, capped));
}

BK_INLINE void drop_row(float* s, float* drop, const RowGroup& group, const AttentionArgs& args,
                        int64_t batch, int64_t head, int64_t row, int64_t key) {
  const int64_t start = group.from / (4 * kLanes) * (4 * kLanes);
  dropout_row(drop + start, args, batch, head, row, key + start, group.to - start);
  for (int64_t c = group.from; c < group.to; c += kLanes)
    store(s + c, load(s + c) * load(drop + c));
}

template <class Words>
void forward_block(const AttentionArgs& args, const AttentionBlock& block, float* memory) {
  const Tiling t = tiling<Words>(args.dim, args.dim_v, false);
  Arena arena{memory};
  const ForwardScratch w = forward_scratch<Words>(arena, t);
  const AttentionUnit& unit = args.units[block.unit];
  const AttentionSequence& seq = args.sequences[unit.sequence];
  const int64_t head = unit.kv_head * args.group + block.member;
  const int64_t rows = seq.rows - block.begin < t.block_q ? seq.rows - block.begin : t.block_q;
  const int64_t vectors_v = t.width_v / kLanes;
  const Reach reach = reach_of(args, seq);
  const bool plain = plain_scores(args);
  const float scale = plain ? args.scale : 1.0f;  // else the scores are finished first

  row_tile<Words>(w.q, t.ld_q, args.q, args.dtype, seq.index, head, seq.first_q + block.begin, rows,
                  args.dim);
  const int64_t padded = round_up(rows, kLanes);
  fill(w.top, 0, padded, -kInf);
  fill(w.sum, 0, padded, 0.0f);
  fill(w.lanes, rows * kLanes, padded * kLanes, 0.0f);
  for (int64_t r = 0; r < rows; ++r) fill(w.out + r * t.ld_v, 0, t.width_v, 0.0f);

  const int64_t first = reach.lo(block.begin) / t.block_k;
  const int64_t last = (reach.hi(block.begin + rows - 1) + t.block_k - 1) / t.block_k;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t key = tile * t.block_k;
    const int64_t keys = seq.keys - key < t.block_k ? seq.keys - key : t.block_k;
    MaskTile mask;
    if (!load_mask_tile(mask, w.mask, t.ld_s, args, seq.index, head, block.begin, rows, key, keys))
      continue;
    const float* packed = w.tile;
    if (args.packed_kv != nullptr)
      packed = args.packed_kv + (unit.first_tile + tile) * packed_tile_floats<Words>(t);
    else
      pack_tile<Words>(w.tile, t, args, seq, unit.kv_head, tile);
    const float* values = packed + t.words_q * t.ld_s;
    Spans spans;
    spans.set(reach, block.begin, rows, key, keys);

    // Two passes over the tile, so that the keys stay in the L1 cache for the first and the values
    // for the second. What happens to scores in between is done while their rows are there, too.
    for (int64_t r = 0; r < rows; r += kMr) {
      const RowGroup group = row_group(spans, r, rows);
      if (group.from < group.to)
        multiply<Words, false>(
            {w.q + r * t.ld_q, t.ld_q, packed + group.from, t.ld_s,
             w.scores + r * t.ld_s + group.from, t.ld_s, t.depth_q, Start::kZero, nullptr},
            group.rows, (group.to - group.from) / kLanes);
      for (int64_t m = r; m < r + group.rows; ++m) {
        float* s = w.scores + m * t.ld_s;
        if (!plain)
          finish_scores(
              s, group,
              score_row(args, seq.index, head, block.begin + m + reach.off - key, mask.row(m)));
        store(w.lanes + m * kLanes, close_and_maximum(s, row_span(spans, group, m)));
      }
    }
    take_maxima(w, rows, scale);
    for (int64_t r = 0; r < rows; r += kMr) {
      const RowGroup group = row_group(spans, r, rows);
      for (int64_t m = r; m < r + group.rows; ++m) {
        float* s = w.scores + m * t.ld_s;
        store(w.lanes + m * kLanes, exponentiate(s, row_span(spans, group, m), scale, w.base[m]));
        if (args.dropout_p > 0)
          drop_row(s, w.drop, group, args, seq.index, head, block.begin + m, key);
        pack_in_place<Words>(s, group.from, group.to);
      }
      const int64_t from = spans.lo[r] / Words::kPack;
      const int64_t to = words<Words>(spans.hi[r + group.rows - 1]);
      if (from >= to) continue;
      multiply<Words, false>({w.scores + r * t.ld_s + from, t.ld_s, values + from * t.ld_v, t.ld_v,
                              w.out + r * t.ld_v, t.ld_v, to - from, Start::kScaled, w.factor + r},
                             group.rows, vectors_v);
    }
    take_sums(w, rows);
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = seq.first_q + block.begin + r;
    const float sum = w.sum[r];
    const bool dead = w.top[r] == -kInf && sum == 0;
    pack_row(row_of(args.out, args.dtype, seq.index, head, i), w.out + r * t.ld_v,
             dead ? 0.0f : 1.0f / sum, args.dtype, args.dim_v);
    static_cast<float*>(args.lse.data)[offset_of(args.lse, seq.index, head, i)] =
        dead ? -kInf : w.top[r] * scale + __builtin_logf(sum);
  }
}

void attention_fwd_block(const AttentionArgs& args, const AttentionBlock& block, float* memory) {
  with_words(args.dtype, [&](auto kind) { forward_block<decltype(kind)>(args, block, memory); });
}

}  // namespace bigkernel::BK_ISA
