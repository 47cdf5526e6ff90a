// The rows of augment's tables (bigkernel/ops/augment/table.py), decoded: where the kernels of the
// CPU and of the GPU begin.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "augment/augment.h"

namespace bigkernel {

namespace detail {
// One side of a box, cut to 0..size; NaN makes it empty.
inline void cut_side(double start, double stop, int64_t size, int32_t& from, int32_t& to) {
  from = to = 0;
  if (!(start < stop)) return;
  from = int32_t(std::clamp(start, 0.0, double(size)));
  to = int32_t(std::clamp(stop, 0.0, double(size)));
}

inline double filter_reach(double along, double across) {
  const double r = std::hypot(along, across);
  return r > 1.0 ? std::min(r, kAugmentFar) : 1.0;  // NaN: 1
}

// The code that a number of the table is, or the one that all others stand for.
template <class Code>
Code code_or(double number, Code other, std::initializer_list<Code> codes) {
  for (const Code code : codes)
    if (number == double(int32_t(code))) return code;
  return other;
}

// See _warped in bigkernel/ops/augment/reference.py.
inline AugmentWarp warp_axis(const double* map, int64_t out_w, int64_t out_h, int32_t begin,
                             int32_t end) {
  const double half = double(end - begin) * 0.5;
  const double middle =
      map[0] * (double(out_w) * 0.5) + map[1] * (double(out_h) * 0.5) + map[2] - begin - half;
  const float by = float(half);
  return {float(map[0]) / by, float(map[1]) / by, float(middle) / by, by};
}
}  // namespace detail

// filtered: bilinear with antialias.
inline AugmentGeometry read_geometry(const double* row, int64_t width, int64_t height,
                                     int64_t out_w, int64_t out_h, bool filtered) {
  AugmentGeometry g{};
  const double* const map = row + kAugmentMapAt;
  const double* const box = row + kAugmentSourceAt;
  const double* const shown = row + kAugmentOutputAt;
  g.border = detail::code_or(row[kAugmentBorderAt], AugmentBorder::kFillOver,
                             {AugmentBorder::kClamp, AugmentBorder::kFillBlend});
  g.rule = detail::code_or(row[kAugmentNearestAt], AugmentNearest::kFloor,
                           {AugmentNearest::kEven, AugmentNearest::kResize, AugmentNearest::kWarp});
  for (int i = 0; i < 6; ++i) g.map[i] = map[i];
  g.origin_x = box[0];
  g.origin_y = box[1];
  detail::cut_side(box[0], box[2], width, g.box[0], g.box[2]);
  detail::cut_side(box[1], box[3], height, g.box[1], g.box[3]);
  detail::cut_side(shown[0], shown[2], out_w, g.out_box[0], g.out_box[2]);
  detail::cut_side(shown[1], shown[3], out_h, g.out_box[1], g.out_box[3]);
  g.empty = g.box[0] >= g.box[2] || g.box[1] >= g.box[3] || g.out_box[0] >= g.out_box[2] ||
            g.out_box[1] >= g.out_box[3];
  if (!g.empty && g.rule == AugmentNearest::kWarp) {
    g.warp_x = detail::warp_axis(map, out_w, out_h, g.box[0], g.box[2]);
    g.warp_y = detail::warp_axis(map + 3, out_w, out_h, g.box[1], g.box[3]);
    g.fused = 6 * out_w * out_h >= 400;
  }
  g.reach_x = filtered ? detail::filter_reach(map[0], map[1]) : 1.0;
  g.reach_y = filtered ? detail::filter_reach(map[3], map[4]) : 1.0;
  return g;
}

struct AugmentChain {
  std::vector<AugmentColor> colors;
  std::vector<int32_t> contrasts;  // their places in colors
};

// pairs: [k, 2], one sample's row of the colour table; bytes: the source is uint8.
inline AugmentChain read_chain(const float* pairs, int64_t k, int64_t channels, bool bytes) {
  AugmentChain chain;
  for (int64_t i = 0; i < k; ++i) {
    const float code = pairs[2 * i];
    if (code == 0) continue;
    const bool whole = code >= kAugmentWholeNumbers;
    const float plain = whole ? code - kAugmentWholeNumbers : code;
    if (!(plain >= 1 && plain <= kAugmentOps) || plain != float(int32_t(plain)))
      throw std::runtime_error("bigkernel.augment: color codes must be 0 to " +
                               std::to_string(kAugmentOps) + ", or " +
                               std::to_string(kAugmentWholeNumbers + 1) + " to " +
                               std::to_string(kAugmentWholeNumbers + kAugmentOps) + ", got " +
                               std::to_string(code) + ".");
    const auto kind = AugmentOp(int32_t(plain));
    if (channels != 3 && kind != AugmentOp::kBrightness && kind != AugmentOp::kContrast) continue;
    if (kind == AugmentOp::kContrast) chain.contrasts.push_back(int32_t(chain.colors.size()));
    chain.colors.push_back({kind, whole && bytes, pairs[2 * i + 1]});
  }
  return chain;
}

}  // namespace bigkernel
