// The sizes of attention's forward kernels, and what one of their blocks works on.
#pragma once
#include "attention/cuda_scores.h"
#include "attention/sm80_tile.h"

namespace bigkernel {

// KB of shared memory that a multiprocessor of sm_80 and sm_90 has at least, and of sm_86 and
// sm_120.
constexpr int kRoomy = 164, kTight = 100;

template <class T, int kDim_, bool kGeneral_, int kRoom = kRoomy>
struct ForwardShape {
  using Element = T;
  static constexpr int kDim = kDim_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr bool kFma = sizeof(T) == 4;
  static constexpr bool kHalved = kRoom < kRoomy;
  // In fp32 Q takes half of what there is: eight warps share tiles, where two blocks can't be.
  static constexpr int kThreads = kFma && kDim > 128 ? 64 : kFma && kHalved ? 256 : 128;
  // Two row tiles a warp halve the loads of K and V. O and S then fill the registers: 16 keys more
  // and the compiler spills in the inner loop.
  static constexpr int kRowTiles = kFma || kGeneral || kDim > 128 ? 1 : 2;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kThreads / 32 * kWarpRows;
  static constexpr int kRoomyKeys = kFma             ? (kDim > 128 ? 16 : 32)
                                    : kRowTiles == 2 ? (kDim > 96   ? 48
                                                        : kDim > 64 ? 64
                                                        : kDim > 32 ? 96
                                                                    : 128)
                                                     : (kDim > 192 ? 32 : 64);
  static constexpr int kKeys = !kHalved ? kRoomyKeys : kRoomyKeys == 48 ? 32 : kRoomyKeys / 2;
  // Blocks on a multiprocessor that the compiler is to leave registers for, 0 where it does so
  // unasked: as many as there can be without spills in the loop over tiles (make cuda-report).
  static constexpr int blocks_per_sm(int32_t capability) {
    if (!kGeneral) return 0;
    if (kFma) return kDim == 32 ? 4 : kDim == 64 ? 3 : 0;
    return capability < 100 ? 0 : kDim == 64 ? 4 : kDim == 96 ? 3 : 0;
  }
  static constexpr int kRowBytes = kDim * int(sizeof(T));
  static constexpr int kKeyTile = kRows * kRowBytes;                  // K starts here
  static constexpr int kValueTile = kKeyTile + kKeys * kRowBytes;     // V
  static constexpr int kWeightTile = kValueTile + kKeys * kRowBytes;  // P, fp32 only
  static constexpr int kShared = kWeightTile + (kFma ? kRows * kKeys * 4 : 0);
};

template <class Shape>
struct ForwardBlock {
  static constexpr int kRowTiles = Shape::kRowTiles;
  // In mma's layout (sm80_fwd.h): of keys, and of columns of O.
  using Scores = float[kRowTiles][Shape::kKeys / 8][4];
  using Sums = float[kRowTiles][Shape::kDim / 8][4];

  const AttentionCudaArgs& args;
  const DeviceSequence sequence;
  const DeviceReach reach;
  const int head, first_row, lane, warp_row;
  const uint32_t shared;
  const bool aligned;

  __device__ __forceinline__ ForwardBlock(const AttentionCudaArgs& args_,
                                          const DeviceSequence& sequence_, int head_,
                                          int first_row_, uint32_t shared_)
      : args(args_),
        sequence(sequence_),
        reach(reach_of(args_, sequence_)),
        head(head_),
        first_row(first_row_),
        lane(threadIdx.x % 32),
        warp_row(threadIdx.x / 32 * Shape::kWarpRows),
        shared(shared_),
        aligned(!Shape::kGeneral || args_.aligned) {}

  // The row that elements 2 e and 2 e + 1 of row tile i belong to.
  __device__ __forceinline__ int row_of(int i, int e) const {
    return first_row + warp_row + 16 * i + 8 * e + lane / 4;
  }
};

}  // namespace bigkernel
