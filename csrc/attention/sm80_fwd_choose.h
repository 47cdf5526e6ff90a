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

template <class T, int kDim, int... kWider>
AttentionLaunch choose_forward(const char* name, int32_t dim, bool general) {
  if constexpr (sizeof...(kWider) > 0) {
    if (dim > kDim) return choose_forward<T, kWider...>(name, dim, general);
  }
  return general ? forward_launch<ForwardShape<T, kDim, true>>(name)
                 : forward_launch<ForwardShape<T, kDim, false>>(name);
}

}  // namespace bigkernel
