// The gradient of an additive mask: dS summed over the dimensions along which the mask is
// broadcast.
//
// A summand common to all keys of a row cancels in the softmax, but shifts lse: where the mask is
// broadcast along the keys, its gradient is the sum of dlse over the rows that see any key.
// Otherwise it is
// a pass of its own, which recomputes dS (two products more than the five of backward) and is run
// only on request: its work items are tiles of the result, so each sum is owned by one thread and
// has one order. Sums are held in fp64: a mask of one row may sum up every score of the batch.
#pragma once

#include "attention/cpu_backward.h"

namespace bigkernel::BK_ISA {

struct MaskGradientScratch {
  BackwardScratch tile;
  float *q, *dout, *delta;
  double* sum;  // [block_q, block_k]
};

template <class Words>
BK_INLINE MaskGradientScratch mask_gradient_scratch(Arena& arena, const Tiling& t) {
  MaskGradientScratch s;
  s.tile = backward_scratch<Words>(arena, t);
  s.q = arena.take(t.block_q * t.ld_q);
  s.dout = arena.take(t.block_q * t.ld_v);
  s.delta = arena.take(t.block_q);
  s.sum = reinterpret_cast<double*>(arena.take(2 * t.block_q * t.block_k));
  return s;
}

BK_INLINE void store_mask_gradient(const AttentionMask& dmask, int64_t at, double value) {
  void* data = const_cast<void*>(dmask.data);
  switch (dmask.kind) {
    case MaskKind::kBFloat16:
      static_cast<bf16*>(data)[at] = round_to<bf16>(float(value));
      break;
    case MaskKind::kFloat16:
      static_cast<fp16*>(data)[at] = round_to<fp16>(float(value));
      break;
    case MaskKind::kFloat64:
      static_cast<double*>(data)[at] = value;
      break;
    default:
      static_cast<float*>(data)[at] = float(value);
  }
}

// Adds the tile in ds, row by row, to the sums that the mask tells apart.
BK_INLINE void add_tile(double* sum, const float* ds, const Tiling& t, const Spans& spans,
                        int64_t rows, bool by_row) {
  for (int64_t r = 0; r < rows; ++r) {
    double* to = sum + (by_row ? r * t.block_k : 0);
    const float* from = ds + r * t.ld_s;
    for (int64_t c = spans.lo[r]; c < spans.hi[r]; ++c) to[c] += double(from[c]);
  }
}

// Adds dlse of the rows that see any key.
BK_INLINE void add_dlse(double* sum, const Tiling& t, const AttentionArgs& args,
                        const AttentionSequence& seq, int64_t head, int64_t begin, int64_t rows,
                        bool by_row) {
  if (args.dlse.data == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t b = seq.index, i = seq.first_q + begin + r;
    if (static_cast<const float*>(args.lse.data)[offset_of(args.lse, b, head, i)] != -kInf)
      sum[by_row ? r * t.block_k : 0] +=
          double(static_cast<const float*>(args.dlse.data)[offset_of(args.dlse, b, head, i)]);
  }
}

template <class Words>
void mask_gradient(const AttentionArgs& args, const AttentionMaskTile& out, float* memory) {
  const Tiling t = tiling<Words>(args.dim, args.dim_v, true);
  Arena arena{memory};
  const MaskGradientScratch w = mask_gradient_scratch<Words>(arena, t);
  const bool by_row = out.row >= 0, by_col = out.col >= 0;
  for (int64_t i = 0; i < t.block_q * t.block_k; ++i) w.sum[i] = 0;

  const int64_t batch_end = out.batch < 0 ? args.batch : out.batch + 1;
  const int64_t head_end = out.head < 0 ? args.heads_q : out.head + 1;
  for (int64_t b = out.batch < 0 ? 0 : out.batch; b < batch_end; ++b) {
    const AttentionSequence& seq = args.sequences[b];
    const Reach reach = reach_of(args, seq);
    const int64_t row = by_row ? out.row : 0, key = by_col ? out.col : 0;
    const int64_t row_end = by_row && seq.rows > row ? row + 1 : seq.rows;
    const int64_t keys = seq.keys - key < t.block_k ? seq.keys - key : t.block_k;
    if (row >= row_end || keys <= 0) continue;  // packed with longer sequences
    for (int64_t h = out.head < 0 ? 0 : out.head; h < head_end; ++h) {
      if (by_col) pack_tile_backward<Words>(w.tile, t, args, seq, h / args.group, key, keys);
      for (int64_t begin = row; begin < row_end; begin += t.block_q) {
        const int64_t rows = seq.rows - begin < t.block_q ? seq.rows - begin : t.block_q;
        if (!by_col) {
          add_dlse(w.sum, t, args, seq, h, begin, rows, by_row);
          continue;
        }
        if (reach.hi(begin + rows - 1) <= key || reach.lo(begin) >= key + keys) continue;
        pack_rows<Words>(w.q, w.dout, w.delta, t, args, seq, h, begin, rows);
        Spans spans;
        spans.set(reach, begin, rows, key, keys);
        const BackwardRows rows_of{w.q, w.dout, w.delta, 0, h, begin, rows};
        if (gradient_tile<Words>(w.tile, t, args, seq, reach, spans, rows_of, key, keys, false))
          add_tile(w.sum, w.tile.ds, t, spans, rows, by_row);
      }
    }
  }

  const AttentionMask& dmask = args.dmask;
  const int64_t corner = (out.batch < 0 ? 0 : out.batch * dmask.batch) +
                         (out.head < 0 ? 0 : out.head * dmask.head) +
                         (by_row ? out.row * dmask.row : 0) + (by_col ? out.col * dmask.col : 0);
  for (int64_t r = 0; r < out.rows; ++r)
    for (int64_t c = 0; c < out.cols; ++c)
      store_mask_gradient(dmask, corner + r * dmask.row + c * dmask.col, w.sum[r * t.block_k + c]);
}

void attention_bwd_mask(const AttentionArgs& args, const AttentionMaskTile& tile, float* memory) {
  BK_TILES;
  with_words(args.dtype, [&](auto kind) { mask_gradient<decltype(kind)>(args, tile, memory); });
}

}  // namespace bigkernel::BK_ISA
