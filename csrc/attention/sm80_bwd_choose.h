// The backward kernels of one type.
#pragma once
#include "attention/sm80_bwd_mask.h"

namespace bigkernel {

template <class T, int kDim, Part kPart, bool kGeneral>
AttentionLaunch backward_launch(const char* name) {
  using Tile = BackwardTile<T, kDim, kPart, kGeneral>;
  AttentionLaunch launch{};
  launch.name = name;
  if constexpr (kPart == Part::kMask)
    launch.kernel = reinterpret_cast<const void*>(&attention_bwd_mask_kernel<T, kDim>);
  else
    launch.kernel = reinterpret_cast<const void*>(&attention_bwd_kernel<T, kDim, kPart, kGeneral>);
  launch.generation = kSm80;
  launch.threads = Tile::kThreads;
  launch.shared = Tile::kShared;
  launch.tile_rows = Tile::kRows;
  launch.tile_keys = Tile::kCols;
  launch.tile_dim = kDim;
  launch.general = kGeneral;
  return launch;
}

template <class T, int kDim, Part kPart>
AttentionLaunch backward_launch(const char* name, bool general) {
  if constexpr (sizeof(T) == 2 && kDim <= 128) {  // wide or fp32, the general one will do
    if (!general) return backward_launch<T, kDim, kPart, false>(name);
  }
  return backward_launch<T, kDim, kPart, true>(name);
}

template <class T, int kDim>
AttentionLaunch choose_backward_part(Part part, bool general) {
  constexpr bool kTogether = kDim <= 128;  // dk and dv
  switch (part) {
    case Part::kKeysValues:
      if constexpr (kTogether)
        return backward_launch<T, kDim, Part::kKeysValues>("attention_bwd_kernel (dk, dv)",
                                                           general);
      break;
    case Part::kKeys:
      if constexpr (!kTogether)
        return backward_launch<T, kDim, Part::kKeys>("attention_bwd_kernel (dk)", general);
      break;
    case Part::kValues:
      if constexpr (!kTogether)
        return backward_launch<T, kDim, Part::kValues>("attention_bwd_kernel (dv)", general);
      break;
    case Part::kQueries:
      return backward_launch<T, kDim, Part::kQueries>("attention_bwd_kernel (dq)", general);
    case Part::kMask:
      return backward_launch<T, kDim, Part::kMask, true>("attention_bwd_mask_kernel");
  }
  return {};
}

template <class T>
AttentionLaunch choose_backward(Part part, int32_t dim, bool general) {
  if (dim <= 64) return choose_backward_part<T, 64>(part, general);
  if (dim <= 128) return choose_backward_part<T, 128>(part, general);
  return choose_backward_part<T, 256>(part, general);
}

}  // namespace bigkernel
