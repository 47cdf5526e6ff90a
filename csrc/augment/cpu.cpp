// CPU binding of augment: checks, the split into tasks, the passes that contrast asks for.
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "augment/augment.h"
#include "augment/binding.h"
#include "augment/cpu_plan.h"
#include "cpu/parallel.h"

namespace bigkernel {
namespace {

constexpr int64_t kStreamed = int64_t{16} << 20;  // bytes of a result that no cache would keep

class Augmentation {
 public:
  explicit Augmentation(const AugmentCall& call)
      : call_(call), args_(call.args), n_(call.samples()) {
    for (int64_t i = 0; i < n_; ++i) chains_.push_back(call.chain(i));
  }

  void run() {
    const int64_t threads = thread_count();
    if (threads == 1 || n_ >= 4 * threads) {
      // One after another, not in equal shares: some samples take several times as long.
      std::atomic<int64_t> next{0};
      parallel_for(threads, 1, [&](int64_t, int64_t) {
        Worker worker;
        for (int64_t i; (i = next.fetch_add(1)) < n_;) whole_sample(worker, i);
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

  // In floats: bytes will do where every contrast works in whole numbers.
  int64_t held_size(int64_t i) const {
    const AugmentChain& chain = chains_[i];
    if (chain.contrasts.empty()) return 0;
    const int64_t pixels = args_.channels * args_.out_h * augment_pitch(args_.out_w);
    for (const int32_t at : chain.contrasts)
      if (!chain.colors[at].whole) return pixels;
    return pixels / 4;
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
            void* held, double* line_sums) const {
    const AugmentChain& chain = chains_[i];
    const AugmentPlan& plan =
        worker.planner.plan(args_, (*call_.batch)[i], call_.geometry_row(i), call_.fill_row(i),
                            call_.antialias, std::vector<AugmentColor>(chain.colors));
    worker.scratch.resize(size_t(augment_scratch_size(args_, plan)));
    AugmentTask task{};
    task.args = &args_;
    task.plan = &plan;
    task.sample = i;
    task.begin = begin;
    task.end = end;
    task.stream = call_.out.numel() * int64_t(call_.out.element_size()) >= kStreamed;
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

  const AugmentCall& call_;
  const AugmentArgs& args_;
  const int64_t n_;
  std::vector<AugmentChain> chains_;
};

Tensor augment_cpu(std::vector<Tensor> images, Tensor geometry, Tensor color, Tensor fill,
                   std::optional<Tensor> mean, std::optional<Tensor> std_, int64_t out_h,
                   int64_t out_w, bool channels_last_in, bool channels_last_out,
                   int64_t interpolation, bool antialias, double in_scale, int64_t out_dtype) {
  const AugmentCall call(images, geometry, color, fill, mean, std_, out_h, out_w, channels_last_in,
                         channels_last_out, interpolation, antialias, in_scale, out_dtype,
                         geometry);
  if (call.out.numel() > 0) Augmentation(call).run();
  return call.out;
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CPU, m) { m.impl("augment", BK_BOX(bigkernel::augment_cpu)); }
