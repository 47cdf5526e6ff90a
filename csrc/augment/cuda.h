// What the CUDA binding of augment hands to its launcher. No torch header here.
#pragma once
#include <cstdint>
#include <vector>

#include "augment/augment.h"
#include "augment/tables.h"

namespace bigkernel {

constexpr int kAugmentTile = 1024;            // output pixels that a block makes at a time
constexpr int64_t kAugmentMostBlocks = 1024;  // for one image: each adds up as many sums

// One call. Everything lies on the host but the images' pixels and args.out.
struct AugmentInput {
  AugmentArgs args;
  const AugmentImage* images;  // [n], any strides
  const double* geometry;      // [n, kAugmentColumns]
  const float* color;          // [n, k, 2]
  const float* fill;           // [fill_rows, channels]
  int64_t n, k, fill_rows;     // fill_rows: n or 1
  bool antialias;
};

// One image, as the kernels see it.
struct AugmentSample {
  AugmentGeometry geometry;
  const void* data;                      // source
  int64_t stride_c, stride_y, stride_x;  // in elements
  AugmentNearest rule_x, rule_y;
  double per_scale_x, per_scale_y;  // kResize: output pixels a source pixel
  double per_reach_x, per_reach_y;  // 1 / half-width of the filter
  int32_t first_color, color_count;
  int32_t sums;   // place among the images that have a contrast
  bool held_out;  // between launches the image lies in the output, else in `held`
  float* held;    // [channels, out_h, out_w] in the output's order
};

// How a call is run: the first launch samples every image and carries its colours as far as its
// first contrast, each launch after it takes those images on to the next one, from what the launch
// before left in the output.
struct AugmentLaunch {
  std::vector<AugmentChain> chains;         // [n]
  std::vector<std::vector<int32_t>> later;  // images of the second launch, of the third ...
  uint32_t blocks;                          // for each image
  int64_t samples_at, colors_at, fill_at, gain_at, later_at;  // places in the tables, in bytes
  int64_t table_bytes;
  int64_t sums_bytes, scratch_bytes;  // scratch: [sums | images between launches, in fp32]
};

// `tables` and `scratch` on the device. All launches go to `stream` (a cudaStream_t) of `device`
// and return at once. Throws std::runtime_error, naming the kernel, the grid and CUDA's message.
void launch_augment(const AugmentInput& input, const AugmentLaunch& launch, const void* tables,
                    void* scratch, int device, void* stream);

}  // namespace bigkernel
