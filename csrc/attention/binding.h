// The op's arguments as torch passes them, checked against each other, and the views that kernels
// get of them. Shared by the CPU and the CUDA binding; what has to be read from memory (lengths,
// slopes, seed) each of them checks for itself.
#pragma once
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "attention/attention.h"
#include "common/box.h"
#include "common/checks.h"
#include "common/tensors.h"

namespace bigkernel {

using OptionalTensor = std::optional<Tensor>;

// What Python's Params holds, in the schema's order.
struct AttentionOptions {
  OptionalTensor mask, slopes, seed, cu_q, cu_k;
  int64_t max_q, max_k;
  double scale;
  bool causal, bottom_right;
  int64_t left, right;
  double softcap, dropout_p;

  auto fields() {
    return std::tie(mask, slopes, seed, cu_q, cu_k, max_q, max_k, scale, causal, bottom_right, left,
                    right, softcap, dropout_p);
  }
};

// What is true of a call whatever the device.
struct AttentionProblem {
  DType dtype;
  bool packed;
  int64_t batch;  // packed: sequences
  int64_t heads_q, heads_kv, group, dim, dim_v;
  AttentionTensor q, k, v;
  AttentionMask mask;
  AttentionRule rule;
  int64_t left, right;  // -1: unlimited
  int64_t slopes_batch, slopes_head;
  std::vector<int64_t> out_sizes, lse_sizes;
};

inline AttentionTensor view(const Tensor& t, bool packed) {
  AttentionTensor v;
  v.data = t.data_ptr();
  if (packed) {
    v.row = t.stride(0);
    v.head = t.stride(1);
  } else {
    v.batch = t.stride(0);
    v.head = t.stride(1);
    v.row = t.stride(2);
  }
  return v;
}

inline AttentionTensor view_lse(const Tensor& t, bool packed) {  // [B, H, S(, 2)] or [H, T(, 2)]
  AttentionTensor v;
  v.data = t.data_ptr();
  v.batch = packed ? 0 : t.stride(0);
  v.head = t.stride(packed ? 0 : 1);
  v.row = t.stride(packed ? 1 : 2);
  return v;
}

// Heads closer together than rows: stored as [B, S, H, D], else as [B, H, S, D]; no gaps.
inline Tensor empty_like_layout(const Tensor& like, int64_t last) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = last;
  if (like.dim() == 4 && like.stride(1) < like.stride(2)) {
    const int64_t row = sizes[1] * last;
    return empty_tensor(like, sizes, {sizes[2] * row, last, row, 1});
  }
  return empty_tensor(like, sizes);
}

inline bool same_device(const Tensor& t, const Tensor& q) {
  return t.is_cpu() == q.is_cpu() && t.is_cuda() == q.is_cuda() &&
         (q.is_cpu() || t.get_device_index() == q.get_device_index());
}

inline void check_rows(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  constexpr int64_t kMostDim = 256;
  BK_CHECK(same_device(t, q), op, name, " must be on q's device");
  BK_CHECK(t.dim() == q.dim(), op, name, " must have ", q.dim(), " dimensions, as q has, got ",
           t.dim());
  BK_CHECK(t.scalar_type() == q.scalar_type(), op, name, " must have q's dtype");
  const int64_t last = t.dim() - 1;
  BK_CHECK(t.size(last) >= 1 && t.size(last) <= kMostDim, op, name,
           " must have a last dimension of 1 to ", kMostDim, ", got ", t.size(last));
  BK_CHECK(t.stride(last) == 1 || t.numel() == 0 || t.size(last) == 1, op, name,
           " must have a contiguous last dimension, got stride ", t.stride(last));
}

inline void check_sizes(const char* op, const char* name, const Tensor& t,
                        const std::vector<int64_t>& expected) {
  bool equal = t.dim() == int64_t(expected.size());
  for (size_t i = 0; equal && i < expected.size(); ++i) equal = t.size(int64_t(i)) == expected[i];
  BK_CHECK(equal, op, name, " has the wrong shape for these q, k and v");
}

inline void check_lse(const char* op, const char* name, const Tensor& t, const Tensor& q,
                      const std::vector<int64_t>& expected) {
  check_sizes(op, name, t, expected);
  BK_CHECK(same_device(t, q) && t.scalar_type() == ScalarType::Float, op, name,
           " must be float32 on q's device");
}

inline std::vector<int64_t> in_two(std::vector<int64_t> lse_sizes) {
  lse_sizes.push_back(2);
  return lse_sizes;
}

inline void check_cu_seqlens(const char* op, const char* name, const Tensor& cu, const Tensor& q) {
  BK_CHECK(same_device(cu, q) && cu.dim() == 1 && cu.size(0) >= 1 &&
               cu.scalar_type() == ScalarType::Int && (cu.stride(0) == 1 || cu.size(0) == 1),
           op, name, " must be a contiguous int32 tensor of at least one element on q's device");
}

inline MaskKind mask_kind(const char* op, const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
      return MaskKind::kBool;
    case ScalarType::Float:
      return MaskKind::kFloat32;
    case ScalarType::BFloat16:
      return MaskKind::kBFloat16;
    case ScalarType::Half:
      return MaskKind::kFloat16;
    case ScalarType::Double:
      return MaskKind::kFloat64;
    default:
      BK_CHECK(false, op, "mask must be bool or floating point");
  }
  return MaskKind::kNone;
}

inline AttentionMask view_mask(const char* op, const Tensor& mask, const Tensor& q,
                               const std::vector<int64_t>& full) {
  BK_CHECK(same_device(mask, q), op, "mask must be on q's device");
  BK_CHECK(mask.dim() == 4, op, "mask must have 4 dimensions, got ", mask.dim());
  int64_t strides[4];
  for (int64_t d = 0; d < 4; ++d) {
    BK_CHECK(mask.size(d) == 1 || mask.size(d) == full[size_t(d)], op,
             "mask must be broadcastable to [B, Hq, Sq, Sk], or packed to [1, Hq, max_seqlen_q, "
             "max_seqlen_k], got ",
             mask.size(d), " for ", full[size_t(d)], " in dimension ", d);
    strides[d] = mask.size(d) == 1 ? 0 : mask.stride(d);
  }
  return AttentionMask{mask.data_ptr(), mask_kind(op, mask), strides[0],
                       strides[1],      strides[2],          strides[3]};
}

inline AttentionProblem check_problem(const char* op, const Tensor& q, const Tensor& k,
                                      const Tensor& v, const AttentionOptions& o) {
  AttentionProblem p{};
  p.packed = o.cu_q.has_value();
  BK_CHECK(o.cu_q.has_value() == o.cu_k.has_value(), op,
           "cu_seqlens_q and cu_seqlens_k must be given together");
  BK_CHECK(q.dim() == (p.packed ? 3 : 4), op, "q must have ", p.packed ? 3 : 4, " dimensions, got ",
           q.dim());
  for (const auto& [name, t] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}})
    check_rows(op, name, *t, q);
  p.dtype = dtype_of(q, op, "q");
  BK_CHECK(p.dtype == DType::kFloat32 || p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16,
           op, "q must be float32, bfloat16 or float16");
  const int64_t heads = 1, last = q.dim() - 1;
  p.heads_q = q.size(heads);
  p.heads_kv = k.size(heads);
  p.dim = q.size(last);
  p.dim_v = v.size(last);
  BK_CHECK(k.size(last) == p.dim, op, "k must have q's head dim ", p.dim, ", got ", k.size(last));
  BK_CHECK(v.size(heads) == p.heads_kv, op, "v must have as many heads as k, ", p.heads_kv,
           ", got ", v.size(heads));
  BK_CHECK(p.heads_kv > 0 ? p.heads_q % p.heads_kv == 0 : p.heads_q == 0, op, "q's ", p.heads_q,
           " heads must be a multiple of k's ", p.heads_kv);
  p.group = p.heads_kv > 0 ? p.heads_q / p.heads_kv : 1;
  if (p.packed) {
    BK_CHECK(v.size(0) == k.size(0), op, "v must have as many rows as k, ", k.size(0), ", got ",
             v.size(0));
    check_cu_seqlens(op, "cu_seqlens_q", *o.cu_q, q);
    check_cu_seqlens(op, "cu_seqlens_k", *o.cu_k, q);
    BK_CHECK(o.cu_q->size(0) == o.cu_k->size(0), op,
             "cu_seqlens_q and cu_seqlens_k must be of one length, got ", o.cu_q->size(0), " and ",
             o.cu_k->size(0));
    p.batch = o.cu_q->size(0) - 1;
    p.lse_sizes = {p.heads_q, q.size(0)};
  } else {
    BK_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0), op,
             "q, k and v must have one batch size, got ", q.size(0), ", ", k.size(0), " and ",
             v.size(0));
    BK_CHECK(v.size(2) == k.size(2), op, "v must be as long as k, ", k.size(2), ", got ",
             v.size(2));
    p.batch = q.size(0);
    p.lse_sizes = {p.batch, p.heads_q, q.size(2)};
  }
  p.out_sizes.assign(q.sizes().begin(), q.sizes().end());
  p.out_sizes.back() = p.dim_v;
  p.q = view(q, p.packed);
  p.k = view(k, p.packed);
  p.v = view(v, p.packed);
  p.rule = {float(o.scale), float(o.softcap), o.bottom_right};
  p.left = o.left;
  p.right = o.causal ? 0 : o.right;
  if (o.mask.has_value()) {
    const std::vector<int64_t> full =
        p.packed ? std::vector<int64_t>{1, p.heads_q, o.max_q, o.max_k}
                 : std::vector<int64_t>{p.batch, p.heads_q, q.size(2), k.size(2)};
    p.mask = view_mask(op, *o.mask, q, full);
  }
  if (o.slopes.has_value()) {
    const Tensor& slopes = *o.slopes;
    const bool by_batch = slopes.dim() == 2;
    BK_CHECK(same_device(slopes, q), op, "alibi_slopes must be on q's device");
    BK_CHECK((slopes.dim() == 1 && slopes.size(0) == p.heads_q) ||
                 (by_batch && slopes.size(0) == p.batch && slopes.size(1) == p.heads_q),
             op, "alibi_slopes must be [Hq] or [B, Hq]");
    p.slopes_batch = by_batch ? slopes.stride(0) : 0;
    p.slopes_head = slopes.stride(by_batch ? 1 : 0);
  }
  BK_CHECK(o.dropout_p >= 0 && o.dropout_p <= 1, op, "dropout_p must be between 0 and 1, got ",
           o.dropout_p);
  if (o.dropout_p > 0) {
    BK_CHECK(o.seed.has_value(), op, "seed must be given where dropout_p > 0");
    BK_CHECK(same_device(*o.seed, q) && o.seed->numel() == 1 &&
                 o.seed->scalar_type() == ScalarType::Long,
             op, "seed must be one int64 element on q's device");
  }
  return p;
}

// What backward is given besides forward's arguments. Returns dout as the kernels take it, with a
// contiguous last dimension: the gradient of a sum has stride 0.
inline Tensor check_backward(const char* op, const Tensor& dout, const OptionalTensor& dlse,
                             const Tensor& q, const Tensor& out, const Tensor& lse,
                             const std::vector<int64_t>& out_sizes,
                             const std::vector<int64_t>& lse_sizes, MaskKind mask,
                             bool needs_dmask) {
  check_rows(op, "out", out, q);
  check_sizes(op, "out", out, out_sizes);
  check_sizes(op, "dout", dout, out_sizes);
  check_lse(op, "lse", lse, q, in_two(lse_sizes));
  bool in_pairs = lse.stride(lse.dim() - 1) == 1 && uintptr_t(lse.data_ptr()) % 8 == 0;
  for (int64_t d = 0; d + 1 < lse.dim(); ++d)
    in_pairs &= lse.size(d) <= 1 || lse.stride(d) % 2 == 0;
  BK_CHECK(in_pairs || lse.numel() == 0, op,
           "lse must hold its pairs side by side, as forward does");
  const Tensor rows = dout.stride(dout.dim() - 1) == 1 ? dout : without_gaps(dout);
  check_rows(op, "dout", rows, q);
  if (dlse.has_value()) check_lse(op, "dlse", *dlse, q, lse_sizes);
  BK_CHECK(!needs_dmask || (mask != MaskKind::kNone && mask != MaskKind::kBool), op,
           "only a floating point mask has a gradient");
  return rows;
}

}  // namespace bigkernel
