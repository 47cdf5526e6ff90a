// Tile sizes, and how a worker's scratch is cut up.
#pragma once

#include "attention/cpu_pack.h"

namespace bigkernel::BK_ISA {

constexpr int64_t kBlockQ = 96;  // forward: multiple of kMr
constexpr int64_t kBlockK = 64;  // forward
constexpr int64_t kBlockQBackward = 96;
constexpr int64_t kBlockKBackward = 128;

struct Tiling {
  int64_t block_q, block_k;
  int64_t width_q, width_v;  // head dims in whole vectors
  int64_t depth_q, depth_v;  // head dims in words
  int64_t words_q, words_v;  // the same in whole vectors
  int64_t ld_q, ld_v, ld_s;  // rows of q and k, of v and out, of scores (and of transposed keys)
};

template <class Words>
BK_INLINE Tiling tiling(int64_t dim, int64_t dim_v, bool backward) {
  Tiling t;
  t.block_q = backward ? kBlockQBackward : kBlockQ;
  t.block_k = backward ? kBlockKBackward : kBlockK;
  t.width_q = round_up(dim, kLanes);
  t.width_v = round_up(dim_v, kLanes);
  t.depth_q = words<Words>(dim);
  t.depth_v = words<Words>(dim_v);
  t.words_q = round_up(t.depth_q, kLanes);
  t.words_v = round_up(t.depth_v, kLanes);
  t.ld_q = odd_lines(dim);
  t.ld_v = odd_lines(dim_v);
  t.ld_s = odd_lines(t.block_k);
  return t;
}

// Hands out consecutive pieces of a worker's scratch; with no memory behind it, only counts.
struct Arena {
  float* base;
  int64_t used = 0;

  BK_INLINE float* take(int64_t floats) {
    float* piece = base == nullptr ? nullptr : base + used;
    used += round_up(floats, 16);
    return piece;
  }
};

}  // namespace bigkernel::BK_ISA
