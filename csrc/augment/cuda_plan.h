// What a call of augment launches, and the tables that its kernels read. Host code alone.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "augment/cuda.h"
#include "cuda/device.h"

namespace bigkernel {
namespace detail {

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("bigkernel.augment: " + what);
}

inline int64_t round_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// In the output between launches, and exact there: fp32, or bytes of whole-number mode.
inline bool held_in_output(const AugmentArgs& args, const AugmentChain& chain) {
  return args.out_type == DType::kFloat32 ||
         std::all_of(chain.contrasts.begin(), chain.contrasts.end(),
                     [&](int32_t k) { return chain.colors[k].whole; });
}

inline AugmentSample describe(const AugmentInput& input, int64_t i) {
  const AugmentArgs& args = input.args;
  const AugmentImage& image = input.images[i];
  AugmentSample s{};
  s.geometry = read_geometry(input.geometry + i * kAugmentColumns, image.width, image.height,
                             args.out_w, args.out_h, input.antialias && !args.nearest);
  s.data = image.data;
  s.stride_c = image.stride_c;
  s.stride_y = image.stride_y;
  s.stride_x = image.stride_x;
  const double* m = s.geometry.map;
  const auto rule = [&](double step, double origin) {
    const bool usable = m[1] == 0 && m[3] == 0 && std::abs(step) >= 1 / kAugmentFar &&
                        std::abs(step) <= kAugmentFar && std::abs(origin) <= kAugmentFar;
    const bool resize = s.geometry.rule == AugmentNearest::kResize;
    return resize && !usable ? AugmentNearest::kFloor : s.geometry.rule;
  };
  s.rule_x = rule(m[0], s.geometry.origin_x);
  s.rule_y = rule(m[4], s.geometry.origin_y);
  s.per_scale_x = 1.0 / std::abs(m[0]);
  s.per_scale_y = 1.0 / std::abs(m[4]);
  s.per_reach_x = 1.0 / s.geometry.reach_x;
  s.per_reach_y = 1.0 / s.geometry.reach_y;
  s.held_out = true;
  return s;
}

}  // namespace detail

inline AugmentLaunch plan_augment(const AugmentInput& input, const DeviceTraits& device) {
  const AugmentArgs& args = input.args;
  constexpr int64_t kMostGrid = std::numeric_limits<int32_t>::max();
  using namespace detail;
  if (input.n > kMostGrid) fail("a batch must have fewer than 2^31 images for the GPU");
  const double elements = double(args.channels) * double(args.out_h) * double(args.out_w);
  if (elements >= 0x1p31) fail("an output image must have fewer than 2^31 elements for the GPU");
  check_device("augment", "augment_sample_kernel", device, kSm80);
  AugmentLaunch launch{};
  int64_t colors = 0, beside = 0, contrasts = 0;
  for (int64_t i = 0; i < input.n; ++i) {
    launch.chains.push_back(read_chain(input.color + i * input.k * 2, input.k, args.channels,
                                       args.in_type == DType::kUInt8));
    const AugmentChain& chain = launch.chains.back();
    colors += int64_t(chain.colors.size());
    contrasts += !chain.contrasts.empty();
    beside += !held_in_output(args, chain);
    launch.later.resize(std::max(launch.later.size(), chain.contrasts.size()));
    for (size_t pass = 0; pass < chain.contrasts.size(); ++pass)
      launch.later[pass].push_back(int32_t(i));
  }
  int64_t later = 0;
  for (const auto& images : launch.later) later += int64_t(images.size());

  const int64_t plane = args.out_h * args.out_w;
  const int64_t units = args.channels == 3 ? plane : args.channels * plane;
  const int64_t most = std::min(kAugmentMostBlocks, kMostGrid / std::max<int64_t>(input.n, 1));
  launch.blocks = uint32_t(std::clamp<int64_t>((units + kAugmentTile - 1) / kAugmentTile, 1, most));
  launch.samples_at = 0;
  launch.colors_at = round_up(input.n * int64_t(sizeof(AugmentSample)));
  launch.fill_at = launch.colors_at + round_up(colors * int64_t(sizeof(AugmentColor)));
  launch.gain_at = launch.fill_at + round_up(input.fill_rows * args.channels * 4);
  launch.later_at = launch.gain_at + round_up(2 * args.channels * 4);
  launch.table_bytes = launch.later_at + round_up(later * 4);
  launch.sums_bytes = contrasts * launch.blocks * 8;
  launch.scratch_bytes = 2 * launch.sums_bytes + beside * round_up(args.channels * plane * 4);
  return launch;
}

inline void write_augment_tables(const AugmentInput& input, const AugmentLaunch& launch,
                                 void* scratch, void* tables) {
  using namespace detail;
  const AugmentArgs& args = input.args;
  char* const base = static_cast<char*>(tables);
  const auto put = [&](int64_t& at, const auto* values, int64_t count) {
    if (count > 0) std::memcpy(base + at, values, size_t(count) * sizeof(*values));
    at += count * int64_t(sizeof(*values));
  };
  const int64_t image_bytes = round_up(args.channels * args.out_h * args.out_w * 4);
  char* held = static_cast<char*>(scratch) + 2 * launch.sums_bytes;
  int64_t samples_at = launch.samples_at, colors_at = launch.colors_at;
  int32_t contrasts = 0, first_color = 0;
  for (int64_t i = 0; i < input.n; ++i) {
    const AugmentChain& chain = launch.chains[i];
    AugmentSample sample = describe(input, i);
    sample.first_color = first_color;
    sample.color_count = int32_t(chain.colors.size());
    if (!chain.contrasts.empty()) sample.sums = contrasts++;
    if (!held_in_output(args, chain)) {
      sample.held_out = false;
      sample.held = reinterpret_cast<float*>(held);
      held += image_bytes;
    }
    first_color += sample.color_count;
    put(samples_at, &sample, 1);
    put(colors_at, chain.colors.data(), sample.color_count);
  }
  int64_t at = launch.fill_at;
  put(at, input.fill, input.fill_rows * args.channels);
  at = launch.gain_at;
  put(at, args.gain, args.channels);
  put(at, args.offset, args.channels);
  at = launch.later_at;
  for (const auto& images : launch.later) put(at, images.data(), int64_t(images.size()));
}

}  // namespace bigkernel
