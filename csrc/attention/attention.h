// Attention: argument structs shared by the binding and the kernels. No torch header.
//
//   score(i, j) = scale * <q_i, k_j>, then softcap * tanh(score / softcap), - slope * |i + off -
//   j|,
//                 + mask(i, j); off = seqlen_k - seqlen_q if bottom-right, else 0
//   row i sees the keys i + off - left <= j <= i + off + right (causal: right = 0)
//   out_i = sum_j softmax(score)_ij * drop_ij * v_j,  lse_i = log sum_j exp(score_ij)
//   A row of lse is two floats whose sum it is; a single one may lose all but max_j score_ij.
//
// A dense batch [B, H, S, D] and packed sequences [T, H, D] differ only in where a sequence starts.
// Nothing here is an inline function: the kernels include this with their instruction set switched
// on, and the linker keeps one copy of an inline function for all of them.
#pragma once
#include <cstdint>

#include "common/dtypes.h"
#include "cpu/isa.h"

namespace bigkernel {

// Element (sequence b, head h, row i) starts at data + b * batch + h * head + (first + i) * row;
// strides in elements. `first` is where the sequence starts: 0 in a dense batch; packed, batch = 0.
struct AttentionTensor {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

enum class MaskKind : int32_t { kNone, kBool, kFloat32, kBFloat16, kFloat16, kFloat64 };

// [B, Hq, Sq, Sk], stride 0 where it is broadcast. Packed sequences share one, whose rows and
// columns count within each of them.
struct AttentionMask {
  const void* data = nullptr;
  MaskKind kind = MaskKind::kNone;
  int64_t batch = 0, head = 0, row = 0, col = 0;
};

struct AttentionSequence {
  int64_t index;             // b, in the dropout counter, the mask and the slopes
  int64_t first_q, first_k;  // first row in the packed tensors, 0 in dense ones
  int64_t rows, keys;        // seqlen_q, and seqlen_k without padding that a mask closes at its end
  int64_t all_keys;          // seqlen_k
};

// One head of keys of one sequence, with the `group` query heads that share it: the unit of
// packing.
struct AttentionUnit {
  int64_t sequence, kv_head;
  int64_t first_tile;  // where its tiles of packed keys and values start
  int64_t first_row;   // where its packed query rows start: [group, rows, to even]
};

// What every device's kernels take of the op's options as they are; their arguments begin with it.
struct AttentionRule {
  float scale, softcap;
  int32_t bottom_right;
};

struct AttentionArgs : AttentionRule {
  DType dtype;  // of q, k, v, out and their gradients
  AttentionTensor q, k, v, out, lse;
  AttentionTensor dout, dlse, dq, dk, dv;  // backward; dlse.data may be null
  int64_t heads_q, heads_kv, group, dim, dim_v;
  const AttentionSequence* sequences;  // [batch]
  int64_t batch;
  const AttentionUnit* units;

  int64_t left, right;  // -1: unlimited
  const float* slopes;  // [B or 1, Hq] or null
  int64_t slopes_batch;
  AttentionMask mask;
  AttentionMask dmask;  // backward: mask's gradient, of its kind; strides of its own
  double dropout_p;
  uint64_t seed;

  // Scratch of one round of units, laid out by AttentionPlan.
  float* packed_kv;  // [tiles, plan.tile_floats], null: keys and values are packed as they are used
  float* packed_q;   // [rows, plan.ld_q]    backward: words along a row
  float* packed_do;  // [rows, plan.ld_v]    backward
  float* paired_q;   // [rows / plan.pack, plan.ld_q]: words down a column; packed_q if pack is 1
  float* paired_do;  // [rows / plan.pack, plan.ld_v]
  float* delta;      // [rows]               backward: <dout, out>
  float* partial_dq;  // [most chunks of a unit, rows, plan.ld_q]
  int64_t round_rows;
};

// Tile sizes and scratch, which depend on the number of lanes.
struct AttentionPlan {
  int64_t block_q, block_k;     // rows and keys of a tile
  int64_t pack;                 // elements in a word of the operands
  int64_t ld_q, ld_v;           // floats between rows of q (k) and v (out)
  int64_t tile_floats;          // packed keys and values of a tile
  int64_t scratch_floats;       // of one worker
  int64_t scratch_floats_mask;  // of one worker in the pass for the gradient of the mask
};

// Rows [begin, begin + block_q) of a query head of a unit.
struct AttentionBlock {
  int64_t unit, member, begin;
};

// Tiles [first, last) of the keys of a unit, which add up dq in partial_dq[chunk].
struct AttentionChunk {
  int64_t unit, chunk, first, last;
};

// A tile of the gradient of the mask; -1 where the mask is broadcast, so that the tile sums over
// all.
struct AttentionMaskTile {
  int64_t batch, head, row, col;  // row, col: the first of the tile
  int64_t rows, cols;             // that the tile has, 1 where the mask is broadcast
};

BK_DECLARE_PER_ISA(AttentionPlan attention_plan(DType dtype, int64_t dim, int64_t dim_v,
                                                bool backward))
BK_DECLARE_PER_ISA(void attention_pack(const AttentionArgs& args, int64_t unit, int64_t tile))
BK_DECLARE_PER_ISA(void attention_fwd_block(const AttentionArgs& args, const AttentionBlock& block,
                                            float* scratch))
BK_DECLARE_PER_ISA(void attention_bwd_prepare(const AttentionArgs& args,
                                              const AttentionBlock& block))
BK_DECLARE_PER_ISA(void attention_bwd_keys(const AttentionArgs& args, const AttentionChunk& chunk,
                                           float* scratch))
BK_DECLARE_PER_ISA(void attention_bwd_queries(const AttentionArgs& args,
                                              const AttentionBlock& block, int64_t chunks))
BK_DECLARE_PER_ISA(void attention_bwd_mask(const AttentionArgs& args, const AttentionMaskTile& tile,
                                           float* scratch))

}  // namespace bigkernel
