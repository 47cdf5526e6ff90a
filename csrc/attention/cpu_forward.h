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

// What a row sees of a tile, rounded to whole vectors for all kMr rows of its group.
struct RowSpan {
  int64_t from, to;  // columns that are computed
  int64_t lo, hi;    // of those, the open ones
};

BK_INLINE RowSpan row_span(const Spans& spans, int64_t r, int64_t rows) {
  const int64_t first = r / kMr * kMr, last = first + kMr < rows ? first + kMr - 1 : rows - 1;
  return RowSpan{spans.lo[first] / kLanes * kLanes, round_up(spans.hi[last], kLanes), spans.lo[r],
                 spans.hi[r]};
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

// Takes a tile of scores into the online softmax: scores become probabilities relative to the
// running maximum, `factor` what the rows' results so far must be multiplied with. A score is
// `scale` (positive) times what is in w.scores. Reductions across lanes are done for kLanes rows at
// a time.
inline void softmax_tile(const ForwardScratch& w, const Tiling& t, const Spans& spans, int64_t rows,
                         float scale) {
  for (int64_t r = 0; r < rows; ++r)
    store(w.lanes + r * kLanes, close_and_maximum(w.scores + r * t.ld_s, row_span(spans, r, rows)));
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
  for (int64_t r = 0; r < rows; ++r)
    store(w.lanes + r * kLanes,
          exponentiate(w.scores + r * t.ld_s, row_span(spans, r, rows), scale, w.base[r]));
  for (int64_t r = 0; r < rows; r += kLanes)
    store(w.sum + r, load(w.sum + r) * load(w.factor + r) + sum_of_rows(w.lanes + r * kLanes));
}

// Products to scores, where there is more to it than a factor.
inline void finish_scores(const ForwardScratch& w, const Tiling& t, const AttentionArgs& args,
                          const AttentionSequence& seq, const Reach& reach, const MaskTile& mask,
                          const Spans& spans, int64_t head, int64_t begin, int64_t rows,
                          int64_t key) {
  for (int64_t r = 0; r < rows; ++r) {
    const RowSpan span = row_span(spans, r, rows);
    const ScoreRow score =
        score_row(args, seq.index, head, begin + r + reach.off - key, mask.row(r));
    float* s = w.scores + r * t.ld_s;
    VecF capped;
    for (int64_t c = span.from; c < span.to; c += kLanes)
      store(s + c, score(load(s + c), c, capped));
  }
}

inline void drop_tile(const ForwardScratch& w, const Tiling& t, const AttentionArgs& args,
                      const AttentionSequence& seq, const Spans& spans, int64_t head, int64_t begin,
                      int64_t rows, int64_t key) {
  for (int64_t r = 0; r < rows; ++r) {
    const RowSpan span = row_span(spans, r, rows);
    const int64_t start = span.from / (4 * kLanes) * (4 * kLanes);
    dropout_row(w.drop + start, args, seq.index, head, begin + r, key + start, span.to - start);
    float* s = w.scores + r * t.ld_s;
    for (int64_t c = span.from; c < span.to; c += kLanes)
      store(s + c, load(s + c) * load(w.drop + c));
  }
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
  fill(w.top, 0, t.block_q, -kInf);
  fill(w.sum, 0, t.block_q, 0.0f);
  fill(w.lanes, 0, t.block_q * kLanes, 0.0f);
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

    // Stage by stage over the whole tile, so that the keys stay in the L1 cache for the first and
    // the values for the last.
    for (int64_t r = 0; r < rows; r += kMr) {
      const int64_t n = rows - r < kMr ? rows - r : kMr;
      const int64_t from = spans.lo[r] / kLanes * kLanes;
      const int64_t to = round_up(spans.hi[r + n - 1], kLanes);
      if (from >= to) continue;
      multiply<Words, false>(
          {w.q + r * t.ld_q, t.ld_q, packed + from, t.ld_s, w.scores + r * t.ld_s + from, t.ld_s,
           t.depth_q, Start::kZero, nullptr},
          n, (to - from) / kLanes);
    }
    if (!plain) finish_scores(w, t, args, seq, reach, mask, spans, head, block.begin, rows, key);
    softmax_tile(w, t, spans, rows, scale);
    if (args.dropout_p > 0) drop_tile(w, t, args, seq, spans, head, block.begin, rows, key);
    for (int64_t r = 0; r < rows; r += kMr) {
      const int64_t n = rows - r < kMr ? rows - r : kMr;
      const int64_t lo = spans.lo[r], hi = spans.hi[r + n - 1];
      if (lo >= hi) continue;
      for (int64_t m = r; m < r + n; ++m)
        pack_in_place<Words>(w.scores + m * t.ld_s, lo / kLanes * kLanes, round_up(hi, kLanes));
      const int64_t from = lo / Words::kPack, to = words<Words>(hi);
      multiply<Words, false>({w.scores + r * t.ld_s + from, t.ld_s, values + from * t.ld_v, t.ld_v,
                              w.out + r * t.ld_v, t.ld_v, to - from, Start::kScaled, w.factor + r},
                             n, vectors_v);
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = seq.first_q + block.begin + r;
    const float sum = w.sum[r];
    const bool dead = w.top[r] == -kInf && sum == 0;
    pack_row(row_of(args.out, args.dtype, seq.index, head, i), w.out + r * t.ld_v,
             dead ? 0.0f : 1.0f / sum, args.dtype, args.dim_v);
    static_cast<float*>(args.lse.data)[offset_of(args.lse, seq.index, head, i)] =
        dead ? -kInf : float(double(w.top[r] * scale) + __builtin_log(double(sum)));
  }
}

void attention_fwd_block(const AttentionArgs& args, const AttentionBlock& block, float* memory) {
  with_words(args.dtype, [&](auto kind) { forward_block<decltype(kind)>(args, block, memory); });
}

}  // namespace bigkernel::BK_ISA
