// The backward kernels of one type.
#pragma once
#include "attention/cuda_bwd_mask.h"

namespace bigkernel {

template <class T, int kDim, Part kPart>
const void* backward_kernel(bool general) {
  // Where products take long beside the rest, or there is no need for speed, one kernel does.
  if constexpr (sizeof(T) == 2 && kDim <= 128) {
    if (!general)
      return reinterpret_cast<const void*>(&attention_bwd_kernel<T, kDim, kPart, false>);
  }
  return reinterpret_cast<const void*>(&attention_bwd_kernel<T, kDim, kPart, true>);
}

template <class T, int kDim>
AttentionLaunch choose_backward_part(Part part, bool general) {
  using Tile = BackwardTile<T, kDim>;
  AttentionLaunch launch{};
  switch (part) {
    case Part::kKeysValues:
      launch.name = "attention_bwd_kernel (dk, dv)";
      if constexpr (kDim <= 128)
        launch.kernel = backward_kernel<T, kDim, Part::kKeysValues>(general);
      break;
    case Part::kKeys:
      launch.name = "attention_bwd_kernel (dk)";
      if constexpr (kDim > 128) launch.kernel = backward_kernel<T, kDim, Part::kKeys>(general);
      break;
    case Part::kValues:
      launch.name = "attention_bwd_kernel (dv)";
      if constexpr (kDim > 128) launch.kernel = backward_kernel<T, kDim, Part::kValues>(general);
      break;
    case Part::kQueries:
      launch.name = "attention_bwd_kernel (dq)";
      launch.kernel = backward_kernel<T, kDim, Part::kQueries>(general);
      break;
    case Part::kMask:
      launch.name = "attention_bwd_mask_kernel";
      launch.kernel = reinterpret_cast<const void*>(&attention_bwd_mask_kernel<T, kDim>);
      break;
  }
  launch.threads = Tile::kThreads;
  launch.shared = Tile::kShared;
  launch.tile_rows = Tile::kRows;
  launch.tile_keys = Tile::kCols;
  launch.tile_dim = kDim;
  launch.general = general || sizeof(T) == 4 || kDim > 128 || part == Part::kMask;
  return launch;
}

template <class T>
AttentionLaunch choose_backward(Part part, int32_t dim, bool general) {
  if (dim <= 64) return choose_backward_part<T, 64>(part, general);
  if (dim <= 128) return choose_backward_part<T, 128>(part, general);
  return choose_backward_part<T, 256>(part, general);
}

}  // namespace bigkernel
