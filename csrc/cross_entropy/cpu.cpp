// CPU binding of cross_entropy_fwd, cross_entropy_bwd and cross_entropy_bwd_: checks, memory of the
// results, threads.
#include <optional>
#include <tuple>
#include <vector>

#include "common/box.h"
#include "common/tensors.h"
#include "cpu/parallel.h"
#include "cpu/row_view.h"
#include "cross_entropy/cross_entropy.h"

namespace bigkernel {
namespace {

using OptionalTensor = std::optional<Tensor>;

struct Options {  // in the schema's order
  int64_t ignore_index;
  double smoothing, z_loss, softcap;
  auto fields() { return std::tie(ignore_index, smoothing, z_loss, softcap); }
};

// What forward and backward have in common, and what keeps its memory alive.
struct Call {
  CrossEntropyArgs args{};
  RowView rows, soft;
  Tensor labels, weight;
};

void prepare_labels(const char* op, Call& call, const Options& o) {
  CrossEntropyArgs& a = call.args;
  const Tensor& labels = call.labels;
  if (labels.dim() == 2) {
    BK_CHECK(labels.size(0) == call.rows.rows && labels.size(1) == a.classes, op,
             "labels must be int64 [", call.rows.rows, "] or probabilities [", call.rows.rows, ", ",
             a.classes, "]");
    a.soft_type = float_type(labels, op, "labels");
    call.soft = row_view(labels, op, "labels");
    a.soft = call.soft.data;
    a.soft_stride = call.soft.stride;
    return;
  }
  BK_CHECK(labels.is_cpu() && labels.dim() == 1 && labels.size(0) == call.rows.rows &&
               labels.scalar_type() == ScalarType::Long,
           op, "labels must be int64 [", call.rows.rows, "] or probabilities [", call.rows.rows,
           ", ", a.classes, "] on the CPU");
  call.labels = without_gaps(labels);
  a.labels = static_cast<const int64_t*>(call.labels.const_data_ptr());
  for (int64_t i = 0; i < call.rows.rows; ++i)
    BK_CHECK(a.labels[i] == o.ignore_index || (a.labels[i] >= 0 && a.labels[i] < a.classes), op,
             "labels must be 0 to ", a.classes - 1, " or ignore_index, ", o.ignore_index, ", got ",
             a.labels[i], " at row ", i);
}

Call prepare(const char* op, const Tensor& logits, const Tensor& labels,
             const OptionalTensor& weight, const Options& o) {
  BK_CHECK(logits.dim() == 2, op, "logits must be [N, classes]");
  Call call{{}, row_view(logits, op, "logits"), {}, labels, {}};
  CrossEntropyArgs& a = call.args;
  a.type = float_type(logits, op, "logits");
  a.logits = call.rows.data;
  a.stride = call.rows.stride;
  a.classes = call.rows.dim;
  BK_CHECK(a.classes > 0 && a.classes <= INT32_MAX, op, "logits must have 1 to ", INT32_MAX,
           " classes, got ", a.classes);
  prepare_labels(op, call, o);
  a.weight_sum = float(a.classes);
  if (weight.has_value()) {
    BK_CHECK(weight->is_cpu() && weight->dim() == 1 && weight->size(0) == a.classes &&
                 weight->scalar_type() == ScalarType::Float,
             op, "weight must be float32 [", a.classes, "] on the CPU");
    call.weight = without_gaps(*weight);
    a.weight = static_cast<const float*>(call.weight.const_data_ptr());
    double sum = 0;
    for (int64_t c = 0; c < a.classes; ++c) sum += a.weight[c];
    a.weight_sum = float(sum);
  }
  a.ignore_index = o.ignore_index;
  a.smoothing = float(o.smoothing);
  a.z_loss = float(o.z_loss);
  a.softcap = float(o.softcap);
  return call;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_fwd_cpu(const Tensor& logits, const Tensor& labels,
                                                         const OptionalTensor& weight,
                                                         const Options& options) {
  Call call = prepare("cross_entropy_fwd", logits, labels, weight, options);
  CrossEntropyArgs& a = call.args;
  const int64_t n = logits.size(0);
  Tensor losses = empty_tensor(logits, {n}, ScalarType::Float);
  Tensor total = empty_tensor(logits, {}, ScalarType::Float);
  Tensor stats = empty_tensor(logits, {2, n}, ScalarType::Float);
  a.losses = static_cast<float*>(losses.mutable_data_ptr());
  a.peak = static_cast<float*>(stats.mutable_data_ptr());
  a.spread = a.peak + n;
  parallel_for(n, row_grain(a.classes),
               [&](int64_t begin, int64_t end) { BK_CALL(cross_entropy_forward)(a, begin, end); });
  double sum = 0;  // in order, whatever the threads
  for (int64_t i = 0; i < n; ++i) sum += a.losses[i];
  *static_cast<float*>(total.mutable_data_ptr()) = float(sum);
  return {losses, total, stats};
}

void gradient(const char* op, const Tensor& scale, const Tensor& logits, const Tensor& labels,
              const OptionalTensor& weight, const Tensor& stats, const Options& options,
              Tensor* in_place, Tensor* result) {
  Call call = prepare(op, logits, labels, weight, options);
  CrossEntropyArgs& a = call.args;
  const int64_t n = logits.size(0);
  BK_CHECK(scale.is_cpu() && scale.dim() == 1 && scale.size(0) == n && scale.is_contiguous() &&
               scale.scalar_type() == ScalarType::Float,
           op, "scale must be float32 [", n, "], contiguous, on the CPU");
  BK_CHECK(stats.is_cpu() && stats.is_contiguous() && stats.numel() == 2 * n &&
               stats.scalar_type() == ScalarType::Float,
           op, "stats must be the third result of cross_entropy_fwd");
  a.scale = static_cast<const float*>(scale.const_data_ptr());
  a.peak = const_cast<float*>(static_cast<const float*>(stats.const_data_ptr()));
  a.spread = a.peak + n;
  a.grad_stride = in_place != nullptr ? a.stride : a.classes;
  if (in_place != nullptr) {
    BK_CHECK(a.logits == in_place->const_data_ptr() || n == 0, op,
             "logits must have evenly spaced rows of a contiguous last dimension");
    BK_CHECK(n < 2 || a.stride >= a.classes, op, "logits must not overlap themselves");
    a.dlogits = in_place->mutable_data_ptr();
  } else {
    *result = Results::empty(logits, {n, a.classes}, logits.scalar_type());
    a.dlogits = result->mutable_data_ptr();
  }
  parallel_for(n, row_grain(a.classes),
               [&](int64_t begin, int64_t end) { BK_CALL(cross_entropy_backward)(a, begin, end); });
}

Tensor cross_entropy_bwd_cpu(const Tensor& scale, const Tensor& logits, const Tensor& labels,
                             const OptionalTensor& weight, const Tensor& stats,
                             const Options& options) {
  Tensor result;
  gradient("cross_entropy_bwd", scale, logits, labels, weight, stats, options, nullptr, &result);
  return result;
}

void cross_entropy_bwd_inplace_cpu(const Tensor& scale, Tensor logits, const Tensor& labels,
                                   const OptionalTensor& weight, const Tensor& stats,
                                   const Options& options) {
  gradient("cross_entropy_bwd_", scale, logits, labels, weight, stats, options, &logits, nullptr);
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CPU, m) {
  m.impl("cross_entropy_fwd", BK_BOX(bigkernel::cross_entropy_fwd_cpu));
  m.impl("cross_entropy_bwd", BK_BOX(bigkernel::cross_entropy_bwd_cpu));
  m.impl("cross_entropy_bwd_", BK_BOX(bigkernel::cross_entropy_bwd_inplace_cpu));
}
