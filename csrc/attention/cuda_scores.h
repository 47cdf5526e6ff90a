// Device code that forward and backward share: which sequence a block works on, which keys a row
// sees, how a product becomes a score, and dropout.
#pragma once
#include "attention/cuda.h"
#include "common/philox.h"
#include "cuda/mma.h"

namespace bigkernel {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
#define BK_INFINITY __int_as_float(0x7f800000)

struct DeviceSequence {
  int32_t index;             // b, in the dropout counter, the mask and the slopes
  int64_t first_q, first_k;  // first row in packed tensors, 0 in dense ones
  int32_t rows, keys;
};

// Bounds that do not fit the tensors are cut to them: the host cannot check what lies on the
// device.
__device__ __forceinline__ void packed_bounds(const int32_t* cu, int b, int64_t total, int32_t most,
                                              int64_t& first, int32_t& count) {
  const int64_t begin = max(int64_t(0), min(int64_t(cu[b]), total));
  const int64_t end = max(begin, min(int64_t(cu[b + 1]), total));
  first = begin;
  count = int32_t(min(end - begin, int64_t(most)));
}

__device__ __forceinline__ DeviceSequence sequence_of(const AttentionCudaArgs& args, int b) {
  DeviceSequence s{b, 0, 0, args.max_q, args.max_k};
  if (args.cu_q != nullptr) {
    packed_bounds(args.cu_q, b, args.total_q, args.max_q, s.first_q, s.rows);
    packed_bounds(args.cu_k, b, args.total_k, args.max_k, s.first_k, s.keys);
  }
  return s;
}

// Row `first` of a head of a sequence.
template <class T>
__device__ __forceinline__ T* row_pointer(const AttentionTensor& t, int b, int head,
                                          int64_t first) {
  return static_cast<T*>(t.data) + b * t.batch + head * t.head + first * t.row;
}

// The keys [lo, hi) that a row sees, both non-decreasing in the row.
struct DeviceReach {
  int32_t off, left, right, keys;

  __device__ __forceinline__ int lo(int row) const {
    return left < 0 ? 0 : clamp(row + off - left);
  }
  __device__ __forceinline__ int hi(int row) const {
    return right < 0 ? keys : clamp(row + off + right + 1);
  }
  __device__ __forceinline__ int clamp(int key) const { return max(0, min(key, keys)); }

  // The rows [first_row, end_row) that see a key, both non-decreasing in the key.
  __device__ __forceinline__ int first_row(int key) const {
    return right < 0 ? 0 : max(0, key - off - right);
  }
  __device__ __forceinline__ int end_row(int key, int rows) const {
    return left < 0 ? rows : max(0, min(rows, key - off + left + 1));
  }
};

__device__ __forceinline__ DeviceReach reach_of(const AttentionCudaArgs& args,
                                                const DeviceSequence& s) {
  return DeviceReach{args.bottom_right ? s.keys - s.rows : 0, args.left, args.right, s.keys};
}

// What stands between a product and a score of one head of one sequence, in the order of
// bigkernel/ops/attention/reference.py: scale, softcap, ALiBi, mask.
struct DeviceScores {
  float scale, softcap, inverse_softcap, slope;
  MaskKind kind;
  const char* mask;            // element [b, head, 0, 0]
  int64_t mask_row, mask_col;  // in elements
  int32_t off;

  __device__ __forceinline__ DeviceScores(const AttentionCudaArgs& args, const DeviceSequence& s,
                                          int head)
      : scale(args.scale),
        softcap(args.softcap),
        inverse_softcap(args.softcap > 0 ? 1.0f / args.softcap : 0.0f),
        slope(0.0f),
        kind(args.mask.kind),
        mask(nullptr),
        mask_row(args.mask.row),
        mask_col(args.mask.col),
        off(args.bottom_right ? s.keys - s.rows : 0) {
    if (args.slopes != nullptr)
      slope = args.slopes[s.index * args.slopes_batch + head * args.slopes_head];
    if (kind != MaskKind::kNone)
      mask = static_cast<const char*>(args.mask.data) +
             (s.index * args.mask.batch + head * args.mask.head) * mask_size(kind);
  }

  static __device__ __forceinline__ int mask_size(MaskKind kind) {
    if (kind == MaskKind::kBool) return 1;
    if (kind == MaskKind::kFloat64) return 8;
    return kind == MaskKind::kFloat32 ? 4 : 2;
  }

  // The steps from a product to a score in natural logarithms, each to be left out where the call
  // has nothing of the kind: scaled; capped if softcap > 0; biased if slope != 0; masked if there
  // is a mask, through with_mask. Products are rounded before they are added to, so that forward
  // and backward see the same score.
  __device__ __forceinline__ float scaled(float product) const { return __fmul_rn(product, scale); }
  // And the derivative of softcap: 1 - tanh^2, without the cancellation where tanh is near 1.
  __device__ __forceinline__ float capped(float s, float& slope_of_cap) const {
    const float x = s * inverse_softcap;
    const float r = 1.0f / (exp2f(fabsf(x) * (2.0f * kLog2E)) + 1.0f);
    slope_of_cap = 4.0f * r * (1.0f - r);
    return __fmul_rn(tanhf(x), softcap);
  }
  __device__ __forceinline__ float biased(float s, int row, int key) const {
    return s - __fmul_rn(slope, fabsf(float(row + off - key)));
  }
  // M: the type of the mask's elements, uint8_t for a boolean one.
  template <class M>
  static __device__ __forceinline__ float masked(float s, M element) {
    if constexpr (sizeof(M) == 1) {
      return element != 0 ? s : -BK_INFINITY;
    } else {
      float m;
      if constexpr (sizeof(M) == 8)
        m = float(element);
      else
        m = to_float(element);
      return m == -BK_INFINITY ? m : s + m;  // a closed key stays closed, whatever its score
    }
  }
  // Masks the scores score(n, e), n < kTiles and e < 2, that a thread has of one line: of a query
  // (row, keys from `key` on) or, kDown, of a key. They are 8 n + e positions on; `left` positions
  // are there. Each line's loads stand behind a branch of their own: all lines' at a time, with
  // their addresses, would not fit the registers.
  template <class M, bool kDown, int kTiles, class Score>
  __device__ __forceinline__ void mask_line(int row, int key, int left, Score&& score) const {
    if (left <= 0) return;
    const int64_t step = kDown ? mask_row : mask_col;
    const M* at = reinterpret_cast<const M*>(mask) + row * mask_row + key * mask_col;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * n + e < left) score(n, e) = masked(score(n, e), at[e * step]);
      at += 8 * step;
    }
  }
  template <class F>
  __device__ __forceinline__ void with_mask(F&& f) const {
    switch (kind) {
      case MaskKind::kNone:
        return;
      case MaskKind::kBool:
        return f(uint8_t{});
      case MaskKind::kBFloat16:
        return f(bf16{});
      case MaskKind::kFloat16:
        return f(fp16{});
      case MaskKind::kFloat64:
        return f(double{});
      case MaskKind::kFloat32:
        return f(float{});
    }
  }
};

// Whether none of a tile's elements of a mask, of type M, is anything but `shut`.
template <class M, int kRows, int kKeys, int kThreads>
__device__ __forceinline__ bool mask_is_shut(const DeviceScores& scores, M shut, int first_row,
                                             int rows, int first_key, int keys) {
  constexpr int kStep = kThreads / kKeys;  // a thread looks at one key and every kStep-th row
  constexpr int kBatch = kRows / kStep < 8 ? kRows / kStep : 8;
  static_assert(kThreads % kKeys == 0 && kRows % (kStep * kBatch) == 0, "warps stay together");
  const int key = int(threadIdx.x) % kKeys, last = keys > key ? rows : 0;
  int row = int(threadIdx.x) / kKeys;
  const M* at = reinterpret_cast<const M*>(scores.mask) + (first_row + row) * scores.mask_row +
                int64_t(first_key + key) * scores.mask_col;
  bool open = false;
#pragma unroll 1
  for (int i = 0; i < rows && !__any_sync(~0u, open); i += kStep * kBatch) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (row < last) open |= *at != shut;
      row += kStep;
      at += kStep * scores.mask_row;
    }
  }
  return !open;
}

// Whether the mask closes a tile: these rows of q and keys, of which `rows` and `keys` are there.
// The whole block asks. A warp stops at the first open elements, so this costs a few loads where
// the tile is open, and where it is closed far less than its products.
template <int kRows, int kKeys, int kThreads>
__device__ __forceinline__ bool mask_closes(const DeviceScores& scores, int first_row, int rows,
                                            int first_key, int keys) {
  rows = scores.mask_row == 0 ? 1 : min(rows, kRows);
  const auto is_shut = [&](auto shut) {
    return mask_is_shut<decltype(shut), kRows, kKeys, kThreads>(scores, shut, first_row, rows,
                                                                first_key, keys);
  };
  bool shut;  // by the bits of -inf, or false
  switch (DeviceScores::mask_size(scores.kind)) {
    case 1:
      shut = is_shut(uint8_t{0});
      break;
    case 2:
      shut = is_shut(scores.kind == MaskKind::kBFloat16 ? uint16_t{0xff80} : uint16_t{0xfc00});
      break;
    case 4:
      shut = is_shut(uint32_t{0xff800000});
      break;
    default:
      shut = is_shut(uint64_t{0xfff0000000000000});
  }
  return __syncthreads_and(shut);
}

// Dropout: key 4 c + w of row i of head h of sequence b is kept if word w of Philox at the counter
// (c, i, h, b) is at least the threshold (bigkernel/ops/attention/reference.py, dropout_keep).
struct DeviceDropout {
  uint64_t seed;
  uint32_t batch, head, threshold;
  float scale;  // of what is kept

  __device__ __forceinline__ DeviceDropout(const AttentionCudaArgs& args, const DeviceSequence& s,
                                           int head_)
      : seed(args.seed != nullptr ? uint64_t(*args.seed) : 0),
        batch(uint32_t(s.index)),
        head(uint32_t(head_)),
        threshold(args.dropout_threshold),
        scale(args.seed != nullptr ? args.dropout_scale : 1.0f) {}

  // Bit w: whether key 4 * quad + w is kept.
  __device__ __forceinline__ uint32_t kept(int row, int quad) const {
    const Philox4 random = philox4x32(seed, uint32_t(quad), uint32_t(row), head, batch);
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) bits |= uint32_t(random.word[w] >= threshold) << w;
    return bits;
  }
};

}  // namespace bigkernel
