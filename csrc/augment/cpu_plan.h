// What one sample needs before its pixels: boxes cut to size, the choice of path, tap tables in
// double precision, the colour chain. Baseline code, compiled once.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "augment/augment.h"
#include "augment/tables.h"

namespace bigkernel {

class AugmentPlanner {
 public:
  // The plan's pointers stay valid until the next call.
  const AugmentPlan& plan(const AugmentArgs& args, const AugmentImage& image, const double* row,
                          const float* fill, bool antialias, std::vector<AugmentColor>&& colors) {
    AugmentPlan& p = plan_ = AugmentPlan{};
    static_cast<AugmentGeometry&>(p) = read_geometry(row, image.width, image.height, args.out_w,
                                                     args.out_h, antialias && !args.nearest);
    colors_ = std::move(colors);
    p.colors = colors_.data();
    p.color_count = int32_t(colors_.size());
    p.image = image;
    p.fill = fill;
    p.path = AugmentPath::kEmpty;
    if (p.empty) return p;

    p.path = AugmentPath::kMap;
    // Worth it where output pixels look at most of the box.
    const int64_t area = int64_t(p.box[2] - p.box[0]) * (p.box[3] - p.box[1]);
    p.packed = args.in_type == DType::kUInt8 && args.channels == 3 && !args.nearest &&
               2 * std::max(p.reach_x, p.reach_y) + 1 <= kAugmentPackedTaps &&
               double(area) <= 4 * p.reach_x * p.reach_y * double(args.out_h * args.out_w);
    // Clamped along one axis and renormalised along the other: the general sampler's.
    if (p.border == AugmentBorder::kClamp && (p.reach_x == 1.0) != (p.reach_y == 1.0))
      p.packed = false;
    for (const int i : {0, 1, 3, 4}) p.packed = p.packed && std::abs(p.map[i]) < kAugmentFar;
    if (p.map[1] != 0 || p.map[3] != 0 || (args.nearest && p.rule == AugmentNearest::kWarp))
      return p;

    const int64_t w = args.out_w, h = args.out_h;
    const double most = taps(p.reach_x, p.box[2] - p.box[0]);
    if (most * double(w) > kLargestTable) return p;
    if (taps(p.reach_y, p.box[3] - p.box[1]) * double(h) > kLargestTable) return p;
    columns_.build(args.nearest, p.rule, p.border, p.map[0], p.map[2], p.origin_x, p.reach_x,
                   p.box[0], p.box[2], p.out_box[0], p.out_box[2], w, true);
    int32_t first = p.box[2], last = p.box[0];
    for (int64_t x = 0; x < w; ++x) {
      if (columns_.count[x] == 0) continue;
      first = std::min(first, columns_.start[x]);
      last = std::max(last, columns_.start[x] + columns_.count[x]);
    }
    p.first_column = first;
    p.used_columns = std::max(last - first, 0);
    // Combining whole rows is wasted where few of their columns are looked at.
    const bool sparse = p.used_columns > 3 * w + 64 && p.reach_x == 1.0 && p.reach_y == 1.0;
    if (sparse && !(args.nearest && p.rule == AugmentNearest::kResize)) return p;
    columns_.close_gaps(first);
    p.packed = false;
    rows_.build(args.nearest, p.rule, p.border, p.map[4], p.map[5], p.origin_y, p.reach_y, p.box[1],
                p.box[3], p.out_box[1], p.out_box[3], h, false);
    p.columns = columns_.taps();
    p.rows = rows_.taps();
    p.columns_first = columns_first(p, args);
    p.covered = columns_.covered(w) && rows_.covered(h);
    p.path = AugmentPath::kLines;
    return p;
  }

 private:
  static constexpr double kLargestTable = 1 << 24;

  // Vectors of multiply-adds either way.
  static bool columns_first(const AugmentPlan& p, const AugmentArgs& args) {
    if (p.rows.most > kAugmentKeptRows) return false;
    int32_t first = p.box[3], last = p.box[1];
    for (int64_t y = 0; y < args.out_h; ++y) {
      if (p.rows.count[y] == 0) continue;
      first = std::min(first, p.rows.start[y]);
      last = std::max(last, p.rows.start[y] + p.rows.count[y]);
    }
    const double w = double(args.out_w), h = double(args.out_h), used = double(p.used_columns);
    const double along_x = double(p.columns.most) * w;
    return double(last - first) * (along_x + used) + double(p.rows.most) * h * w <
           h * (along_x + double(p.rows.most) * used);
  }

  static double taps(double reach, int64_t side) {
    return reach == 1.0 ? 2.0 : std::min(std::floor(2 * reach) + 1, double(side));
  }

  struct Table {
    std::vector<int32_t> start, count;
    std::vector<float> weight, cover;
    int64_t most = 0, stride = 0;
    std::vector<double> all;  // weights of one output pixel

    AugmentTaps taps() const {
      return {start.data(), count.data(), weight.data(), cover.data(), most, stride};
    }
    bool covered(int64_t size) const {
      for (int64_t i = 0; i < size; ++i)
        if (cover[i] != 1.0f) return false;
      return true;
    }

    // Starts count from `first`; where there is no tap they repeat their neighbour's, so that a
    // vector of them spans no more than it must.
    void close_gaps(int32_t first) {
      int32_t last = 0;
      for (size_t x = 0; x < start.size(); ++x)
        if (count[x] != 0) {
          last = start[x] - first;
          break;
        }
      for (size_t x = 0; x < start.size(); ++x)
        start[x] = last = count[x] != 0 ? start[x] - first : last;
    }

    // Output pixels from..to of `size` take source pixels begin..end at step * (i + .5) + shift.
    void build(bool nearest, AugmentNearest rule, AugmentBorder border, double step, double shift,
               double origin, double reach, int32_t begin, int32_t end, int32_t from, int32_t to,
               int64_t size, bool transposed) {
      const int64_t padded = augment_pitch(size);
      const int64_t room = nearest ? 1 : int64_t(AugmentPlanner::taps(reach, end - begin));
      start.assign(padded, 0);
      count.assign(padded, 0);
      cover.assign(padded, 0.0f);
      weight.assign(padded * room, 0.0f);
      stride = transposed ? padded : room;
      most = 1;
      const auto at = [&](int64_t i, int64_t t) -> float& {
        return weight[transposed ? t * stride + i : i * stride + t];
      };
      for (int64_t i = from; i < to; ++i) {
        const double s = step * (double(i) + 0.5) + shift;
        if (!(std::abs(s) <= kAugmentFar)) continue;
        if (nearest) {
          int64_t index = pick(rule, s, step, origin);
          if (border == AugmentBorder::kClamp) index = std::clamp<int64_t>(index, begin, end - 1);
          if (index < begin || index >= end) continue;
          start[i] = int32_t(index);
          count[i] = 1;
          cover[i] = at(i, 0) = 1.0f;
          continue;
        }
        double total = 0, inside = 0;
        int64_t first = weigh(border, s, reach, begin, end, total, inside);
        // Zero weights at the ends are no taps: what lies there is never read.
        size_t low = 0, high = all.size();
        while (low < high && all[low] == 0) ++low;
        while (high > low && all[high - 1] == 0) --high;
        if (low == high) continue;
        start[i] = int32_t(first + int64_t(low));
        count[i] = int32_t(high - low);
        most = std::max<int64_t>(most, count[i]);
        for (size_t t = low; t < high; ++t) at(i, int64_t(t - low)) = float(all[t] / total);
        cover[i] = inside == total ? 1.0f : float(inside / total);
      }
    }

    static int64_t pick(AugmentNearest rule, double s, double step, double origin) {
      const double scale = std::abs(step);
      if (rule == AugmentNearest::kResize && scale >= 1 / kAugmentFar && scale <= kAugmentFar &&
          std::abs(origin) <= kAugmentFar) {
        const float k = float(std::nearbyint((s - origin) / scale - 0.5));
        // Rounded to fp32 before the floor, as interpolate(mode="nearest") does.
        const float product = k * float(scale);
        return int64_t(std::floor(product)) + int64_t(origin);
      }
      // Ties of exact arithmetic are to be ties: see _nearest in
      // bigkernel/ops/augment/reference.py.
      if (rule == AugmentNearest::kEven)
        return int64_t(std::nearbyint(std::nearbyint((s - 0.5) * 65536) / 65536));
      return int64_t(std::floor(std::nearbyint(s * 65536) / 65536));
    }

    // Fills `all` with the weights of consecutive pixels and returns the first of them. `total`
    // is what the weights are to be divided by, `inside` their sum.
    int64_t weigh(AugmentBorder border, double s, double reach, int64_t begin, int64_t end,
                  double& total, double& inside) {
      all.clear();
      if (reach == 1.0 && border == AugmentBorder::kClamp) {
        const int64_t index = int64_t(std::floor(s - 0.5));
        const int64_t left = std::clamp<int64_t>(index, begin, end - 1);
        const double right_weight = s - 0.5 - double(index);
        const bool merged = left == std::clamp<int64_t>(index + 1, begin, end - 1);
        all.push_back(merged ? 1.0 : 1.0 - right_weight);
        if (!merged) all.push_back(right_weight);
        total = inside = 1.0;
        return left;
      }
      int64_t first = int64_t(std::floor(s - 0.5 - reach)) + 1;
      const int64_t last = int64_t(std::ceil(s - 0.5 + reach)) - 1;
      const int64_t kept = std::clamp<int64_t>(first, begin, end);
      for (int64_t i = kept; i <= std::min(last, end - 1); ++i) {
        all.push_back(triangle(i, s, reach));
        inside += all.back();
      }
      if (border == AugmentBorder::kClamp) {
        total = inside;
      } else {
        total = 0;
        for (int64_t i = first; i <= last; ++i) total += triangle(i, s, reach);
      }
      return kept;
    }

    static double triangle(int64_t i, double s, double reach) {
      return std::max(0.0, 1.0 - std::abs(double(i) + 0.5 - s) / reach);
    }
  };

  AugmentPlan plan_;
  std::vector<AugmentColor> colors_;
  Table columns_, rows_;
};

}  // namespace bigkernel
