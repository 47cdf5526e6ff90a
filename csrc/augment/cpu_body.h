// The life of one output line: sample, recolour, then normalise, convert and store. See augment.h.
#include "augment/augment.h"
#include "augment/cpu_map.h"
#include "augment/cpu_lines.h"
#include "augment/cpu_color.h"

namespace bigkernel::BK_ISA {

template <class T>
BK_INLINE void store_pixels(T* p, VecF v) {
  store<T>(p, v);
}
template <>
BK_INLINE void store_pixels(uint8_t* p, VecF v) {
  store_bytes(p, to_byte(v == v ? v : VecF{}));
}
#if defined(BK_ISA_AVX512_BF16)
template <>
BK_INLINE void store_pixels(bf16* p, VecF v) {
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &h, sizeof h);
}
#endif

template <class T>
inline void finish_plane(const float* from, float gain, float offset, int64_t n, T* to,
                         bool past_caches) {
  int64_t x = 0;
  if constexpr (std::is_same_v<T, float>) {
    if (past_caches && reinterpret_cast<uintptr_t>(to) % sizeof(VecF) == 0)
      for (; x + kLanes <= n; x += kLanes) stream(to + x, load(from + x) * gain + offset);
  }
  for (; x + kLanes <= n; x += kLanes) store_pixels(to + x, load(from + x) * gain + offset);
  if (x == n) return;
  T last[kLanes];
  store_pixels(last, load(from + x) * gain + offset);
  for (int64_t i = 0; x + i < n; ++i) to[x + i] = last[i];
}

template <class T>
inline void finish_rgb(const Line& line, const AugmentArgs& args, T* to) {
  const float *red = line.p, *green = red + line.pitch, *blue = green + line.pitch;
  for (int64_t x = 0; x < line.width; x += kLanes) {
    VecF mixed[3];
    interleave(load(red + x) * args.gain[0] + args.offset[0],
               load(green + x) * args.gain[1] + args.offset[1],
               load(blue + x) * args.gain[2] + args.offset[2], mixed,
               std::make_index_sequence<kLanes>());
    const int64_t rest = 3 * (line.width - x);
    if (rest >= 3 * kLanes) {
      for (int i = 0; i < 3; ++i) store_pixels(to + 3 * x + i * kLanes, mixed[i]);
    } else {
      T last[3 * kLanes];
      for (int i = 0; i < 3; ++i) store_pixels(last + i * kLanes, mixed[i]);
      for (int64_t i = 0; i < rest; ++i) to[3 * x + i] = last[i];
    }
  }
}

template <class T>
inline void finish_line(const AugmentTask& task, const Line& line, int64_t y, void* converted) {
  const AugmentArgs& args = *task.args;
  T* out = static_cast<T*>(args.out);
  const int64_t w = args.out_w, channels = args.channels;
  if (!args.channels_last_out) {
    for (int64_t c = 0; c < channels; ++c)
      finish_plane(line.p + c * line.pitch, args.gain[c], args.offset[c], w,
                   out + ((task.sample * channels + c) * args.out_h + y) * w, task.stream);
    return;
  }
  T* row = out + (task.sample * args.out_h + y) * w * channels;
  if (channels == 3) return finish_rgb(line, args, row);
  T* spare = static_cast<T*>(converted);
  for (int64_t c = 0; c < channels; ++c) {
    finish_plane(line.p + c * line.pitch, args.gain[c], args.offset[c], w, spare, false);
    for (int64_t x = 0; x < w; ++x) row[x * channels + c] = spare[x];
  }
}

inline void fill_span(float* p, int64_t from, int64_t to, float value) {
  for (int64_t x = from; x < to; ++x) p[x] = value;
}

// Pixels of type T.
template <class T>
inline void walk_lines(const AugmentTask& task) {
  const AugmentArgs& args = *task.args;
  const AugmentPlan& plan = *task.plan;
  const int64_t pitch = augment_pitch(args.out_w), channels = args.channels;
  float* converted = task.scratch + channels * pitch;
  float* sampling = converted + channels * pitch;
  const Line line{task.scratch, channels, pitch, args.out_w, args.bound};
  uint32_t* words = reinterpret_cast<uint32_t*>(sampling);
  const PackedSampler packed(plan, words, line.p, pitch);
  const MapSampler<T> by_map{plan,       static_cast<const T*>(plan.image.data),
                             channels,   args.out_w,
                             args.out_h, line.p,
                             pitch,      packed};
  LineSampler<T> by_lines(plan, channels, args.out_w, line.p, pitch, sampling);
  const bool lines = plan.path == AugmentPath::kLines;
  if (task.sampling && plan.packed) packed.pack(task.begin, task.end);

  const AugmentColor *first = plan.colors + task.first_color, *last = plan.colors + task.last_color;
  const bool held_bytes = !task.sampling && first->whole;
  const bool hold_bytes = task.storing && last->whole;
  const int64_t plane = args.out_h * pitch;
  const auto held_line = [&](int64_t y, bool bytes) {
    return static_cast<char*>(task.held) + y * pitch * int64_t(bytes ? 1 : sizeof(float));
  };
  for (int64_t y = task.begin; y < task.end; ++y) {
    if (held_bytes) {
      load_held<uint8_t>(line, held_line(y, true), plane);
    } else if (!task.sampling) {
      load_held<float>(line, held_line(y, false), plane);
    } else if (plan.path == AugmentPath::kEmpty || y < plan.out_box[1] || y >= plan.out_box[3] ||
               (lines && plan.rows.count[y] == 0)) {
      for (int64_t c = 0; c < channels; ++c)
        fill_span(line.p + c * pitch, 0, line.width, plan.fill[c]);
    } else if (lines) {
      by_lines.line(y);
    } else {
      by_map.line(y, args.nearest);
      for (int64_t c = 0; c < channels; ++c) {
        fill_span(line.p + c * pitch, 0, plan.out_box[0], plan.fill[c]);
        fill_span(line.p + c * pitch, plan.out_box[2], line.width, plan.fill[c]);
      }
    }
    recolor_line(line, first, last, task.mean_grey, held_bytes);
    if (hold_bytes) {
      task.line_sums[y] = hold_line<true>(line, held_line(y, true), plane);
    } else if (task.storing) {
      task.line_sums[y] = hold_line<false>(line, held_line(y, false), plane);
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

void augment_lines(const AugmentTask& task) {
  const int64_t size =
      augment_scratch_size(*task.args, *task.plan) - augment_packed_size(*task.plan);
  for (int64_t i = 0; i < size; ++i) task.scratch[i] = 0;  // padding lanes hold plain numbers
  const DType type = task.args->in_type;
  if (type == DType::kUInt8)
    walk_lines<uint8_t>(task);
  else if (type == DType::kFloat32)
    walk_lines<float>(task);
  else if (type == DType::kBFloat16)
    walk_lines<bf16>(task);
  else
    walk_lines<fp16>(task);
  if (task.stream) stream_fence();
}

}  // namespace bigkernel::BK_ISA
