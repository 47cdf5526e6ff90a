// Resample, recolour and normalise a batch of images, each with parameters of its own:
//   out = colour(sum_taps weight * source) * gain + offset
// bigkernel/ops/augment/table.py explains the tables. The output is made line by line: sample one
// line of all channels into fp32 scratch, walk the colour chain over it, convert and store. Only
// contrast, which needs a mean over the whole image, splits the chain: the image is then held in
// fp32 at output size up to there and read back for the rest.
#pragma once
#include <cstdint>

#include "augment/codes.h"
#include "common/dtypes.h"
#include "cpu/isa.h"

namespace bigkernel {

// Widest vector of any instruction set; scratch lines are padded to it.
constexpr int64_t kAugmentPad = 16;
constexpr int64_t kAugmentPackedTaps = 8;  // widest filter over packed pixels
constexpr int64_t kAugmentKeptRows = 4;    // source rows kept where columns are sampled first

// How the lines are sampled. kLines: axis-aligned, rows are combined first and columns after, by
// the tap tables. kMap: any map, pixel by pixel through gathers. kEmpty: all fill.
enum class AugmentPath : int32_t { kEmpty, kLines, kMap };

// One of the two layouts: stride_x == 1 (planes), or stride_c == 1 and stride_x == channels.
struct AugmentImage {
  const void* data;
  int64_t height, width;
  int64_t stride_c, stride_y, stride_x;  // in elements
  int64_t readable;  // elements from the start of any one plane (interleaved: of the image)
};

// Taps along one axis of an axis-aligned map. Outside the output box, and where no tap is left,
// count and cover are 0.
struct AugmentTaps {
  const int32_t* start;  // [size] first tap; rows: in the image, columns: from the first one used
  const int32_t* count;  // [size]
  const float* weight;   // rows: [size, most], columns: [most, padded size]
  const float* cover;    // [size] how much of the filter lies inside the source box
  int64_t most;          // largest count
  int64_t stride;        // of weight's first dimension
};

struct AugmentColor {
  AugmentOp op;
  bool whole;  // in whole numbers
  float factor;
};

// One coordinate by kWarp, each operation rounded to fp32, from (x, y) relative to the middle of
// the output: (((x * by_x + y * by_y) + shift) + 1) * half - 0.5, relative to the source box.
struct AugmentWarp {
  float by_x, by_y, shift, half;
};

// One row of the geometry table, decoded (tables.h).
struct AugmentGeometry {
  bool empty;  // no output pixel comes from the source
  AugmentBorder border;
  AugmentNearest rule;
  double map[6];
  AugmentWarp warp_x, warp_y;
  bool fused;                  // kWarp: the product of y goes into the sum unrounded
  double origin_x, origin_y;   // source box before it was cut: where a resized region begins
  int32_t box[4], out_box[4];  // x0 y0 x1 y1, cut to the image and to the output
  double reach_x, reach_y;     // half-widths of the filter in source pixels
};

struct AugmentPlan : AugmentGeometry {
  AugmentPath path;
  AugmentImage image;
  AugmentTaps columns, rows;           // kLines
  int64_t first_column, used_columns;  // kLines: source columns that any output column needs
  bool columns_first;                  // kLines: the order of the axes
  bool covered;                        // kLines: no output pixel holds fill
  bool packed;                         // kMap: the box is copied to 32-bit pixels first
  const float* fill;                   // [channels]
  const AugmentColor* colors;
  int32_t color_count;
};

struct AugmentArgs {
  DType in_type, out_type;
  int64_t channels, out_h, out_w;
  bool nearest, channels_last_out;
  float bound;          // white: 255 for uint8 sources, 1 for floats
  const float* gain;    // [channels]
  const float* offset;  // [channels]
  void* out;            // [n, channels, out_h, out_w] or [n, out_h, out_w, channels]
};

// Lines begin..end of one sample, colours first_color..last_color.
struct AugmentTask {
  const AugmentArgs* args;
  const AugmentPlan* plan;
  int64_t sample, begin, end;
  int32_t first_color, last_color;
  float mean_grey;  // for a contrast at first_color
  bool sampling;    // else the lines come from `held`
  bool stream;      // fp32 results go past the caches, which they would only empty
  bool storing;     // else they go to `held`, and their grey sums to line_sums
  void* held;       // [channels, out_h, pitch] of bytes or fp32, as the contrast takes it, or null
  double* line_sums;  // [out_h]
  float* scratch;     // augment_scratch_size(...) floats
};

inline int64_t augment_pitch(int64_t size) {
  return (size + kAugmentPad - 1) / kAugmentPad * kAugmentPad + kAugmentPad;
}
// Length of one source line in scratch: tables may point a filter's width beyond its end.
inline int64_t augment_line_pitch(const AugmentPlan& plan) {
  return augment_pitch(plan.used_columns + plan.columns.most);
}
// The packed copy of the source box: rows of `pitch` words, with a frame as wide as the filter's
// taps, of which an even number is read along x.
struct AugmentFrame {
  int32_t taps_x, taps_y, left, top;
  int64_t pitch, rows;
};
inline AugmentFrame augment_frame(const AugmentPlan& plan) {
  AugmentFrame f{};
  f.taps_x = plan.reach_x == 1.0 ? 2 : int32_t(2 * plan.reach_x) + 1;
  f.taps_y = plan.reach_y == 1.0 ? 2 : int32_t(2 * plan.reach_y) + 1;
  f.left = f.taps_x + f.taps_x % 2;
  f.top = f.taps_y;
  f.pitch = plan.box[2] - plan.box[0] + 2 * int64_t(f.left);
  f.rows = plan.box[3] - plan.box[1] + 2 * int64_t(f.top);
  return f;
}
inline int64_t augment_packed_size(const AugmentPlan& plan) {
  return plan.packed ? augment_frame(plan).pitch * augment_frame(plan).rows : 0;
}
// Floats that sampling line by line needs: source lines by plane and interleaved, and kept rows.
inline int64_t augment_line_scratch(const AugmentArgs& args, const AugmentPlan& plan) {
  if (plan.path != AugmentPath::kLines) return 0;
  const int64_t kept = plan.columns_first ? kAugmentKeptRows * augment_pitch(args.out_w) : 0;
  return args.channels * (2 * augment_line_pitch(plan) + kept);
}
inline int64_t augment_scratch_size(const AugmentArgs& args, const AugmentPlan& plan) {
  // Output lines and their converted copy; then what sampling needs.
  return args.channels * 2 * augment_pitch(args.out_w) + augment_line_scratch(args, plan) +
         augment_packed_size(plan);
}

BK_DECLARE_PER_ISA(void augment_lines(const AugmentTask& task))

}  // namespace bigkernel
