// CPU binding of adam_norm and adam_step_: checks, the balance over threads, the scalars.
#include <cmath>
#include <optional>
#include <vector>

#include "adam/adam.h"
#include "adam/binding.h"
#include "cpu/parallel.h"

namespace bigkernel {
namespace {

constexpr int64_t kGrain = 16;     // units a thread takes at least: 8,192 elements
constexpr int64_t kNormSpan = 32;  // units that one partial sum of the norm covers

// The list as one row of units of kAdamUnit elements, so that threads get equal shares of it
// however the elements spread over tensors.
class Row {
 public:
  explicit Row(size_t count) { first_.reserve(count + 1); }
  void add(int64_t numel) { first_.push_back(total() + (numel + kAdamUnit - 1) / kAdamUnit); }
  int64_t total() const { return first_.empty() ? 0 : first_.back(); }

  // Calls f(tensor, first unit within it, last unit within it) for the units begin..end.
  template <class F>
  void visit(int64_t begin, int64_t end, const F& f) const {
    size_t low = 0, high = first_.size();  // the tensor that holds unit `begin`
    while (low < high) {
      const size_t middle = (low + high) / 2;
      if (first_[middle] <= begin)
        low = middle + 1;
      else
        high = middle;
    }
    for (size_t i = low; begin < end; ++i) {
      const int64_t start = i == 0 ? 0 : first_[i - 1];
      const int64_t stop = first_[i] < end ? first_[i] : end;
      if (stop > begin) f(i, begin - start, stop - start);
      begin = stop > begin ? stop : begin;
    }
  }

 private:
  std::vector<int64_t> first_;  // units up to and including tensor i
};

// Every partial sum covers the same units however many threads there are, and they are added in
// order: the norm does not depend on the number of threads.
double norm_of(const std::vector<AdamGradient>& grads) {
  Row row(grads.size());
  for (const AdamGradient& g : grads) row.add(g.numel);
  const int64_t spans = (row.total() + kNormSpan - 1) / kNormSpan;
  std::vector<double> partial(spans);
  parallel_for(spans, 1 + kGrain / kNormSpan, [&](int64_t begin, int64_t end) {
    for (int64_t span = begin; span < end; ++span) {
      const int64_t stop = (span + 1) * kNormSpan;
      double sum = 0;
      row.visit(span * kNormSpan, stop < row.total() ? stop : row.total(),
                [&](size_t i, int64_t from, int64_t to) {
                  const int64_t last = to * kAdamUnit;
                  sum += BK_CALL(adam_square_sum)(grads[i].data, grads[i].type, from * kAdamUnit,
                                                  last < grads[i].numel ? last : grads[i].numel);
                });
      partial[span] = sum;
    }
  });
  double total = 0;
  for (double sum : partial) total += sum;
  return std::sqrt(total);
}

double read_scalar(const Tensor& t, const char* op, const char* name) {
  BK_CHECK(t.is_cpu() && t.numel() == 1, op, name, " must be one element on the CPU");
  if (t.scalar_type() == ScalarType::Float) return *static_cast<const float*>(t.const_data_ptr());
  BK_CHECK(t.scalar_type() == ScalarType::Double, op, name, " must be float32 or float64");
  return *static_cast<const double*>(t.const_data_ptr());
}

Tensor scalar_like(const Tensor& t, double value) {
  Tensor result = empty_tensor(t, {}, ScalarType::Float);
  *static_cast<float*>(result.mutable_data_ptr()) = float(value);
  return result;
}

Tensor adam_norm_cpu(std::vector<Tensor> grads, std::optional<Tensor> grad_scale) {
  BK_CHECK(!grads.empty(), "adam_norm", "grads must not be empty");
  Staging staging;
  std::vector<AdamGradient> list;
  list.reserve(grads.size());
  for (const Tensor& g : grads) {
    BK_CHECK(g.is_cpu(), "adam_norm", "grads must all be on the CPU");
    const DType type = dtype_of(g, "adam_norm", "grads");
    BK_CHECK(type <= DType::kFloat16, "adam_norm", "grads must be float32, bfloat16 or float16");
    const Tensor dense = is_dense(g) ? g : staging.read(g, g);
    list.push_back({dense.const_data_ptr(), g.numel(), type});
  }
  double norm = norm_of(list);
  if (grad_scale) norm /= read_scalar(*grad_scale, "adam_norm", "grad_scale");
  return scalar_like(grads[0], norm);
}

AdamScalars scalars_of(const AdamGroup& group, double step, double factor) {
  const double root = std::sqrt(1.0 - std::pow(group.beta2, step));
  const bool decoupled = group.flags & kDecoupled;
  AdamScalars s{};
  s.grad_factor = float(group.flags & kMaximize ? -factor : factor);
  s.weight1 = float(1.0 - group.beta1);
  s.weight2 = float(1.0 - group.beta2);
  s.step_size = float(group.lr * root / (1.0 - std::pow(group.beta1, step)));
  s.eps = float(group.eps * root);
  s.l2 = decoupled ? 0.0f : float(group.weight_decay);
  s.decay = decoupled ? float(group.lr * group.weight_decay) : 0.0f;
  s.amsgrad = group.flags & kAmsgrad;
  s.step = uint32_t(step);
  return s;
}

double norm_of(const std::vector<AdamTensor>& tensors) {
  std::vector<AdamGradient> list;
  list.reserve(tensors.size());
  for (const AdamTensor& t : tensors) list.push_back({t.grad, t.numel, t.grad_type});
  return norm_of(list);
}

// Counts the steps and updates all tensors in one sweep. A seed rounds bf16 stochastically.
void update_all(const std::vector<AdamTensor>& tensors, const std::vector<AdamGroup>& groups,
                double factor, std::optional<uint64_t> seed) {
  std::vector<AdamScalars> scalars(tensors.size());
  Row row(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const AdamTensor& t = tensors[i];
    row.add(t.numel);
    const float step = *t.step + 1.0f;
    // Neighbours nearly always agree, and pow is slow beside a tensor of a few elements.
    if (i > 0 && tensors[i - 1].group == t.group && *tensors[i - 1].step == step)
      scalars[i] = scalars[i - 1];
    else
      scalars[i] = scalars_of(groups[t.group], step, factor);
    scalars[i].stochastic = seed.has_value();
    scalars[i].seed = seed.value_or(0);
    *t.step = step;
  }
  parallel_for(row.total(), kGrain, [&](int64_t begin, int64_t end) {
    row.visit(begin, end, [&](size_t i, int64_t from, int64_t to) {
      const int64_t last = to * kAdamUnit;
      BK_CALL(adam_update)(tensors[i], scalars[i], from * kAdamUnit,
                           last < tensors[i].numel ? last : tensors[i].numel);
    });
  });
}

Tensor adam_step_cpu(const AdamCall& call) {
  Staging staging;
  const std::vector<AdamTensor> tensors = gather(call, staging);

  double factor = 1.0, norm = 0.0;
  bool skip = call.found_inf && read_scalar(*call.found_inf, kAdamOp, "found_inf") != 0;
  const double scale = call.grad_scale ? read_scalar(*call.grad_scale, kAdamOp, "grad_scale") : 1.0;
  if (call.grad_scale) factor = 1.0 / scale;
  if (call.max_norm) {
    if (call.total_norm) {
      norm = read_scalar(*call.total_norm, kAdamOp, "total_norm");
    } else {
      norm = norm_of(tensors) / scale;
    }
    norm = float(norm);
    factor *= std::fmin(*call.max_norm / (norm + 1e-6), 1.0);
    skip |= !std::isfinite(norm);
  }
  Tensor result = call.max_norm ? scalar_like(call.params[0], norm)
                                : empty_tensor(call.params[0], {0}, ScalarType::Float);
  if (skip) return result;

  std::vector<AdamGroup> groups(call.group_sizes.size());
  for (size_t i = 0; i < groups.size(); ++i)
    groups[i] = {int32_t(call.flags[i]),
                 call.lr_tensors.empty() ? call.lrs[i]
                                         : read_scalar(call.lr_tensors[i], kAdamOp, "lr_tensors"),
                 call.beta1s[i],
                 call.beta2s[i],
                 call.epss[i],
                 call.weight_decays[i]};
  uint64_t seed_value = 0;
  if (call.seed) {
    BK_CHECK(call.seed->is_cpu() && call.seed->numel() == 1 &&
                 call.seed->scalar_type() == ScalarType::Long,
             kAdamOp, "seed must be one int64 element on the CPU");
    seed_value = uint64_t(*static_cast<const int64_t*>(call.seed->const_data_ptr()));
  }

  update_all(tensors, groups, factor,
             call.seed ? std::optional<uint64_t>(seed_value) : std::nullopt);
  staging.write_back();
  return result;
}

// What `bigkernel bench adam` holds the step against: for each float32 array i of sizes[i] elements
// reads grads, reads and writes params, exp_avgs and exp_avg_sqs, with the (finite) values that
// they have. With `norm`, reads all of grads before. Arrays are given by their addresses, and taken
// as they are.
void stream_adam(const std::vector<int64_t>& params, const std::vector<int64_t>& grads,
                 const std::vector<int64_t>& exp_avgs, const std::vector<int64_t>& exp_avg_sqs,
                 const std::vector<int64_t>& sizes, bool norm) {
  Row row(sizes.size());
  for (int64_t size : sizes) row.add(size);
  auto sweep = [&](const auto& visit) {
    parallel_for(row.total(), kGrain, [&](int64_t begin, int64_t end) {
      row.visit(begin, end, [&](size_t i, int64_t from, int64_t to) {
        const int64_t first = from * kAdamUnit, last = to * kAdamUnit;
        visit(i, first, (last < sizes[i] ? last : sizes[i]) - first);
      });
    });
  };
  auto at = [](int64_t array, int64_t first) { return reinterpret_cast<float*>(array) + first; };
  [[maybe_unused]] static volatile float sink;
  static volatile float zero = 0;
  if (norm)
    sweep([&](size_t i, int64_t first, int64_t n) {
      sink = BK_CALL(adam_read)(at(grads[i], first), n);
    });
  sweep([&](size_t i, int64_t first, int64_t n) {
    BK_CALL(adam_stream)(at(params[i], first), at(grads[i], first), at(exp_avgs[i], first),
                         at(exp_avg_sqs[i], first), n, zero);
  });
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CPU, m) {
  m.impl("adam_norm", BK_BOX(bigkernel::adam_norm_cpu));
  m.impl("adam_step_", BK_BOX(bigkernel::adam_step_cpu));
}

BK_OWN_OPS(m) {
  m.def(
      "stream_adam(int[] params, int[] grads, int[] exp_avgs, int[] exp_avg_sqs, int[] sizes, "
      "bool norm) -> ()");
}

BK_OWN_KERNELS(m) { m.impl("stream_adam", BK_BOX(bigkernel::stream_adam)); }
