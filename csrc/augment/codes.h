// Written by setup.py from bigkernel/ops/augment/table.py, which explains it.
#pragma once
#include <cstdint>

#include "common/dtypes.h"

namespace bigkernel {

// Of geometry: how many columns, and where each part begins.
constexpr int64_t kAugmentColumns = 16;
constexpr int64_t kAugmentMapAt = 0;
constexpr int64_t kAugmentSourceAt = 6;
constexpr int64_t kAugmentOutputAt = 10;
constexpr int64_t kAugmentBorderAt = 14;
constexpr int64_t kAugmentNearestAt = 15;

enum class AugmentBorder : int32_t {
  kFillBlend = 0,
  kClamp = 1,
  kFillOver = 2,
};
enum class AugmentNearest : int32_t {
  kFloor = 0,
  kEven = 1,
  kResize = 2,
  kWarp = 3,
};
enum class AugmentOp : int32_t {
  kBrightness = 1,
  kContrast = 2,
  kSaturation = 3,
  kHue = 4,
  kGreyscale = 5,
};
enum class AugmentInterpolation : int32_t {
  kNearest = 0,
  kBilinear = 1,
};

// Colour codes are 1 to the first, and the same with the second added.
constexpr int32_t kAugmentOps = 5;
constexpr int32_t kAugmentWholeNumbers = 16;
// Points beyond this many pixels are fill.
constexpr double kAugmentFar = 1048576.0;
// What out_dtype stands for.
constexpr DType kAugmentDTypes[] = {
    DType::kFloat32,
    DType::kBFloat16,
    DType::kFloat16,
    DType::kUInt8,
};

}  // namespace bigkernel
