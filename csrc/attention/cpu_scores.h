// What happens to a score between the product q . k and the softmax: softcap, ALiBi, mask, the keys
// that causality and window leave, dropout.
#pragma once

#include "attention/attention.h"
#include "attention/cpu_pack.h"
#include "cpu/philox_vec.h"

namespace bigkernel::BK_ISA {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLog2ERest = 1.92596299e-8f;  // log2 e - kLog2E
constexpr float kInf = __builtin_inff();

// Minimax on [-1/2, 1/2], relative error 9e-8.
constexpr float kExp2Short[6] = {1.0f,         0.693147f,    0.24022242f,
                                 0.055507336f, 0.009671513f, 0.0013264727f};

// e^x for results up to 2^127, within 2 ulp of one that is normal (and 0.06 ulp more for each unit
// of -x, which all have in common, unless kExact); below 2^-126, 0. A NaN passes through. N vectors
// side by side: one alone would wait for the latency of its own chain of operations.
template <bool kExact = false, int N>
BK_INLINE void exp_softmax(VecF (&x)[N]) {
  const VecF magic = set1(12583039.0f);  // 1.5 * 2^23 + 127: the low bits hold the biased exponent
  VecF shifted[N], f[N], p[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) shifted[n] = fma(x[n], set1(kLog2E), magic);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) f[n] = fma(x[n], set1(kLog2E), magic - shifted[n]);
  if constexpr (kExact)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) f[n] = fma(x[n], set1(kLog2ERest), f[n]);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) p[n] = fma(set1(kExp2[6]), f[n], set1(kExp2[5]));
#pragma GCC unroll 6
  for (int i = 4; i >= 0; --i)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) p[n] = fma(p[n], f[n], set1(kExp2[i]));
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) p[n] = p[n] * (VecF)(((VecI)shifted[n]) << 23);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) x[n] = shifted[n] < 12582913.0f ? VecF{} : p[n];
}
template <bool kExact = false>
BK_INLINE VecF exp_softmax(VecF x) {
  VecF one[1] = {x};
  exp_softmax<kExact>(one);
  return one[0];
}

// Weights of scores relative to a base: exp(score - base). For pairs of bf16 the exponent is
// rounded once more, and the polynomial is shorter by a degree: both are far below the rounding of
// the pairs. Exactly 1 for the base, exactly 0 for -inf.
template <class Words, int N>
BK_INLINE void weights(VecF (&x)[N], float base) {
  if constexpr (Words::kPack == 1) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) x[n] = x[n] - base;
    exp_softmax(x);
  } else {
    const VecF magic = set1(12582912.0f);  // 1.5 * 2^23: rounds, and leaves the integer in low bits
    VecF whole[N], f[N], p[N];
    // At -127, f is 0 and p is 1, whose bits the exponent takes to those of 0.
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) x[n] = vmax(set1(-127.0f), (x[n] - base) * kLog2E);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) whole[n] = x[n] + magic;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) f[n] = x[n] - (whole[n] - magic);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) p[n] = fma(set1(kExp2Short[5]), f[n], set1(kExp2Short[4]));
#pragma GCC unroll 6
    for (int i = 3; i >= 0; --i)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) p[n] = fma(p[n], f[n], set1(kExp2Short[i]));
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) x[n] = (VecF)((VecI)p[n] + (((VecI)whole[n]) << 23));
  }
}

// The keys [lo, hi) that a row sees, both non-decreasing in the row.
struct Reach {
  int64_t off, left, right, keys;

  BK_INLINE int64_t lo(int64_t row) const { return left < 0 ? 0 : clamp(row + off - left); }
  BK_INLINE int64_t hi(int64_t row) const {
    return right < 0 ? keys : clamp(row + off + right + 1);
  }
  BK_INLINE int64_t clamp(int64_t key) const { return key < 0 ? 0 : (key > keys ? keys : key); }
};

BK_INLINE Reach reach_of(const AttentionArgs& args, const AttentionSequence& seq) {
  return Reach{args.bottom_right ? seq.all_keys - seq.rows : 0, args.left, args.right, seq.keys};
}

// The part of a tile of keys that each row of a block sees, relative to the tile.
struct Spans {
  static constexpr int64_t kMost = 192;
  int32_t lo[kMost], hi[kMost];

  // Rows from `rows` up to a multiple of `padding` see what the last one sees.
  BK_INLINE void set(const Reach& reach, int64_t row, int64_t rows, int64_t key, int64_t keys,
                     int64_t padding = 1) {
    for (int64_t r = 0; r < rows; ++r) {
      lo[r] = int32_t(within(reach.lo(row + r) - key, keys));
      hi[r] = int32_t(within(reach.hi(row + r) - key, keys));
    }
    for (int64_t r = rows; r < round_up(rows, padding); ++r) {
      lo[r] = lo[rows - 1];
      hi[r] = hi[rows - 1];
    }
  }
  static BK_INLINE int64_t within(int64_t x, int64_t keys) {
    return x < 0 ? 0 : (x > keys ? keys : x);
  }
};

// True where the scores are nothing but scale * <q, k>, with a positive scale.
BK_INLINE bool plain_scores(const AttentionArgs& args) {
  return args.softcap == 0 && args.slopes == nullptr && args.mask.kind == MaskKind::kNone &&
         args.scale > 0;
}

template <class T>
BK_INLINE VecF mask_vector(const T* p, int64_t col, int n) {
  if (col == 1) return n >= kLanes ? load(p) : load_n(p, n);
  VecF v{};
  for (int i = 0; i < (n < kLanes ? n : kLanes); ++i) v[i] = ::bigkernel::to_float(p[i * col]);
  return v;
}
BK_INLINE VecF mask_vector(const double* p, int64_t col, int n) {
  VecF v{};
  for (int i = 0; i < (n < kLanes ? n : kLanes); ++i) v[i] = float(p[i * col]);
  return v;
}
BK_INLINE VecF mask_vector(const uint8_t* p, int64_t col, int n) {  // bool
  VecF v{};
  for (int i = 0; i < (n < kLanes ? n : kLanes); ++i) v[i] = p[i * col] != 0 ? 0.0f : -kInf;
  return v;
}

// One row of the mask as summands; returns whether any of them lets a key through.
template <class T>
BK_INLINE bool load_mask_row_as(float* dst, const T* src, int64_t col, int64_t n) {
  VecI open{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF v = mask_vector(src + i * col, col, int(n - i));
    // Lanes past n hold 0: they may only count where a real lane does.
    open |= (v != -kInf) & (lane_index() < int32_t(n - i));
    store(dst + i, v);
  }
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= open[i];
  return any != 0;
}

inline bool load_mask_row(float* dst, const AttentionMask& mask, int64_t at, int64_t n) {
  switch (mask.kind) {
    case MaskKind::kBool:
      return load_mask_row_as(dst, static_cast<const uint8_t*>(mask.data) + at, mask.col, n);
    case MaskKind::kBFloat16:
      return load_mask_row_as(dst, static_cast<const bf16*>(mask.data) + at, mask.col, n);
    case MaskKind::kFloat16:
      return load_mask_row_as(dst, static_cast<const fp16*>(mask.data) + at, mask.col, n);
    case MaskKind::kFloat64:
      return load_mask_row_as(dst, static_cast<const double*>(mask.data) + at, mask.col, n);
    default:
      return load_mask_row_as(dst, static_cast<const float*>(mask.data) + at, mask.col, n);
  }
}

// The mask of a tile as fp32 summands in scratch, one row if it is the same for all.
struct MaskTile {
  float* data;
  int64_t ld;

  BK_INLINE const float* row(int64_t r) const { return data == nullptr ? nullptr : data + r * ld; }
};

// Fills `tile`; returns false where the mask closes the whole tile.
inline bool load_mask_tile(MaskTile& tile, float* buffer, int64_t ld, const AttentionArgs& args,
                           int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t key,
                           int64_t keys) {
  const AttentionMask& mask = args.mask;
  if (mask.kind == MaskKind::kNone) {
    tile = MaskTile{nullptr, 0};
    return true;
  }
  const bool same = mask.row == 0;
  tile = MaskTile{buffer, same ? 0 : ld};
  bool open = false;
  for (int64_t r = 0; r < (same ? 1 : rows); ++r)
    open |= load_mask_row(
        buffer + r * ld, mask,
        batch * mask.batch + head * mask.head + (row + r) * mask.row + key * mask.col, keys);
  return open;
}

// 1 - tanh(x)^2 without the cancellation where tanh is near 1.
BK_INLINE VecF tanh_slope(VecF x) {
  const VecF r = 1.0f / (exp2(vabs(x) * (2.0f * kLog2E)) + 1.0f);
  return 4.0f * r * (1.0f - r);
}

// How the scores of one row follow from its products.
struct ScoreRow {
  float scale, softcap, inverse_softcap, slope, distance;  // distance: i + off - first key
  const float* mask;

  // Natural-logarithm score of the kLanes keys from c; `capped` is what softcap took tanh of.
  BK_INLINE VecF operator()(VecF product, int64_t c, VecF& capped) const {
    VecF s = rounded(product * scale);
    if (softcap > 0) {
      capped = s * inverse_softcap;
      s = vtanh(capped) * softcap;
    }
    if (slope != 0) s = s - slope * vabs(distance - to_float(lane_index() + int32_t(c)));
    if (mask != nullptr) {
      const VecF m = load(mask + c);
      s = m == -kInf ? m : s + m;  // a closed key stays closed, whatever its score
    }
    return s;
  }
};

BK_INLINE ScoreRow score_row(const AttentionArgs& args, int64_t batch, int64_t head,
                             int64_t distance, const float* mask) {
  const float slope = args.slopes == nullptr ? 0.0f : args.slopes[batch * args.slopes_batch + head];
  return ScoreRow{args.scale, args.softcap,    args.softcap > 0 ? 1.0f / args.softcap : 0.0f,
                  slope,      float(distance), mask};
}

// What dropout multiplies the probabilities of the keys [key, key + n) with: 0 or 1 / (1 - p).
// key is a multiple of 4; dst is written up to a multiple of 4 * kLanes.
inline void dropout_row(float* dst, const AttentionArgs& args, int64_t batch, int64_t head,
                        int64_t row, int64_t key, int64_t n) {
  const bool all = args.dropout_p >= 1;
  const uint32_t threshold = all ? 0 : uint32_t(args.dropout_p * 4294967296.0);
  const VecF kept = set1(all ? 0.0f : float(1.0 / (1.0 - args.dropout_p)));
  for (int64_t i = 0; i < n; i += 4 * kLanes) {
    VecU words[4];
    philox4x32(args.seed, uint32_t((key + i) / 4) + (VecU)lane_index(), uint32_t(row),
               uint32_t(head), uint32_t(batch), words);
    VecF keep[4], even[2], odd[2], out[4];
    for (int w = 0; w < 4; ++w) keep[w] = words[w] >= threshold ? kept : VecF{};
    // Words 0..3 of a lane belong to four keys in a row.
    interleave(keep[0], keep[2], even[0], even[1]);
    interleave(keep[1], keep[3], odd[0], odd[1]);
    interleave(even[0], odd[0], out[0], out[1]);
    interleave(even[1], odd[1], out[2], out[3]);
    for (int w = 0; w < 4; ++w) store(dst + i + w * kLanes, out[w]);
  }
}

// s[from, to) = value
BK_INLINE void fill(float* s, int64_t from, int64_t to, float value) {
  for (; from < to; ++from) s[from] = value;
}

}  // namespace bigkernel::BK_ISA
