// The op's arguments as torch passes them, checked and turned into AdamTensor entries. Shared by
// the CPU and the CUDA binding.
#pragma once
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "adam/adam.h"
#include "common/box.h"
#include "common/tensors.h"
#include "common/checks.h"

namespace bigkernel {

constexpr const char* kAdamOp = "adam_step_";

// The arguments of adam_step_, in the schema's order.
struct AdamCall {
  std::vector<Tensor> params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps;
  std::vector<int64_t> group_sizes, flags;
  std::vector<double> lrs;
  std::vector<Tensor> lr_tensors;
  std::vector<double> beta1s, beta2s, epss, weight_decays;
  std::optional<double> max_norm;
  std::optional<Tensor> total_norm, grad_scale, found_inf, seed;

  const Tensor& first() const {
    BK_CHECK(!params.empty(), kAdamOp, "params must not be empty");
    return params[0];
  }
  auto fields() {
    return std::tie(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps,
                    group_sizes, flags, lrs, lr_tensors, beta1s, beta2s, epss, weight_decays,
                    max_norm, total_norm, grad_scale, found_inf, seed);
  }
};

// Copies of tensors whose memory layout differs from their parameter's (or has gaps), and where
// the results must go back to. Empty in ordinary training.
class Staging {
 public:
  Tensor read(const Tensor& t, const Tensor& layout) {
    Tensor copy = torch::stable::empty_like(layout);
    if (copy.scalar_type() != t.scalar_type()) copy = torch::stable::to(copy, t.scalar_type());
    torch::stable::copy_(copy, t);
    kept_.push_back(copy);
    return copy;
  }
  Tensor update(const Tensor& t, const Tensor& layout) {
    Tensor copy = read(t, layout);
    written_.emplace_back(t, copy);
    return copy;
  }
  void write_back() {
    for (auto& [to, from] : written_) torch::stable::copy_(to, from);
  }

 private:
  std::vector<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> written_;
};

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + "]";
}

// Asked for once a tensor: of thousands of small ones the questions take longer than the update.
struct Layout {
  explicit Layout(const Tensor& t) : sizes(t.sizes()), strides(t.strides()) {}
  torch::headeronly::IntHeaderOnlyArrayRef sizes, strides;
};

inline bool same_sizes(const Layout& a, const Layout& b) {
  if (a.sizes.size() != b.sizes.size()) return false;
  for (size_t d = 0; d < a.sizes.size(); ++d)
    if (a.sizes[d] != b.sizes[d]) return false;
  return true;
}

// Elements in the same order of memory: equal strides, except where a size of 1 makes them idle.
inline bool same_strides(const Layout& a, const Layout& b) {
  for (size_t d = 0; d < a.sizes.size(); ++d)
    if (a.sizes[d] != 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

// No gaps and no overlap: sorted by stride, each dimension begins where the one before ends.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  std::vector<bool> used(sizes.size());
  for (size_t round = 0; round < sizes.size(); ++round) {
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (used[d] || (sizes[d] != 1 && strides[d] != expected)) continue;
      used[d] = true;
      if (sizes[d] != 1) expected *= sizes[d];
      break;
    }
  }
  return expected == t.numel();
}

inline bool shares_memory_within(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && strides[d] == 0) return true;
  return false;
}

// Checks the lists and returns one entry per tensor.
inline std::vector<AdamTensor> gather(const AdamCall& call, Staging& staging) {
  const size_t count = call.params.size(), groups = call.group_sizes.size();
  const bool cuda = call.first().is_cuda();
  const auto device = call.first().get_device_index();
  const std::pair<const char*, size_t> lists[] = {{"grads", call.grads.size()},
                                                  {"exp_avgs", call.exp_avgs.size()},
                                                  {"exp_avg_sqs", call.exp_avg_sqs.size()},
                                                  {"steps", call.steps.size()}};
  for (const auto& [name, size] : lists)
    BK_CHECK(size == count, kAdamOp, name, " must have one tensor per parameter (", count,
             "), got ", size);
  for (size_t size : {call.flags.size(), call.lrs.size(), call.beta1s.size(), call.beta2s.size(),
                      call.epss.size(), call.weight_decays.size()})
    BK_CHECK(size == groups, kAdamOp, "each hyper-parameter must have one value per group (",
             groups, "), got ", size);
  BK_CHECK(call.lr_tensors.empty() || call.lr_tensors.size() == groups, kAdamOp,
           "lr_tensors must be empty or have one tensor per group (", groups, "), got ",
           call.lr_tensors.size());

  std::vector<AdamTensor> entries(count);
  size_t next = 0, maxima = 0, masters = 0;
  for (size_t group = 0; group < groups; ++group) {
    const bool amsgrad = call.flags[group] & kAmsgrad;
    BK_CHECK(call.group_sizes[group] >= 0 && next + call.group_sizes[group] <= count, kAdamOp,
             "group_sizes must add up to the number of parameters (", count, ")");
    for (int64_t k = 0; k < call.group_sizes[group]; ++k, ++next) {
      const size_t i = next;
      const Tensor& param = call.params[i];
      AdamTensor& e = entries[i];
      e = AdamTensor{};
      e.group = int32_t(group);
      e.index = uint32_t(i);
      e.numel = param.numel();
      e.param_type = dtype_of(param, kAdamOp, "params");
      const bool narrow = e.param_type == DType::kBFloat16 || e.param_type == DType::kFloat16;
      BK_CHECK(narrow || e.param_type == DType::kFloat32, kAdamOp, "params[", i,
               "] must be float32, bfloat16 or float16");

      const Layout param_layout(param);
      auto fits = [&](const Tensor& t, const char* name) {
        BK_CHECK(t.is_cuda() == cuda && t.get_device_index() == device, kAdamOp, name, "[", i,
                 "] is not on the device of params[0]");
        const Layout layout(t);
        BK_CHECK(same_sizes(layout, param_layout), kAdamOp, name, "[", i,
                 "] must have its parameter's shape ", shape_of(param), ", got ", shape_of(t));
        return layout;
      };
      const Tensor& grad = call.grads[i];
      const Tensor& exp_avg = call.exp_avgs[i];
      const Tensor& exp_avg_sq = call.exp_avg_sqs[i];
      fits(param, "params");
      const Layout grad_layout = fits(grad, "grads");
      const Layout exp_avg_layout = fits(exp_avg, "exp_avgs");
      const Layout exp_avg_sq_layout = fits(exp_avg_sq, "exp_avg_sqs");
      e.grad_type = dtype_of(grad, kAdamOp, "grads");
      BK_CHECK(e.grad_type <= DType::kFloat16, kAdamOp, "grads[", i,
               "] must be float32, bfloat16 or float16");
      e.moment_type = dtype_of(exp_avg, kAdamOp, "exp_avgs");
      BK_CHECK(e.moment_type <= DType::kBFloat16, kAdamOp, "exp_avgs[", i,
               "] must be float32 or bfloat16");
      BK_CHECK(dtype_of(exp_avg_sq, kAdamOp, "exp_avg_sqs") == e.moment_type, kAdamOp,
               "exp_avg_sqs[", i, "] must have the dtype of exp_avgs[", i, "]");
      const Tensor& step = call.steps[i];
      BK_CHECK(step.numel() == 1 && step.scalar_type() == ScalarType::Float &&
                   step.is_cuda() == cuda && step.get_device_index() == device,
               kAdamOp, "steps[", i, "] must be one float32 element on the parameters' device");
      e.step = static_cast<float*>(step.mutable_data_ptr());

      const Tensor* vmax = nullptr;
      if (amsgrad) {
        BK_CHECK(maxima < call.max_exp_avg_sqs.size(), kAdamOp,
                 "max_exp_avg_sqs must have one tensor for each parameter of an amsgrad group");
        vmax = &call.max_exp_avg_sqs[maxima++];
        fits(*vmax, "max_exp_avg_sqs");
        BK_CHECK(dtype_of(*vmax, kAdamOp, "max_exp_avg_sqs") == e.moment_type, kAdamOp,
                 "max_exp_avg_sqs[", i, "] must have the dtype of exp_avgs[", i, "]");
      }
      const Tensor* master = nullptr;
      if (narrow && !call.masters.empty()) {
        BK_CHECK(masters < call.masters.size(), kAdamOp,
                 "masters must be empty or have one tensor for each 16-bit parameter");
        master = &call.masters[masters++];
        fits(*master, "masters");
        BK_CHECK(master->scalar_type() == ScalarType::Float, kAdamOp, "masters[", masters - 1,
                 "] must be float32");
      }
      if (e.numel == 0) continue;

      Tensor like = param;
      if (!is_dense(param)) {
        BK_CHECK(!shares_memory_within(param), kAdamOp, "params[", i,
                 "] is expanded: its elements share memory and cannot be updated one by one");
        like = staging.update(param, param);
      }
      const Layout order(like);
      e.param = like.mutable_data_ptr();
      auto ordered = [&](const Tensor& t, const Layout& layout) {
        return same_strides(layout, order) ? t.mutable_data_ptr()
                                           : staging.update(t, like).mutable_data_ptr();
      };
      e.grad = same_strides(grad_layout, order) ? grad.const_data_ptr()
                                                : staging.read(grad, like).const_data_ptr();
      e.exp_avg = ordered(exp_avg, exp_avg_layout);
      e.exp_avg_sq = ordered(exp_avg_sq, exp_avg_sq_layout);
      if (vmax) e.max_exp_avg_sq = ordered(*vmax, Layout(*vmax));
      if (master) e.master = static_cast<float*>(ordered(*master, Layout(*master)));
    }
  }
  BK_CHECK(next == count, kAdamOp, "group_sizes must add up to the number of parameters (", count,
           "), got ", next);
  BK_CHECK(maxima == call.max_exp_avg_sqs.size(), kAdamOp, "max_exp_avg_sqs has ",
           call.max_exp_avg_sqs.size(), " tensors, but the amsgrad groups have ", maxima);
  BK_CHECK(masters == call.masters.size(), kAdamOp, "masters has ", call.masters.size(),
           " tensors, but there are ", masters, " 16-bit parameters");
  return entries;
}

}  // namespace bigkernel
