// The forward kernels of one type.
#pragma once
#include "attention/sm80_fwd.h"
#include "attention/sm80_fwd_kernels.h"

namespace bigkernel {

template <class Shape>
AttentionLaunch forward_launch(const char* name) {
  AttentionLaunch launch{};
  launch.name = name;
  launch.kernel = reinterpret_cast<const void*>(&attention_fwd_kernel<Shape>);
  launch.generation = kSm80;
  launch.threads = Shape::kThreads;
  launch.shared = Shape::kShared;
  launch.tile_rows = Shape::kRows;
  launch.tile_keys = Shape::kKeys;
  launch.tile_dim = Shape::kDim;
  launch.general = Shape::kGeneral;
  return launch;
}

// The largest tiles of which two blocks fit on a multiprocessor, or the smallest there are: one
// block of four warps leaves nothing to do while it waits at its barriers.
template <class T, int kDim, bool kGeneral>
AttentionLaunch fitting_forward(const char* name, const DeviceTraits& device) {
  using Roomy = ForwardShape<T, kDim, kGeneral>;
  if constexpr (2 * (Roomy::kShared + kSharedOfBlock) > kTight << 10) {
    if (blocks_by_shared(device, Roomy::kShared) < 2)
      return forward_launch<ForwardShape<T, kDim, kGeneral, kTight>>(name);
  }
  return forward_launch<Roomy>(name);
}

template <class T, int kDim, int... kWider>
AttentionLaunch choose_forward(const char* name, int32_t dim, bool general,
                               const DeviceTraits& device) {
  if constexpr (sizeof...(kWider) > 0) {
    if (dim > kDim) return choose_forward<T, kWider...>(name, dim, general, device);
  }
  return general ? fitting_forward<T, kDim, true>(name, device)
                 : fitting_forward<T, kDim, false>(name, device);
}

}  // namespace bigkernel
