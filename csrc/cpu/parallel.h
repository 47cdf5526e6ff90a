// Threads are torch's own: one pool per process, torch.set_num_threads counts.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>
#include <mutex>

namespace bigkernel {

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// Calls f(begin, end) on disjoint ranges that cover 0..n, each at least `grain` long.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain || thread_count() == 1) return f(int64_t{0}, n);
  torch::stable::parallel_for(0, n, grain, f);
}

}  // namespace bigkernel
