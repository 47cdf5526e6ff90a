// CPU binding of rope_fwd and rope_: checks, memory of the results, threads.
#include <optional>
#include <tuple>
#include <vector>

#include "common/box.h"
#include "common/tensors.h"
#include "cpu/parallel.h"
#include "cpu/row_view.h"
#include "rope/rope.h"

namespace bigkernel {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor with_rows(const Tensor& t, const char* op, const char* name) {
  BK_CHECK(t.is_cpu(), op, name, " must be on the CPU");
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) == 1 ? t : without_gaps(t);
}

// As the attention op lays out its results: as [B, S, H, D] in memory if x is, without gaps.
Tensor empty_like_layout(const Tensor& x) {
  if (x.stride(1) < x.stride(2))
    return torch::stable::transpose(
        Results::empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)}, x.scalar_type()), 1, 2);
  return Results::empty(x, shape_of_result(x), x.scalar_type());
}

class Call {
 public:
  Call(const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved,
       bool transposed)
      : op_(op), cos_(with_rows(cos, op, "cos")), sin_(with_rows(sin, op, "sin")) {
    BK_CHECK(x.dim() == 4, op, "q must be [B, H, S, D]");
    args_.type = float_type(x, op, "q");
    args_.table_type = float_type(cos, op, "cos");
    args_.batch = x.size(0);
    args_.length = x.size(2);
    args_.dim = x.size(3);
    args_.interleaved = interleaved;
    args_.transposed = transposed;
    BK_CHECK(cos.dim() == 3 && same_shape(cos, sin) && cos.scalar_type() == sin.scalar_type(), op,
             "cos and sin must be [B or 1, S, R], of one shape and dtype");
    args_.rotary = cos.size(2);
    BK_CHECK((cos.size(0) == 1 || cos.size(0) == args_.batch) && cos.size(1) == args_.length &&
                 args_.rotary % 2 == 0 && args_.rotary <= args_.dim,
             op, "cos and sin must be [", args_.batch, " or 1, ", args_.length,
             ", R] with R even and at most ", args_.dim);
    args_.cos = cos_.const_data_ptr();
    args_.sin = sin_.const_data_ptr();
    args_.cos_batch = cos_.size(0) == 1 ? 0 : cos_.stride(0);
    args_.sin_batch = sin_.size(0) == 1 ? 0 : sin_.stride(0);
    args_.cos_row = cos_.stride(1);
    args_.sin_row = sin_.stride(1);
  }

  void add(const char* name, const Tensor& x, const Tensor& out) {
    BK_CHECK(x.dim() == 4 && x.size(0) == args_.batch && x.size(2) == args_.length &&
                 x.size(3) == args_.dim && float_type(x, op_, name) == args_.type && x.is_cpu(),
             op_, name, " must be [", args_.batch, ", H, ", args_.length, ", ", args_.dim,
             "] of q's dtype, on the CPU");
    args_.tensors[args_.count++] = {
        x.const_data_ptr(), out.mutable_data_ptr(), x.size(1),     x.stride(0),  x.stride(1),
        x.stride(2),        out.stride(0),          out.stride(1), out.stride(2)};
    elements_ += x.size(1) * args_.dim;
  }

  void run() const {
    if (elements_ == 0) return;
    parallel_for(args_.batch * args_.length, row_grain(elements_), [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(size_t(2 * args_.rotary));
      BK_CALL(rope_rotate)(args_, begin, end, scratch.data());
    });
  }

 private:
  const char* op_;
  Tensor cos_, sin_;
  RopeArgs args_{};
  int64_t elements_ = 0;  // of a position
};

std::tuple<Tensor, Tensor> rope_fwd_cpu(const Tensor& q, const OptionalTensor& k, const Tensor& cos,
                                        const Tensor& sin, bool interleaved, bool transposed) {
  constexpr const char* op = "rope_fwd";
  Call call(op, q, cos, sin, interleaved, transposed);
  const Tensor q_rows = with_rows(q, op, "q");
  Tensor q_out = empty_like_layout(q);
  call.add("q", q_rows, q_out);
  if (!k.has_value()) {
    call.run();
    return {q_out, empty_tensor(q, {0})};
  }
  BK_CHECK(k->dim() == 4, op, "k must be [B, H, S, D]");
  const Tensor k_rows = with_rows(*k, op, "k");
  Tensor k_out = empty_like_layout(*k);
  call.add("k", k_rows, k_out);
  call.run();
  return {q_out, k_out};
}

void rope_inplace_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  constexpr const char* op = "rope_";
  Call call(op, x, cos, sin, interleaved, false);
  BK_CHECK(x.stride(3) == 1 || x.size(3) == 1, op, "x must have a contiguous last dimension");
  call.add("x", x, x);
  call.run();
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CPU, m) {
  m.impl("rope_fwd", BK_BOX(bigkernel::rope_fwd_cpu));
  m.impl("rope_", BK_BOX(bigkernel::rope_inplace_cpu));
}
