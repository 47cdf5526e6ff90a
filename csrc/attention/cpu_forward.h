// Forward: one block of query rows against all keys that it sees, with a running maximum and sum
// for each row (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; tiled as
// in FlashAttention, Dao et al., 2022). Scores never leave a worker's scratch.
#pragma once

namespace bigkernel::BK_ISA {

struct ForwardScratch {
  float *q, *scores, *out, *mask, *drop, *top, *sum, *factor, *tile;
};

BK_INLINE ForwardScratch forward_scratch(Arena& arena, const Tiling& t) {
  ForwardScratch s;
  s.q = arena.take(t.block_q * t.ld_q);         // [block_q, dim]
  s.scores = arena.take(t.block_q * t.ld_s);    // [block_q, block_k]
  s.out = arena.take(t.block_q * t.ld_v);       // [block_q, dim_v], not yet divided by sum
  s.mask = arena.take(t.block_q * t.ld_s);      // [block_q, block_k]
  s.drop = arena.take(t.block_k + 4 * kLanes);  // [block_k]
  s.top = arena.take(t.block_q);                // [block_q], the highest score so far
  s.sum = arena.take(t.block_q);                // [block_q]
  s.factor = arena.take(t.block_q);             // [block_q]
  s.tile = arena.take(t.width_q * t.ld_s + t.block_k * t.ld_v);  // keys, values
  return s;
}

// Keys transposed [dim, block_k], then values [block_k, dim_v].
BK_INLINE void pack_tile(float* dst, const Tiling& t, const AttentionArgs& args,
                         const AttentionSequence& seq, int64_t head, int64_t tile) {
  const int64_t key = tile * t.block_k;
  const int64_t n = seq.keys - key < t.block_k ? seq.keys - key : t.block_k;
  transpose_tile(dst, t.ld_s, args.k, args.dtype, seq.index, head, seq.first_k + key, n, args.dim);
  unpack_tile(dst + t.width_q * t.ld_s, t.ld_v, args.v, args.dtype, seq.index, head,
              seq.first_k + key, n, args.dim_v);
}

void attention_pack(const AttentionArgs& args, int64_t unit_index, int64_t tile) {
  const Tiling t = tiling(args.dim, args.dim_v, false);
  const AttentionUnit& unit = args.units[unit_index];
  const int64_t floats = t.width_q * t.ld_s + t.block_k * t.ld_v;
  pack_tile(args.packed_kv + (unit.first_tile + tile) * floats, t, args,
            args.sequences[unit.sequence], unit.kv_head, tile);
}

// Turns the products of one row with the keys [from, to) into probabilities relative to the running
// maximum; updates maximum and sum; returns the factor for what the row has summed up so far.
// Keys outside [lo, hi) are closed. A score is a product times `scale`, positive.
BK_INLINE float softmax_row(float* s, int64_t from, int64_t to, int64_t lo, int64_t hi, float scale,
                            float& top, float& sum) {
  fill(s, from, lo < to ? lo : to, -kInf);
  fill(s, hi > from ? hi : from, to, -kInf);
  VecF most = set1(-kInf);
  for (int64_t c = from; c < to; c += kLanes) most = vmax(load(s + c), most);
  const float previous = top;
  const float highest = reduce_max(most) * scale;
  top = highest > previous ? highest : previous;
  // A row that has met no open key yet: exp of -inf, not of -inf + inf.
  const VecF base = set1(top == -kInf ? 0.0f : top);
  VecF total{};
  for (int64_t c = from; c < to; c += kLanes) {
    const VecF p = exp_softmax(load(s + c) * scale - base);
    total += p;
    store(s + c, p);
  }
  const float factor = exp_softmax(previous - base)[0];
  sum = sum * factor + reduce_sum(total);
  return factor;
}

void attention_fwd_block(const AttentionArgs& args, const AttentionBlock& block, float* memory) {
  const Tiling t = tiling(args.dim, args.dim_v, false);
  Arena arena{memory};
  const ForwardScratch w = forward_scratch(arena, t);
  const AttentionUnit& unit = args.units[block.unit];
  const AttentionSequence& seq = args.sequences[unit.sequence];
  const int64_t head = unit.kv_head * args.group + block.member;
  const int64_t rows = seq.rows - block.begin < t.block_q ? seq.rows - block.begin : t.block_q;
  const int64_t vectors_v = t.width_v / kLanes;
  const Reach reach = reach_of(args, seq);
  const bool plain = plain_scores(args);
  const float scale = plain ? args.scale : 1.0f;  // else the scores are finished first

  unpack_tile(w.q, t.ld_q, args.q, args.dtype, seq.index, head, seq.first_q + block.begin, rows,
              args.dim);
  for (int64_t r = 0; r < rows; ++r) {
    w.top[r] = -kInf;
    w.sum[r] = 0.0f;
    fill(w.out + r * t.ld_v, 0, t.width_v, 0.0f);
  }

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
      packed =
          args.packed_kv + (unit.first_tile + tile) * (t.width_q * t.ld_s + t.block_k * t.ld_v);
    else
      pack_tile(w.tile, t, args, seq, unit.kv_head, tile);
    const float* values = packed + t.width_q * t.ld_s;
    Spans spans;
    spans.set(reach, block.begin, rows, key, keys);

    // Stage by stage over the whole tile, so that the keys stay in the L1 cache for the first and
    // the values for the last.
    for (int64_t r = 0; r < rows; r += kMr) {
      const int64_t n = rows - r < kMr ? rows - r : kMr;
      const int64_t from = spans.lo[r] / kLanes * kLanes;
      const int64_t to = round_up(spans.hi[r + n - 1], kLanes);
      if (from >= to) continue;
      multiply<false>({w.q + r * t.ld_q, t.ld_q, packed + from, t.ld_s,
                       w.scores + r * t.ld_s + from, t.ld_s, args.dim, Start::kZero, nullptr},
                      n, (to - from) / kLanes);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t group = r / kMr * kMr, end = group + kMr < rows ? group + kMr : rows;
      const int64_t from = spans.lo[group] / kLanes * kLanes;
      const int64_t to = round_up(spans.hi[end - 1], kLanes);
      float* s = w.scores + r * t.ld_s;
      if (from >= to) continue;
      if (!plain) {
        const ScoreRow score =
            score_row(args, seq.index, head, block.begin + r + reach.off - key, mask.row(r));
        VecF tanh;
        for (int64_t c = from; c < to; c += kLanes) store(s + c, score(load(s + c), c, tanh));
      }
      w.factor[r] = softmax_row(s, from, to, spans.lo[r], spans.hi[r], scale, w.top[r], w.sum[r]);
      if (args.dropout_p > 0) {
        const int64_t start = from / (4 * kLanes) * (4 * kLanes);
        dropout_row(w.drop + start, args, seq.index, head, block.begin + r, key + start,
                    to - start);
        for (int64_t c = from; c < to; c += kLanes) store(s + c, load(s + c) * load(w.drop + c));
      }
    }
    for (int64_t r = 0; r < rows; r += kMr) {
      const int64_t n = rows - r < kMr ? rows - r : kMr;
      const int64_t from = spans.lo[r], to = spans.hi[r + n - 1];
      if (from >= to) continue;
      multiply<false>({w.scores + r * t.ld_s + from, t.ld_s, values + from * t.ld_v, t.ld_v,
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
        dead ? -kInf : float(double(w.top[r]) + __builtin_log(double(sum)));
  }
}

}  // namespace bigkernel::BK_ISA
