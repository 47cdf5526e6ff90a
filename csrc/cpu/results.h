// Memory for large results. A fresh batch of tens of megabytes comes from the system page by page,
// each page zeroed, which takes as long as the arithmetic: so the last results that were freed wait
// here for the next ones of their size. At most kSlots blocks of kLargest bytes wait.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/tensors.h"

namespace bigkernel {

class Results {
 public:
  // An uninitialised tensor on the CPU; `like` says where small ones come from.
  static torch::stable::Tensor empty(const torch::stable::Tensor& like,
                                     const std::vector<int64_t>& shape,
                                     torch::headeronly::ScalarType type) {
    std::vector<int64_t> strides(shape.size());
    int64_t count = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      strides[i] = count;
      count *= shape[i];
    }
    const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    const size_t bytes = size_t(count) * aoti_torch_dtype_element_size(code);
    void* p = bytes < kSmallest ? nullptr : take(bytes + kHeader);
    if (p == nullptr) return empty_tensor(like, shape, type);
    return torch::stable::from_blob(
        static_cast<char*>(p) + kHeader, shape, strides,
        torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
        [](void* data) { give_back(static_cast<char*>(data) - kHeader); });
  }

 private:
  static constexpr size_t kPage = size_t{2} << 20, kHeader = 64;
  static constexpr size_t kSmallest = size_t{4} << 20, kLargest = size_t{128} << 20;
  static constexpr int kSlots = 2;
  // Atomics and no lock: a process may fork, or end, in the middle. Blocks begin with their size.
  static inline std::atomic<void*> slots_[kSlots];

  static size_t& size_of(void* block) { return *static_cast<size_t*>(block); }

  static void* take(size_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    for (auto& slot : slots_) {
      void* block = slot.exchange(nullptr);
      if (block == nullptr) continue;
      if (size_of(block) == bytes) return block;
      give_back(block);
    }
    void* block = std::aligned_alloc(kPage, bytes);
    if (block == nullptr) return nullptr;
#if defined(__linux__)
    madvise(block, bytes, MADV_HUGEPAGE);  // a hint, no more
#endif
    size_of(block) = bytes;
    return block;
  }

  static void give_back(void* block) {
    if (size_of(block) <= kLargest) {
      for (auto& slot : slots_) {  // the newest goes to the front, the oldest drops out
        block = slot.exchange(block);
        if (block == nullptr) return;
      }
    }
    std::free(block);
  }
};

}  // namespace bigkernel
