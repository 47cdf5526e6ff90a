// CUDA binding of attention: checks, allocation, the current stream. Nothing is read back from the
// device: bounds of packed sequences that do not fit are cut to the tensors by the kernels, and
// rows of no sequence are left as they were allocated.
#include "attention/cuda.h"

#include <tuple>

#include "attention/binding.h"
#include "cuda/launch.h"
#include "cuda/stream.h"

namespace bigkernel {
namespace {

struct Call {
  AttentionCudaArgs args{};
  AttentionProblem problem;
  Tensor slopes;  // float32
  int device;
};

// A window of this size has no end, and positions plus windows stay within 32 bits.
int32_t window_side(int64_t side) {
  return side < 0 || side >= kAttentionMostRows ? -1 : int32_t(side);
}

int32_t narrow(const char* op, const char* what, int64_t n) {
  BK_CHECK(n >= 0 && n <= kAttentionMostRows, op, "the CUDA kernel takes 0 to ", kAttentionMostRows,
           " ", what, ", got ", n);
  return int32_t(n);
}

Call prepare(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
             const AttentionOptions& o) {
  Call call{{}, check_problem(op, q, k, v, o), Tensor(), q.get_device_index()};
  const AttentionProblem& p = call.problem;
  AttentionCudaArgs& a = call.args;
  static_cast<AttentionRule&>(a) = p.rule;
  a.dtype = p.dtype;
  a.q = p.q;
  a.k = p.k;
  a.v = p.v;
  a.mask = p.mask;
  a.batch = narrow(op, "sequences", p.batch);
  a.heads_q = narrow(op, "heads", p.heads_q);
  a.heads_kv = narrow(op, "heads", p.heads_kv);
  a.group = int32_t(p.group);
  a.dim = int32_t(p.dim);
  a.dim_v = int32_t(p.dim_v);
  if (p.packed) {
    a.cu_q = static_cast<const int32_t*>(o.cu_q->data_ptr());
    a.cu_k = static_cast<const int32_t*>(o.cu_k->data_ptr());
    a.total_q = q.size(0);
    a.total_k = k.size(0);
    a.max_q = narrow(op, "rows of a sequence", std::min(o.max_q, q.size(0)));
    a.max_k = narrow(op, "keys of a sequence", std::min(o.max_k, k.size(0)));
  } else {
    a.max_q = narrow(op, "rows", q.size(2));
    a.max_k = narrow(op, "keys", k.size(2));
  }
  a.left = window_side(p.left);
  a.right = window_side(p.right);
  if (o.slopes.has_value()) {
    call.slopes = o.slopes->scalar_type() == ScalarType::Float
                      ? *o.slopes
                      : torch::stable::to(*o.slopes, ScalarType::Float);
    const bool by_batch = call.slopes.dim() == 2;
    a.slopes = static_cast<const float*>(call.slopes.data_ptr());
    a.slopes_batch = by_batch ? call.slopes.stride(0) : 0;
    a.slopes_head = call.slopes.stride(by_batch ? 1 : 0);
  }
  if (o.dropout_p > 0) {
    a.seed = static_cast<const int64_t*>(o.seed->data_ptr());
    set_dropout(a, o.dropout_p);
  }
  return call;
}

std::tuple<Tensor, Tensor> attention_fwd_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const AttentionOptions& options) {
  constexpr const char* op = "attention_fwd";
  Call call = prepare(op, q, k, v, options);
  torch::stable::accelerator::DeviceGuard guard(call.device);
  const bool packed = call.problem.packed;
  Tensor out = empty_like_layout(q, call.problem.dim_v);
  Tensor lse = empty_tensor(q, in_two(call.problem.lse_sizes), ScalarType::Float);
  call.args.out = view(out, packed);
  call.args.lse = view_lse(lse, packed);
  split_attention_fwd(call.args, device_traits(call.device));
  if (call.args.splits == 0) {
    launch_attention_fwd(call.args, call.device, current_cuda_stream(call.device));
    return {out, lse};
  }
  Tensor parts = empty_tensor(
      q, std::vector<int64_t>{call.args.splits * attention_few_part(call.args)}, ScalarType::Float);
  call.args.parts = static_cast<float*>(parts.data_ptr());
  launch_attention_few(call.args, call.device, current_cuda_stream(call.device));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd_cuda(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const AttentionOptions& options,
    bool needs_dmask) {
  constexpr const char* op = "attention_bwd";
  Call call = prepare(op, q, k, v, options);
  torch::stable::accelerator::DeviceGuard guard(call.device);
  const AttentionProblem& p = call.problem;
  AttentionCudaArgs& a = call.args;
  const Tensor dout_rows = check_backward(op, dout, dlse, q, out, lse, p.out_sizes, p.lse_sizes,
                                          a.mask.kind, needs_dmask);
  if (dlse.has_value()) a.dlse = view_lse(*dlse, p.packed);
  Tensor dq = empty_like_layout(q, p.dim);
  Tensor dk = empty_like_layout(k, p.dim);
  Tensor dv = empty_like_layout(v, p.dim_v);
  if (p.packed)  // rows that no sequence has are not written
    for (Tensor* t : {&dq, &dk, &dv}) torch::stable::zero_(*t);
  a.out = view(out, p.packed);
  a.dout = view(dout_rows, p.packed);
  a.lse = view_lse(lse, p.packed);
  a.dq = view(dq, p.packed);
  a.dk = view(dk, p.packed);
  a.dv = view(dv, p.packed);
  // Three planes of lse's shape. torch's allocator reuses scratch in stream order, so it may go
  // before the kernels end.
  std::vector<int64_t> delta_sizes = p.lse_sizes;
  delta_sizes.front() *= 3;
  Tensor delta = empty_tensor(q, delta_sizes, ScalarType::Float);
  a.delta = view_lse(delta, p.packed);
  Tensor dmask = empty_tensor(q, std::vector<int64_t>{0});
  if (needs_dmask) {
    const Tensor& mask = *options.mask;
    const std::vector<int64_t> sizes(mask.sizes().begin(), mask.sizes().end());
    dmask = empty_tensor(mask, sizes);
    a.dmask = view_mask(op, dmask, q, sizes);
    if (p.packed) torch::stable::zero_(dmask);  // rows and keys that no sequence is long enough for
  }
  split_attention_bwd(a, device_traits(call.device));
  Tensor parts =
      empty_tensor(q, std::vector<int64_t>{a.splits > 1 ? a.splits * attention_bwd_part(a) : 0},
                   ScalarType::Float);  // scratch as well
  a.parts = static_cast<float*>(parts.data_ptr());
  launch_attention_bwd(a, call.device, current_cuda_stream(call.device));
  return {dq, dk, dv, dmask};
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CUDA, m) {
  m.impl("attention_fwd", BK_BOX(bigkernel::attention_fwd_cuda));
  m.impl("attention_bwd", BK_BOX(bigkernel::attention_bwd_cuda));
}
