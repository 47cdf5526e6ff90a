// CPU binding of linear_cross_entropy_fwd and linear_cross_entropy_bwd: checks, memory, and the
// loop over chunks of rows. The logits of a chunk are made by torch's matrix product, turned into
// losses and into their own gradient in place, and multiplied on: dinput = dz W, dW += dz^T input.
//
// Rows whose label is ignore_index are left out, whatever they hold. bf16 is multiplied as it is
// where the processor does so faster; else 16-bit inputs are widened, block by block of classes,
// and everything between the inputs and the results is fp32. The sum of dW over the chunks always
// is.
#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/box.h"
#include "common/tensors.h"
#include "cpu/parallel.h"
#include "cpu/row_view.h"
#include "cross_entropy/cross_entropy.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace bigkernel {
namespace {

using OptionalTensor = std::optional<Tensor>;

// A chunk's logits take a sixteenth of those of all rows, or this much: less is in the cache
// anyway.
constexpr int64_t kShare = 16, kSmallChunk = int64_t{2} << 20;
// Fewer rows would leave the products waiting for the weight.
constexpr int64_t kFewestRows = 64;
// Products of fewer rows may add up one by one what those of more rows add up in parts, which is
// more exact, and a row's bits would depend on how many stand beside it: never fewer than these.
constexpr int64_t kExactRows = 16;
constexpr int64_t kBlockBytes = int64_t{1} << 20;  // of the weight, in a copy

Tensor matrix(void* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
              DType type) {
  const std::array<int64_t, 2> sizes{rows, columns}, strides{row_stride, column_stride};
  return torch::stable::from_blob(data, sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  scalar_type(type));
}

// out = a b^T, to which `plus` is added: a row [columns] or a matrix, which may be out itself.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* plus = nullptr) {
  using torch::stable::detail::from;
  const OptionalTensor added = plus == nullptr ? OptionalTensor() : OptionalTensor(*plus);
  std::array<StableIValue, 4> stack{from(a), from(b), from(added), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// Memory that ends with the call.
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t count, DType type)
      : tensor_(Results::empty(like, {count}, scalar_type(type))),
        data(tensor_.mutable_data_ptr()) {}

 private:
  Tensor tensor_;

 public:
  void* data;
};

char* at(void* data, int64_t element, DType type) {
  return static_cast<char*>(data) + element * dtype_size(type);
}
const char* at(const void* data, int64_t element, DType type) {
  return static_cast<const char*>(data) + element * dtype_size(type);
}

struct Options {
  const OptionalTensor& weight;
  int64_t ignore_index;
  double smoothing, z_loss, softcap;
  bool input, linear_weight, linear_bias;  // whose gradients are wanted
};

class Job {
 public:
  Job(const char* op, const Tensor& input, const Tensor& linear_weight,
      const OptionalTensor& linear_bias, const Tensor& target, const Options& options)
      : op_(op), o_(options), like_(input), x_(row_view(input, op, "input")) {
    BK_CHECK(input.dim() == 2 && linear_weight.dim() == 2 && target.is_cpu(), op,
             "input must be [N, D], linear_weight [V, D], and target on the CPU");
    type_ = float_type(input, op, "input");
    rows_ = input.size(0);
    dim_ = x_.dim;
    BK_CHECK(dim_ > 0 && linear_weight.size(1) == dim_, op, "linear_weight must be [V, ", dim_,
             "]");
    const DType given = float_type(linear_weight, op, "linear_weight");
    BK_CHECK(given == type_ || given == DType::kFloat32, op,
             "linear_weight must be fp32 or of input's dtype");
    classes_ = linear_weight.size(0);
    BK_CHECK(classes_ > 0 && classes_ <= INT32_MAX, op, "linear_weight must have 1 to ", INT32_MAX,
             " rows, got ", classes_);
    // Outside of the autocast that asked for it, the weight is as it was.
    w_ = given == type_ ? linear_weight : torch::stable::to(linear_weight, scalar_type(type_));
    w_ = without_gaps(w_);
    work_ = type_ == DType::kBFloat16 && multiplies_bf16() ? type_ : DType::kFloat32;
    if (linear_bias.has_value()) {
      const DType kind = float_type(*linear_bias, op, "linear_bias");
      BK_CHECK(linear_bias->dim() == 1 && linear_bias->size(0) == classes_ &&
                   (kind == type_ || kind == DType::kFloat32),
               op, "linear_bias must be [", classes_, "], fp32 or of input's dtype");
      bias_ = without_gaps(torch::stable::to(torch::stable::to(*linear_bias, scalar_type(type_)),
                                             scalar_type(work_)));
    }
    prepare_target(target);
    prepare_weight();
    z_.classes = z_.stride = z_.grad_stride = classes_;
    z_.type = work_;
    z_.ignore_index = o_.ignore_index;
    z_.smoothing = float(o_.smoothing);
    z_.z_loss = float(o_.z_loss);
    z_.softcap = float(o_.softcap);
    losses_.resize(kept());
    peak_.resize(kept());
    spread_.resize(kept());
    scale_.resize(kept());
  }

  int64_t rows() const { return rows_; }

  void allocate() {
    // fp16 keeps too few of the small ones for a scale that comes later.
    dinput = result(o_.input, {rows_, dim_}, type_ == DType::kFloat16 ? DType::kFloat32 : type_);
    dweight = result(o_.linear_weight, {classes_, dim_}, DType::kFloat32);
    dbias = result(o_.linear_bias, {classes_}, DType::kFloat32);
  }

  // The gradient of each row's loss, and what forward knew of the rows.
  void take(const float* scale, const float* stats) {
    for (int64_t i = 0; i < kept(); ++i) {
      scale_[i] = scale[row_of(i)];
      peak_[i] = stats[row_of(i)];
      spread_[i] = stats[rows_ + row_of(i)];
    }
  }

  void scale_by(float scale) { std::fill(scale_.begin(), scale_.end(), scale); }

  // Of the rows that count; those that are left out have 0.
  void give(float* losses, float* stats) const {
    std::fill(losses, losses + rows_, 0.0f);
    std::fill(stats, stats + 2 * rows_, 0.0f);
    for (int64_t i = 0; i < kept(); ++i) {
      losses[row_of(i)] = losses_[i];
      stats[row_of(i)] = peak_[i];
      stats[rows_ + row_of(i)] = spread_[i];
    }
  }

  double sum() const {
    double total = 0;  // in order, whatever the threads
    for (float loss : losses_) total += loss;
    return total;
  }

  void run(bool losses, bool gradients) {
    if (gradients) {
      if (o_.input && (kept() < rows_ || kept() == 0)) clear(dinput);
      if (o_.linear_weight && kept() == 0) clear(dweight);
      if (o_.linear_bias) clear(dbias);
    }
    if (kept() == 0) return;
    // No chunk is left with few rows; where few count at all, rows of zeros stand beside them.
    const int64_t chunks = count_chunks();
    const int64_t rows = std::max((kept() + chunks - 1) / chunks, kExactRows);
    const bool widen = work_ != type_;
    const bool gather = !index_.empty() || kept() < kExactRows;
    block_ = std::min(classes_, std::max<int64_t>(64, kBlockBytes / (dim_ * dtype_size(work_))));
    Scratch logits(like_, rows * classes_, work_);
    Scratch hidden(like_, widen || gather ? rows * dim_ : 0, work_);
    const DType out = gradients && o_.input && dinput.scalar_type() != scalar_type(type_)
                          ? DType::kFloat32
                          : type_;
    const bool direct = work_ == out && !gather;  // dinput is where the product goes
    Scratch moved(like_, gradients && o_.input && !direct ? rows * dim_ : 0, work_);
    Scratch block(like_, widen ? block_ * dim_ : 0, work_);
    // Blocks of dz and of dW, where the sum of dW is wider than the product.
    const bool partial = gradients && o_.linear_weight && work_ != DType::kFloat32;
    Scratch dz(like_, partial ? rows * block_ : 0, work_);
    Scratch dw(like_, partial ? block_ * dim_ : 0, work_);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = kept() * chunk / chunks;
      const int64_t n = kept() * (chunk + 1) / chunks - first, m = std::max(n, kExactRows);
      const int64_t* index = index_.empty() ? nullptr : index_.data() + first;
      Tensor h;
      if (widen || gather) {
        const int64_t skip = gather ? 0 : first;
        copy(at(x_.data, skip * x_.stride, type_), x_.stride, type_, index, hidden.data, dim_,
             work_, nullptr, n, dim_);
        clear_rows(hidden.data, n, m, dim_);
        h = matrix(hidden.data, m, dim_, dim_, 1, work_);
      } else {  // all rows count: m is n
        h = matrix(const_cast<char*>(at(x_.data, first * x_.stride, type_)), m, dim_, x_.stride, 1,
                   work_);
      }
      char* z = static_cast<char*>(logits.data);
      each_block(block, [&](int64_t c, int64_t count, const Tensor& w) {
        const Tensor bias = bias_.defined() ? torch::stable::narrow(bias_, 0, c, count) : Tensor();
        multiply(matrix(at(z, c, work_), m, count, classes_, 1, work_), h, w,
                 bias_.defined() ? &bias : nullptr);
      });
      rows_of_chunk(first, n, z, losses, gradients);
      if (!gradients) continue;
      clear_rows(z, n, m, classes_);
      if (o_.linear_bias) {
        float* to = static_cast<float*>(dbias.mutable_data_ptr());
        parallel_for(classes_, 1024, [&](int64_t begin, int64_t end) {
          BK_CALL(add_columns)(work_, z, classes_, n, to, begin, end);
        });
      }
      void* dx = nullptr;
      if (o_.input) dx = direct ? at(dinput.mutable_data_ptr(), first * dim_, out) : moved.data;
      if (widen && (o_.input || o_.linear_weight)) {
        each_block(block, [&](int64_t c, int64_t count, const Tensor& w) {
          const Tensor part = matrix(at(z, c, work_), m, count, classes_, 1, work_);
          const Tensor sum = matrix(dx, m, dim_, dim_, 1, work_);
          if (o_.input) multiply(sum, part, transposed(w), c > 0 ? &sum : nullptr);
          if (o_.linear_weight) add_to_weight(part, h, c, count, first > 0);
        });
      } else {
        const Tensor whole = matrix(z, m, classes_, classes_, 1, work_);
        if (o_.input) multiply(matrix(dx, m, dim_, dim_, 1, work_), whole, transposed(w_));
        if (o_.linear_weight && !partial) add_to_weight(whole, h, 0, classes_, first > 0);
        if (partial) add_in_parts(z, h, m, dz, dw, first > 0);
      }
      if (o_.input && !direct)
        copy(dx, dim_, work_, nullptr,
             at(dinput.mutable_data_ptr(), gather ? 0 : first * dim_, out), dim_, out, index, n,
             dim_);
    }
  }

  Tensor dinput, dweight, dbias;

 private:
  int64_t kept() const { return kept_; }
  int64_t row_of(int64_t i) const { return index_.empty() ? i : index_[i]; }

  Tensor result(bool wanted, const std::vector<int64_t>& shape, DType type) const {
    if (!wanted) return empty_tensor(like_, {0}, scalar_type(type));
    return Results::empty(like_, shape, scalar_type(type));
  }

  static void clear(Tensor& t) { torch::stable::zero_(t); }

  void prepare_target(const Tensor& target) {
    if (target.dim() == 2) {
      BK_CHECK(target.size(0) == rows_ && target.size(1) == classes_, op_, "target must be int64 [",
               rows_, "] or probabilities [", rows_, ", ", classes_, "]");
      is_soft_ = true;
      soft_ = row_view(target, op_, "target");
      z_.soft_type = float_type(target, op_, "target");
      z_.soft_stride = soft_.stride;
      kept_ = rows_;
      return;
    }
    BK_CHECK(
        target.dim() == 1 && target.size(0) == rows_ && target.scalar_type() == ScalarType::Long,
        op_, "target must be int64 [", rows_, "] or probabilities [", rows_, ", ", classes_, "]");
    target_ = without_gaps(target);
    const int64_t* labels = static_cast<const int64_t*>(target_.const_data_ptr());
    std::vector<int64_t> index;
    index.reserve(rows_);
    for (int64_t i = 0; i < rows_; ++i) {
      if (labels[i] == o_.ignore_index) continue;
      BK_CHECK(labels[i] >= 0 && labels[i] < classes_, op_, "target must be 0 to ", classes_ - 1,
               " or ignore_index, ", o_.ignore_index, ", got ", labels[i], " at row ", i);
      index.push_back(i);
      labels_.push_back(labels[i]);
    }
    kept_ = int64_t(index.size());
    if (kept_ < rows_) index_ = std::move(index);
  }

  void prepare_weight() {
    z_.weight_sum = float(classes_);
    if (!o_.weight.has_value()) return;
    BK_CHECK(o_.weight->is_cpu() && o_.weight->dim() == 1 && o_.weight->size(0) == classes_ &&
                 o_.weight->scalar_type() == ScalarType::Float,
             op_, "weight must be float32 [", classes_, "] on the CPU");
    class_weight_ = without_gaps(*o_.weight);
    z_.weight = static_cast<const float*>(class_weight_.const_data_ptr());
    double sum = 0;
    for (int64_t c = 0; c < classes_; ++c) sum += z_.weight[c];
    z_.weight_sum = float(sum);
  }

  int64_t count_chunks() const {
    const int64_t all = rows_ * classes_ * dtype_size(type_);
    const int64_t budget = std::max(all / kShare, kSmallChunk);
    const int64_t rows = std::max(budget / (classes_ * dtype_size(work_)), kFewestRows);
    return (kept() + rows - 1) / rows;
  }

  // Rows from..to of a matrix without gaps.
  void clear_rows(void* data, int64_t from, int64_t to, int64_t columns) const {
    std::memset(at(data, from * columns, work_), 0,
                size_t((to - from) * columns * dtype_size(work_)));
  }

  static void copy(const void* from, int64_t from_stride, DType from_type, const int64_t* from_rows,
                   void* to, int64_t to_stride, DType to_type, const int64_t* to_rows, int64_t rows,
                   int64_t dim) {
    const CopyRowsArgs a{from,        to,        from_rows, to_rows, dim,
                         from_stride, to_stride, from_type, to_type};
    parallel_for(rows, row_grain(dim),
                 [&](int64_t begin, int64_t end) { BK_CALL(copy_rows)(a, begin, end); });
  }

  // Calls f(first, count, the weight of these classes) for all classes at once, or, where the
  // weight is to be widened, block by block.
  template <class F>
  void each_block(Scratch& block, const F& f) {
    if (work_ == type_) return f(int64_t{0}, classes_, w_);
    for (int64_t c = 0; c < classes_; c += block_) {
      const int64_t count = std::min(block_, classes_ - c);
      copy(at(w_.const_data_ptr(), c * dim_, type_), dim_, type_, nullptr, block.data, dim_, work_,
           nullptr, count, dim_);
      f(c, count, matrix(block.data, count, dim_, dim_, 1, work_));
    }
  }

  void rows_of_chunk(int64_t first, int64_t n, char* z, bool losses, bool gradients) {
    CrossEntropyArgs a = z_;
    a.logits = a.dlogits = z;
    if (is_soft_)
      a.soft = at(soft_.data, first * soft_.stride, z_.soft_type);
    else
      a.labels = labels_.data() + first;
    a.losses = losses_.data() + first;
    a.peak = peak_.data() + first;
    a.spread = spread_.data() + first;
    a.scale = scale_.data() + first;
    parallel_for(n, row_grain(classes_), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {  // both while it is in the cache
        if (losses) BK_CALL(cross_entropy_forward)(a, row, row + 1);
        if (gradients) BK_CALL(cross_entropy_backward)(a, row, row + 1);
      }
    });
  }

  void add_to_weight(const Tensor& dz, const Tensor& h, int64_t first, int64_t count, bool add) {
    void* to = at(dweight.mutable_data_ptr(), first * dim_, DType::kFloat32);
    const Tensor sum = matrix(to, count, dim_, dim_, 1, DType::kFloat32);
    multiply(sum, transposed(dz), transposed(h), add ? &sum : nullptr);
  }

  // The same where products are of 16 bits and their sum is of 32.
  void add_in_parts(const char* z, const Tensor& h, int64_t n, Scratch& dz, Scratch& dw, bool add) {
    for (int64_t c = 0; c < classes_; c += block_) {
      const int64_t count = std::min(block_, classes_ - c);
      copy(at(z, c, work_), classes_, work_, nullptr, dz.data, count, work_, nullptr, n, count);
      multiply(matrix(dw.data, count, dim_, dim_, 1, work_),
               matrix(dz.data, count, n, 1, count, work_), transposed(h));
      float* to = static_cast<float*>(dweight.mutable_data_ptr()) + c * dim_;
      if (add)
        parallel_for(count * dim_, 16384, [&](int64_t begin, int64_t end) {
          BK_CALL(accumulate)(work_, dw.data, to, begin, end);
        });
      else
        copy(dw.data, dim_, work_, nullptr, to, dim_, DType::kFloat32, nullptr, count, dim_);
    }
  }

  const char* op_;
  Options o_;
  Tensor like_, w_, bias_, target_, class_weight_;
  RowView x_, soft_{};
  bool is_soft_ = false;
  DType type_, work_;  // of the input; of the products
  int64_t rows_, dim_, classes_, kept_ = 0, block_ = 0;
  std::vector<int64_t> index_, labels_;  // index_: the rows that count; empty if all do
  std::vector<float> losses_, peak_, spread_, scale_;  // of those
  CrossEntropyArgs z_{};
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_fwd_cpu(
    const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias,
    const Tensor& target, const OptionalTensor& weight, const OptionalTensor& divisor,
    int64_t ignore_index, double smoothing, double z_loss, double softcap, bool input_gradient,
    bool weight_gradient, bool bias_gradient) {
  constexpr const char* op = "linear_cross_entropy_fwd";
  Job job(op, input, linear_weight, linear_bias, target,
          {weight, ignore_index, smoothing, z_loss, softcap, input_gradient, weight_gradient,
           bias_gradient});
  float by = 1;
  if (divisor.has_value()) {
    BK_CHECK(
        divisor->is_cpu() && divisor->numel() == 1 && divisor->scalar_type() == ScalarType::Float,
        op, "divisor must be one float32 on the CPU");
    by = *static_cast<const float*>(divisor->const_data_ptr());
  }
  Tensor losses = empty_tensor(input, {job.rows()}, ScalarType::Float);
  Tensor total = empty_tensor(input, {}, ScalarType::Float);
  Tensor stats = empty_tensor(input, {2, job.rows()}, ScalarType::Float);
  job.allocate();
  job.scale_by(1 / by);
  job.run(true, input_gradient || weight_gradient || bias_gradient);
  job.give(static_cast<float*>(losses.mutable_data_ptr()),
           static_cast<float*>(stats.mutable_data_ptr()));
  *static_cast<float*>(total.mutable_data_ptr()) = float(job.sum()) / by;
  return {losses, total, stats, job.dinput, job.dweight, job.dbias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_bwd_cpu(
    const Tensor& scale, const Tensor& input, const Tensor& linear_weight,
    const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& weight,
    const Tensor& stats, int64_t ignore_index, double smoothing, double z_loss, double softcap,
    bool input_gradient, bool weight_gradient, bool bias_gradient) {
  constexpr const char* op = "linear_cross_entropy_bwd";
  Job job(op, input, linear_weight, linear_bias, target,
          {weight, ignore_index, smoothing, z_loss, softcap, input_gradient, weight_gradient,
           bias_gradient});
  const int64_t n = job.rows();
  BK_CHECK(scale.is_cpu() && scale.dim() == 1 && scale.size(0) == n && scale.is_contiguous() &&
               scale.scalar_type() == ScalarType::Float,
           op, "scale must be float32 [", n, "], contiguous, on the CPU");
  BK_CHECK(stats.is_cpu() && stats.is_contiguous() && stats.numel() == 2 * n &&
               stats.scalar_type() == ScalarType::Float,
           op, "stats must be the third result of linear_cross_entropy_fwd");
  job.allocate();
  job.take(static_cast<const float*>(scale.const_data_ptr()),
           static_cast<const float*>(stats.const_data_ptr()));
  job.run(false, true);
  return {job.dinput, job.dweight, job.dbias};
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CPU, m) {
  m.impl("linear_cross_entropy_fwd", BK_BOX(bigkernel::linear_cross_entropy_fwd_cpu));
  m.impl("linear_cross_entropy_bwd", BK_BOX(bigkernel::linear_cross_entropy_bwd_cpu));
}
