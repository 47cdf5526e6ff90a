// CPU binding of augment: checks, the split into tasks, the passes that contrast asks for.
#include <optional>
#include <vector>

#include "augment/augment.h"
#include "augment/cpu_plan.h"
#include "common/checks.h"
#include "cpu/parallel.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bigkernel {
namespace {

constexpr const char* kOp = "augment";
constexpr int64_t kLargestImage = int64_t{1} << 30;  // gathers index with 32 bits

DType out_dtype_of(int64_t code) {  // OUT_DTYPES in bigkernel/reference/augment.py
  BK_CHECK(code >= 0 && code < 4, kOp,
           "out_dtype must be float32, bfloat16, float16 or uint8 for the native kernel");
  constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kUInt8};
  return kTypes[code];
}

ScalarType scalar_type_of(DType type) {
  return type == DType::kFloat32    ? ScalarType::Float
         : type == DType::kBFloat16 ? ScalarType::BFloat16
         : type == DType::kFloat16  ? ScalarType::Half
                                    : ScalarType::Byte;
}

// The images as the kernel sees them; keeps the copies of those that had to be made contiguous.
class Batch {
 public:
  Batch(const std::vector<Tensor>& images, int64_t n, int64_t channels, bool channels_last) {
    const bool stacked = images.size() == 1 && images[0].dim() == 4;
    BK_CHECK(stacked ? images[0].size(0) == n : int64_t(images.size()) == n, kOp,
             "geometry must have a row for each image");
    kept_.reserve(images.size());
    for (const Tensor& given : images) add(given, stacked, channels, channels_last);
  }

  const AugmentImage& operator[](int64_t i) const { return views_[i]; }
  DType dtype() const { return dtype_; }

 private:
  void add(const Tensor& given, bool stacked, int64_t channels, bool channels_last) {
    const int64_t first = stacked ? 1 : 0;
    BK_CHECK(given.is_cpu() && given.dim() == first + 3, kOp,
             "images must be one batch of rank 4 or images of rank 3, on the CPU");
    const DType dtype = dtype_of(given, kOp, "images");
    BK_CHECK(dtype != DType::kBool && (kept_.empty() || dtype == dtype_), kOp,
             "images must have one dtype: uint8, float32, bfloat16 or float16");
    dtype_ = dtype;
    const int64_t c = channels_last ? first + 2 : first, y = channels_last ? first : first + 1;
    BK_CHECK(given.size(c) == channels, kOp, "images must have ", channels,
             " channels, as fill does, got ", given.size(c));
    const auto fits = [&](const Tensor& t) {
      if (t.numel() == 0) return true;
      const bool planes = t.stride(y + 1) == 1 || t.size(y + 1) == 1;
      const bool interleaved = t.stride(c) == 1 && t.stride(y + 1) == channels;
      return planes || interleaved;
    };
    kept_.push_back(fits(given) ? given : torch::stable::contiguous(given));
    const Tensor& t = kept_.back();
    AugmentImage view{t.const_data_ptr(), t.size(y), t.size(y + 1), t.stride(c), t.stride(y),
                      t.stride(y + 1),    0};
    const bool interleaved = channels > 1 && view.stride_c == 1 && view.stride_x == channels;
    if (!interleaved) view.stride_x = 1;  // or of a single column, never stepped over
    view.readable = (view.height - 1) * view.stride_y + (view.width - 1) * view.stride_x + 1 +
                    (interleaved ? channels - 1 : 0);
    BK_CHECK(view.readable < kLargestImage, kOp, "an image must have fewer than 2^30 elements");
    for (int64_t i = 0; i < (stacked ? t.size(0) : 1); ++i) {
      views_.push_back(view);
      if (stacked)
        views_.back().data =
            static_cast<const char*>(view.data) + i * t.stride(0) * int64_t(t.element_size());
    }
  }

  std::vector<Tensor> kept_;
  std::vector<AugmentImage> views_;
  DType dtype_ = DType::kUInt8;
};

// A fresh batch of tens of megabytes is written once: with 4 KiB pages, the page faults take longer
// than the pixels. A hint, no more.
void ask_for_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kHuge * kHuge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

struct Chain {
  std::vector<AugmentColor> colors;
  std::vector<int32_t> contrasts;  // their places in colors
};

Chain read_chain(const float* pairs, int64_t k, int64_t channels, bool bytes) {
  Chain chain;
  for (int64_t i = 0; i < k; ++i) {
    const float code = pairs[2 * i];
    if (code == 0) continue;
    const bool whole = code >= 16;
    const int32_t op = int32_t(whole ? code - 16 : code);
    BK_CHECK(float(op) == (whole ? code - 16 : code) && op >= 1 && op <= 5, kOp,
             "color codes must be 0 to 5, or 17 to 21, got ", code, ".");
    const auto kind = AugmentOp(op);
    if (channels != 3 && kind != AugmentOp::kBrightness && kind != AugmentOp::kContrast) continue;
    if (kind == AugmentOp::kContrast) chain.contrasts.push_back(int32_t(chain.colors.size()));
    chain.colors.push_back({kind, whole && bytes, pairs[2 * i + 1]});
  }
  return chain;
}

class Augmentation {
 public:
  Augmentation(const AugmentArgs& args, const Batch& batch, const Tensor& geometry,
               const Tensor& color, const Tensor& fill, bool antialias)
      : args_(args), batch_(batch), n_(geometry.size(0)), antialias_(antialias) {
    geometry_ = static_cast<const double*>(geometry.const_data_ptr());
    fill_ = static_cast<const float*>(fill.const_data_ptr());
    fill_stride_ = fill.size(0) == 1 ? 0 : args.channels;
    const int64_t k = color.size(1);
    const float* pairs = static_cast<const float*>(color.const_data_ptr());
    for (int64_t i = 0; i < n_; ++i)
      chains_.push_back(
          read_chain(pairs + i * k * 2, k, args.channels, args.in_type == DType::kUInt8));
  }

  void run() {
    const int64_t threads = thread_count();
    if (threads == 1 || n_ >= 4 * threads) {
      parallel_for(n_, 1, [&](int64_t begin, int64_t end) {
        Worker worker;
        for (int64_t i = begin; i < end; ++i) whole_sample(worker, i);
      });
    } else {
      split_samples(threads);
    }
  }

 private:
  struct Worker {
    AugmentPlanner planner;
    std::vector<float> scratch, held;
    std::vector<double> line_sums;
  };

  int64_t held_size(int64_t i) const {
    return chains_[i].contrasts.empty() ? 0 : args_.channels * args_.out_h * args_.out_w;
  }
  int32_t passes(int64_t i) const { return int32_t(chains_[i].contrasts.size()) + 1; }

  // Sums in the order of the lines, so the mean does not depend on who made which.
  float mean_grey(const double* line_sums) const {
    double total = 0;
    for (int64_t y = 0; y < args_.out_h; ++y) total += line_sums[y];
    const int64_t each = args_.channels == 3 ? 1 : args_.channels;
    return float(total / double(args_.out_h * args_.out_w * each));
  }

  void pass(Worker& worker, int64_t i, int32_t number, int64_t begin, int64_t end, float mean,
            float* held, double* line_sums) const {
    const Chain& chain = chains_[i];
    const AugmentPlan& plan =
        worker.planner.plan(args_, batch_[i], geometry_ + i * 16, fill_ + i * fill_stride_,
                            antialias_, std::vector<AugmentColor>(chain.colors));
    worker.scratch.resize(size_t(augment_scratch_size(args_, plan)));
    AugmentTask task{};
    task.args = &args_;
    task.plan = &plan;
    task.sample = i;
    task.begin = begin;
    task.end = end;
    task.sampling = number == 0;
    task.storing = number + 1 < passes(i);
    task.first_color = number == 0 ? 0 : chain.contrasts[number - 1];
    task.last_color = task.storing ? chain.contrasts[number] : int32_t(chain.colors.size());
    task.mean_grey = mean;
    task.held = held;
    task.line_sums = line_sums;
    task.scratch = worker.scratch.data();
    BK_CALL(augment_lines)(task);
  }

  void whole_sample(Worker& worker, int64_t i) const {
    worker.held.resize(size_t(held_size(i)));
    worker.line_sums.resize(size_t(args_.out_h));
    float mean = 0;
    for (int32_t number = 0; number < passes(i); ++number) {
      pass(worker, i, number, 0, args_.out_h, mean, worker.held.data(), worker.line_sums.data());
      if (number + 1 < passes(i)) mean = mean_grey(worker.line_sums.data());
    }
  }

  // Few samples: blocks of lines are the tasks, and all tasks of a pass end before the next.
  void split_samples(int64_t threads) const {
    const int64_t wanted = (4 * threads + n_ - 1) / n_;
    const int64_t lines = std::max<int64_t>(8, (args_.out_h + wanted - 1) / wanted);
    const int64_t blocks = (args_.out_h + lines - 1) / lines;
    std::vector<std::vector<float>> held(n_);
    std::vector<double> line_sums(size_t(n_ * args_.out_h));
    std::vector<float> mean(n_);
    int32_t most = 1;
    for (int64_t i = 0; i < n_; ++i) {
      held[i].resize(size_t(held_size(i)));
      most = std::max(most, passes(i));
    }
    for (int32_t number = 0; number < most; ++number) {
      parallel_for(n_ * blocks, 1, [&](int64_t begin, int64_t end) {
        Worker worker;
        for (int64_t task = begin; task < end; ++task) {
          const int64_t i = task / blocks, first = task % blocks * lines;
          if (number >= passes(i)) continue;
          pass(worker, i, number, first, std::min(first + lines, args_.out_h), mean[i],
               held[i].data(), line_sums.data() + i * args_.out_h);
        }
      });
      for (int64_t i = 0; i < n_; ++i)
        if (number + 1 < passes(i)) mean[i] = mean_grey(line_sums.data() + i * args_.out_h);
    }
  }

  const AugmentArgs& args_;
  const Batch& batch_;
  const int64_t n_;
  const bool antialias_;
  const double* geometry_;
  const float* fill_;
  int64_t fill_stride_;
  std::vector<Chain> chains_;
};

std::vector<float> channel_values(const std::optional<Tensor>& t, int64_t channels, float missing,
                                  const char* name) {
  if (!t.has_value()) return std::vector<float>(channels, missing);
  BK_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 1 &&
               t->size(0) == channels,
           kOp, name, " must be float32 of ", channels, " elements on the CPU");
  const Tensor dense = torch::stable::contiguous(*t);
  const float* p = static_cast<const float*>(dense.const_data_ptr());
  return std::vector<float>(p, p + channels);
}

Tensor augment_cpu(std::vector<Tensor> images, Tensor geometry, Tensor color, Tensor fill,
                   std::optional<Tensor> mean, std::optional<Tensor> std_, int64_t out_h,
                   int64_t out_w, bool channels_last_in, bool channels_last_out,
                   int64_t interpolation, bool antialias, double in_scale, int64_t out_dtype) {
  BK_CHECK(geometry.is_cpu() && geometry.scalar_type() == ScalarType::Double &&
               geometry.dim() == 2 && geometry.size(1) == 16,
           kOp, "geometry must be float64 [N, 16] on the CPU");
  const int64_t n = geometry.size(0);
  BK_CHECK(color.is_cpu() && color.scalar_type() == ScalarType::Float && color.dim() == 3 &&
               color.size(0) == n && color.size(2) == 2,
           kOp, "color must be float32 [N, K, 2] on the CPU");
  BK_CHECK(fill.is_cpu() && fill.scalar_type() == ScalarType::Float && fill.dim() == 2 &&
               (fill.size(0) == n || fill.size(0) == 1),
           kOp, "fill must be float32 [N, C] or [1, C] on the CPU");
  BK_CHECK(interpolation == 0 || interpolation == 1, kOp, "interpolation must be 0 or 1");
  BK_CHECK(out_h >= 0 && out_w >= 0, kOp, "out_h and out_w must not be negative");
  geometry = torch::stable::contiguous(geometry);
  color = torch::stable::contiguous(color);
  fill = torch::stable::contiguous(fill);

  AugmentArgs args{};
  args.channels = fill.size(1);
  const Batch batch(images, n, args.channels, channels_last_in);
  args.in_type = batch.dtype();
  args.out_type = out_dtype_of(out_dtype);
  args.out_h = out_h;
  args.out_w = out_w;
  args.nearest = interpolation == 0;
  args.channels_last_out = channels_last_out;
  args.bound = args.in_type == DType::kUInt8 ? 255.0f : 1.0f;
  std::vector<float> gain = channel_values(std_, args.channels, 1.0f, "std");
  std::vector<float> offset = channel_values(mean, args.channels, 0.0f, "mean");
  for (int64_t c = 0; c < args.channels; ++c) {
    offset[c] = float(-double(offset[c]) / double(gain[c]));
    gain[c] = float(in_scale / double(gain[c]));
  }
  args.gain = gain.data();
  args.offset = offset.data();
  std::vector<int64_t> shape = {n, args.channels, out_h, out_w};
  if (channels_last_out) shape = {n, out_h, out_w, args.channels};
  Tensor out = torch::stable::new_empty(images.empty() ? geometry : images[0], shape,
                                        scalar_type_of(args.out_type));
  args.out = out.mutable_data_ptr();
  ask_for_huge_pages(args.out, size_t(out.numel()) * out.element_size());
  if (out.numel() > 0) Augmentation(args, batch, geometry, color, fill, antialias).run();
  return out;
}

}  // namespace
}  // namespace bigkernel

STABLE_TORCH_LIBRARY_IMPL(bigkernel, CPU, m) {
  m.impl("augment", TORCH_BOX(&bigkernel::augment_cpu));
}
