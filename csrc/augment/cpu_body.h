// The life of one output line: sample, recolour, then normalise, convert and store. See augment.h.
#include "augment/augment.h"
#include "augment/cpu_texels.h"
#include "augment/cpu_packed.h"
#include "augment/cpu_map.h"
#include "augment/cpu_lines.h"
#include "augment/cpu_color.h"

namespace bigkernel::BK_ISA {

BK_INLINE void store_pixels(uint8_t* p, VecF v) {
  v = v == v ? v : VecF{};
  const VecI whole = to_int(to_byte(v));
  for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(whole[i]);
}
template <class T>
BK_INLINE void store_pixels(T* p, VecF v) {
  store<T>(p, v);
}

template <class T>
inline void finish_line(const AugmentTask& task, const Line& line, int64_t y, void* converted) {
  const AugmentArgs& args = *task.args;
  T* out = static_cast<T*>(args.out);
  T* spare = static_cast<T*>(converted);  // [channels, pitch]
  const int64_t w = args.out_w, channels = args.channels;
  for (int64_t c = 0; c < channels; ++c) {
    const float* p = line.p + c * line.pitch;
    const float gain = args.gain[c], offset = args.offset[c];
    T* to = args.channels_last_out ? spare + c * line.pitch
                                   : out + ((task.sample * channels + c) * args.out_h + y) * w;
    int64_t x = 0;
    for (; x + kLanes <= w; x += kLanes) store_pixels(to + x, load(p + x) * gain + offset);
    if (x < w) {
      T last[kLanes];
      store_pixels(last, load(p + x) * gain + offset);
      for (int64_t i = 0; x + i < w; ++i) to[x + i] = last[i];
    }
  }
  if (!args.channels_last_out) return;
  T* row = out + (task.sample * args.out_h + y) * w * channels;
  if (channels == 3) {
    const T *red = spare, *green = spare + line.pitch, *blue = spare + 2 * line.pitch;
    for (int64_t x = 0; x < w; ++x) {
      row[3 * x] = red[x];
      row[3 * x + 1] = green[x];
      row[3 * x + 2] = blue[x];
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t x = 0; x < w; ++x) row[x * channels + c] = spare[c * line.pitch + x];
}

inline void fill_span(float* p, int64_t from, int64_t to, float value) {
  for (int64_t x = from; x < to; ++x) p[x] = value;
}

template <class T>
inline void sample_line(const AugmentTask& task, const Line& line, int64_t y, float* scratch) {
  const AugmentArgs& args = *task.args;
  const AugmentPlan& plan = *task.plan;
  const T* base = static_cast<const T*>(plan.image.data);
  const bool lines = plan.path == AugmentPath::kLines;
  if (plan.path == AugmentPath::kEmpty || y < plan.out_box[1] || y >= plan.out_box[3] ||
      (lines && plan.rows.count[y] == 0)) {
    for (int64_t c = 0; c < line.channels; ++c)
      fill_span(line.p + c * line.pitch, 0, line.width, plan.fill[c]);
    return;
  }
  if (lines) {
    LineSampler<T>{plan,   base,       line.channels, line.width,
                   line.p, line.pitch, scratch,       augment_line_pitch(plan)}
        .line(y);
    return;
  }
  const uint32_t* packed = reinterpret_cast<const uint32_t*>(scratch);
  MapSampler<T>{plan, base, line.channels, line.width, args.out_h, line.p, line.pitch, packed}.line(
      y, args.nearest);
  for (int64_t c = 0; c < line.channels; ++c) {
    float* p = line.p + c * line.pitch;
    fill_span(p, 0, plan.out_box[0], plan.fill[c]);
    fill_span(p, plan.out_box[2], line.width, plan.fill[c]);
  }
}

void augment_lines(const AugmentTask& task) {
  const AugmentArgs& args = *task.args;
  const AugmentPlan& plan = *task.plan;
  const int64_t pitch = augment_pitch(args.out_w), image = args.out_h * args.out_w;
  float* converted = task.scratch + args.channels * pitch;
  float* source = converted + args.channels * pitch;
  const int64_t size = augment_scratch_size(args, plan) - augment_packed_size(plan);
  for (int64_t i = 0; i < size; ++i) task.scratch[i] = 0;  // padding lanes hold plain numbers
  if (task.sampling && plan.packed) pack_box(plan, reinterpret_cast<uint32_t*>(source));
  const Line line{task.scratch, args.channels, pitch, args.out_w, args.bound};
  for (int64_t y = task.begin; y < task.end; ++y) {
    if (!task.sampling) {
      for (int64_t c = 0; c < args.channels; ++c)
        __builtin_memcpy(line.p + c * pitch, task.held + c * image + y * args.out_w,
                         size_t(args.out_w) * sizeof(float));
    } else if (args.in_type == DType::kUInt8) {
      sample_line<uint8_t>(task, line, y, source);
    } else if (args.in_type == DType::kFloat32) {
      sample_line<float>(task, line, y, source);
    } else if (args.in_type == DType::kBFloat16) {
      sample_line<bf16>(task, line, y, source);
    } else {
      sample_line<fp16>(task, line, y, source);
    }
    for (int32_t k = task.first_color; k < task.last_color; ++k) {
      if (plan.colors[k].whole)
        color_line<true>(line, plan.colors[k], task.mean_grey);
      else
        color_line<false>(line, plan.colors[k], task.mean_grey);
    }
    if (task.storing) {
      for (int64_t c = 0; c < args.channels; ++c)
        __builtin_memcpy(task.held + c * image + y * args.out_w, line.p + c * pitch,
                         size_t(args.out_w) * sizeof(float));
      const bool whole = plan.colors[task.last_color].whole;  // the contrast that comes next
      task.line_sums[y] = whole ? grey_sum<true>(line) : grey_sum<false>(line);
    } else if (args.out_type == DType::kUInt8) {
      finish_line<uint8_t>(task, line, y, converted);
    } else if (args.out_type == DType::kFloat32) {
      finish_line<float>(task, line, y, converted);
    } else if (args.out_type == DType::kBFloat16) {
      finish_line<bf16>(task, line, y, converted);
    } else {
      finish_line<fp16>(task, line, y, converted);
    }
  }
}

}  // namespace bigkernel::BK_ISA
