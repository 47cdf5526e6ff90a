// Between the products of attention's forward: from products to scores, to weights of the softmax,
// and what dropout leaves of them.
#pragma once
#include "attention/sm80_fwd_block.h"

namespace bigkernel {

// The part of the tile's keys that a row sees.
template <class Shape>
__device__ __forceinline__ void hide(const ForwardBlock<Shape>& block,
                                     typename ForwardBlock<Shape>::Scores& s, int first_key) {
#pragma unroll
  for (int i = 0; i < Shape::kRowTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int lo = block.reach.lo(block.row_of(i, e)) - first_key,
                hi = block.reach.hi(block.row_of(i, e)) - first_key;
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int key = 8 * n + block.lane % 4 * 2 + c;
          if (key < lo || key >= hi) s[i][n][2 * e + c] = -BK_INFINITY;
        }
      }
    }
  }
}

// f(score, row, key) of all scores.
template <class Shape, class F>
__device__ __forceinline__ void for_each(const ForwardBlock<Shape>& block,
                                         typename ForwardBlock<Shape>::Scores& s, int first_key,
                                         F&& f) {
#pragma unroll
  for (int i = 0; i < Shape::kRowTiles; ++i)
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          f(s[i][n][2 * e + c], block.row_of(i, e), first_key + 8 * n + block.lane % 4 * 2 + c);
}

// Products into scores, one step for all of them at a time: what a call lacks then costs a branch
// a tile and not one for each score.
template <class Shape>
__device__ __forceinline__ void score_tile(const ForwardBlock<Shape>& block,
                                           typename ForwardBlock<Shape>::Scores& s, int first_key) {
  const DeviceScores rule(block.args, block.sequence, block.head);
  for_each(block, s, first_key, [&](float& x, int, int) { x = rule.scaled(x); });
  if (rule.softcap > 0)
    for_each(block, s, first_key, [&](float& x, int, int) {
      float unused;
      x = rule.capped(x, unused);
    });
  if (rule.slope != 0)
    for_each(block, s, first_key,
             [&](float& x, int row, int key) { x = rule.biased(x, row, key); });
  rule.with_mask([&](auto tag) {
    const int key = first_key + block.lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < Shape::kRowTiles; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = block.row_of(i, e);
        rule.template mask_line<decltype(tag), false, Shape::kKeys / 8>(
            row, key, row < block.sequence.rows ? block.sequence.keys - key : 0,
            [&](int n, int c) -> float& { return s[i][n][2 * e + c]; });
      }
  });
  hide(block, s, first_key);
}

// What dropout takes out of P.
template <class Shape>
__device__ __forceinline__ void drop(const ForwardBlock<Shape>& block,
                                     typename ForwardBlock<Shape>::Scores& p, int first_key) {
  const DeviceDropout dropout(block.args, block.sequence, block.head);
  constexpr int kKeyGroups = Shape::kKeys / 8;
  const int odd = block.lane & 1;
  static_assert(kKeyGroups <= 8, "a bit for each element");
#pragma unroll
  for (int i = 0; i < Shape::kRowTiles; ++i) {
    uint32_t bits = 0;  // 4 n + 2 e + c: all at a time, the draws would not fit the registers
#pragma unroll 2
    for (int n = 0; n < kKeyGroups; ++n) {
      // Two lanes share a quad of keys: each draws it for one of their two rows.
      const uint32_t mine =
          dropout.kept(block.row_of(i, odd), first_key / 4 + 2 * n + block.lane % 4 / 2);
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

template <class Shape>
struct ForwardSoftmax {
  using Scores = typename ForwardBlock<Shape>::Scores;
  using Sums = typename ForwardBlock<Shape>::Sums;
  static constexpr int kRowTiles = Shape::kRowTiles;
  // Scores are held in natural logarithms; else they are products, scaled as they are
  // exponentiated. In fp32 the plain kernel then gives the general one's bits.
  static constexpr bool kNatural = Shape::kGeneral || Shape::kFma;

  float factor;
  float top[kRowTiles][2];  // m
  float sum[kRowTiles][2];  // l, of this lane's keys

  __device__ __forceinline__ explicit ForwardSoftmax(float scale)
      : factor(kNatural ? kLog2E : scale * kLog2E) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        top[i][e] = -BK_INFINITY;
        sum[i][e] = 0;
      }
  }

  // S -> P; scales what was summed before, but for O in fp32, which gets the factor `c` later.
  // kEdge: a row may have seen no key yet.
  template <bool kEdge>
  __device__ __forceinline__ void take(Scores& s, Sums& o, float (&c)[2]) {
    // (s - m) f: exactly 0 at the largest. In 16 bits, s f - m f is as good and one step shorter.
    constexpr bool kExact = kNatural;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float now = top[i][e];
#pragma unroll
        for (int n = 0; n < Shape::kKeys / 8; ++n)
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
        for (int n = 0; n < Shape::kKeys / 8; ++n) {
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
        } else {
#pragma unroll
          for (int n = 0; n < Shape::kDim / 8; ++n) {
            o[i][n][2 * e] *= shrink;
            o[i][n][2 * e + 1] *= shrink;
          }
        }
      }
    }
  }
};

}  // namespace bigkernel
