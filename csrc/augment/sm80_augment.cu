// Augment on the GPU: resample, recolour and normalise, each image with parameters of its own.
//   out = colour(sum_taps weight * source) * gain + offset
//
// One launch, augment_sample_kernel, makes the whole batch: any source layout, ragged sizes, all
// maps and colours. Contrast needs the mean grey of its image, so images with one stop there; their
// pixels wait in the output (in fp32 beside it, where its type would round them) for
// augment_finish_kernel, which does not look at the source again.
//
// A block takes tiles of kTile consecutive pixels of one image's output (kTile elements, where
// there are not three channels), a pixel a thread at a time. Results go to shared memory in the
// output's type, 3 * (16 + 4 * kTile) = 12 KiB, and from there in 16-byte stores, whatever the
// layout. The sums for the means are whole numbers, so they are exact and in any order the same: of
// grey itself in whole-number mode, else of its multiples of 2^-24 (of 2^-16 for uint8 sources).
// Beyond 2^53 of these they round, in an order that is fixed too.
#include "augment/cuda.h"
#include "augment/cuda_color.h"
#include "augment/cuda_sample.h"
#include "cuda/launch.h"
#include "cuda/reduce.h"

namespace bigkernel {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = kAugmentTile;
constexpr int kSegment = 4 * kTile + 16;

struct DeviceCall {
  const AugmentSample* samples;  // [n]
  const AugmentColor* colors;
  const float* fill;          // [n or 1, channels]
  const float* gain;          // [2, channels]: gain, offset
  const int32_t* which;       // images of this launch; null: all
  const double* sums_before;  // [images with a contrast, blocks], from the launch before
  double* sums;               // the same, of this launch
  void* out;                  // [n, channels, h, w] or [n, h, w, channels]
  int64_t channels, fill_stride;
  uint32_t out_w, out_h, blocks;
  DType out_type;
  int32_t pass;
  float bound;
  double quanta;  // a grey of 1 in the sums, but in whole-number mode
  bool nearest, channels_last;
};

// Where the tile's unit lies: pixel (x, y), and its channel where a unit is one element.
struct Place {
  uint32_t x, y, c;
};

template <int kChannels>
__device__ Place place_of(const DeviceCall& call, uint32_t unit) {
  const uint32_t w = call.out_w;
  if (kChannels == 3) return {unit % w, unit / w, 0};
  if (call.channels_last) {
    const uint32_t pixel = unit / uint32_t(call.channels);
    return {pixel % w, pixel / w, unit - pixel * uint32_t(call.channels)};
  }
  const uint32_t line = unit / w;
  return {unit - line * w, line % call.out_h, line / call.out_h};
}

__device__ float read_element(const void* p, DType type, int64_t i) {
  switch (type) {
    case DType::kFloat32:
      return static_cast<const float*>(p)[i];
    case DType::kBFloat16:
      return widen(static_cast<const bf16*>(p)[i]);
    case DType::kFloat16:
      return widen(static_cast<const fp16*>(p)[i]);
    default:
      return widen(static_cast<const uint8_t*>(p)[i]);
  }
}

__device__ void write_element(void* p, DType type, int i, float v) {
  switch (type) {
    case DType::kFloat32:
      static_cast<float*>(p)[i] = v;
      return;
    case DType::kBFloat16:
      static_cast<bf16*>(p)[i] = narrow<bf16>(v);
      return;
    case DType::kFloat16:
      static_cast<fp16*>(p)[i] = narrow<fp16>(v);
      return;
    default:  // NaN: 0
      static_cast<uint8_t*>(p)[i] = uint8_t(__float2uint_rn(fminf(fmaxf(v, 0.0f), 255.0f)));
  }
}

__device__ int misalignment(const void* p) { return int(reinterpret_cast<uintptr_t>(p) % 16); }

// bytes of `from` to `to`, which are equally far from 16-byte boundaries.
__device__ void copy_out(const unsigned char* from, unsigned char* to, int bytes, int size) {
  const int head = min((16 - misalignment(to)) % 16, bytes), tail = (bytes - head) % 16;
  for (int i = head + 16 * threadIdx.x; i + 16 <= bytes; i += 16 * kThreads)
    *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
  const int edge = threadIdx.x * size;
  if (edge >= head + tail) return;
  const int i = edge < head ? edge : bytes - tail + (edge - head);
  if (size == 4)
    *reinterpret_cast<uint32_t*>(to + i) = *reinterpret_cast<const uint32_t*>(from + i);
  else if (size == 2)
    *reinterpret_cast<uint16_t*>(to + i) = *reinterpret_cast<const uint16_t*>(from + i);
  else
    to[i] = from[i];
}

// The colours of one launch: from contrast number `pass` (0: the beginning) up to the next one.
struct Stretch {
  const AugmentColor* colors;
  int32_t first, last, count;
  __device__ Stretch(const AugmentColor* all, int32_t n, int32_t pass)
      : colors(all), first(0), last(n), count(n) {
    for (int32_t k = 0, contrasts = 0; k < n; ++k) {
      if (colors[k].op != AugmentOp::kContrast) continue;
      if (++contrasts == pass) first = k;
      if (contrasts == pass + 1) {
        last = k;
        return;
      }
    }
  }
  __device__ bool stops() const { return last < count; }
};

template <class In, int kChannels, bool kSampling>
__device__ void augment_tiles(const DeviceCall& call) {
  __shared__ alignas(16) unsigned char stage[kChannels * kSegment];
  const uint32_t number = blockIdx.x / call.blocks, block = blockIdx.x % call.blocks;
  const int32_t image = kSampling ? int32_t(number) : call.which[number];
  const AugmentSample& sample = call.samples[image];
  const int64_t plane = int64_t(call.out_w) * call.out_h, elements = call.channels * plane;
  const uint32_t units = uint32_t(kChannels == 3 ? plane : elements);
  const Stretch stretch(call.colors + sample.first_color, sample.color_count, call.pass);
  const bool stops = stretch.stops(), whole = stops && stretch.colors[stretch.last].whole;
  const float* fill = call.fill + image * call.fill_stride;

  const int size = call.out_type == DType::kFloat32 ? 4 : call.out_type == DType::kUInt8 ? 1 : 2;
  unsigned char* const out = static_cast<unsigned char*>(call.out) + image * elements * size;
  const bool beside = !sample.held_out;
  const void* held = beside ? static_cast<const void*>(sample.held) : out;
  const DType held_type = beside ? DType::kFloat32 : call.out_type;
  const DType to_type = stops ? held_type : call.out_type;
  const int to_size = stops && beside ? 4 : size;
  unsigned char* const to = stops && beside ? reinterpret_cast<unsigned char*>(sample.held) : out;

  float mean = 0;
  if constexpr (!kSampling) {
    const double* sums = call.sums_before + int64_t(sample.sums) * call.blocks;
    double sum = 0;
    for (uint32_t i = threadIdx.x; i < call.blocks; i += kThreads) sum += sums[i];
    const double one = stretch.colors[stretch.first].whole ? 1.0 : call.quanta;
    mean = float(block_sum<kThreads>(sum) / (one * double(units)));
  }

  double greys = 0;
  for (uint32_t first = block * kTile; first < units; first += call.blocks * kTile) {
    const int count = int(min(units - first, uint32_t(kTile)));
    // Segment c holds what goes to one contiguous piece of the output.
    const bool planes = kChannels == 3 && !call.channels_last;
    const int segments = planes ? 3 : 1, each = kChannels == 3 && !planes ? 3 : 1;
    const int64_t step = planes ? plane * to_size : 0;  // bytes between the segments
    unsigned char* const target = to + int64_t(first) * each * to_size;
    for (int unit = threadIdx.x; unit < count; unit += kThreads) {
      float v[kChannels];
      const Place at = place_of<kChannels>(call, first + unit);
      if constexpr (kSampling) {
        sample_pixel<In>(sample, fill + at.c, call.nearest, call.out_w, call.out_h, at.x, at.y,
                         at.c, v);
      } else {
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
          v[c] = read_element(held, held_type,
                              planes ? c * plane + first + unit : (first + unit) * kChannels + c);
      }
      for (int32_t k = stretch.first; k < stretch.last; ++k)
        recolor(v, stretch.colors[k], call.bound, mean);
      if (stops) {
        const float grey = grey_for_mean(v, whole);
        greys += whole ? double(grey) : rint(double(grey) * call.quanta);
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const uint32_t channel = kChannels == 3 ? c : at.c;
        if (stops)
          v[c] = beside || !whole ? v[c] : to_byte(v[c]);
        else
          v[c] = fmaf(v[c], call.gain[channel], call.gain[call.channels + channel]);
        unsigned char* segment = stage + (planes ? c * kSegment : 0);
        write_element(segment + misalignment(target + (planes ? c * step : 0)), to_type,
                      planes || kChannels == 1 ? unit : 3 * unit + c, v[c]);
      }
    }
    __syncthreads();
    for (int s = 0; s < segments; ++s)
      copy_out(stage + s * kSegment + misalignment(target + s * step), target + s * step,
               count * each * to_size, to_size);
    __syncthreads();
  }
  if (stops) {
    greys = block_sum<kThreads>(greys);
    if (threadIdx.x == 0) call.sums[int64_t(sample.sums) * call.blocks + block] = greys;
  }
}

// Three blocks: 80 registers, for ptxas spills some to reach 64.
template <class In, int kChannels>
__global__ void __launch_bounds__(kThreads, 3)
    augment_sample_kernel(const __grid_constant__ DeviceCall call) {
  augment_tiles<In, kChannels, true>(call);
}

template <int kChannels>
__global__ void __launch_bounds__(kThreads)
    augment_finish_kernel(const __grid_constant__ DeviceCall call) {
  augment_tiles<float, kChannels, false>(call);
}

template <class F>
void with_source(DType type, const F& f) {
  if (type == DType::kUInt8) return f(uint8_t{});
  with_type(type, f);
}

}  // namespace

void launch_augment(const AugmentInput& input, const AugmentLaunch& launch, const void* tables,
                    void* scratch, int device, void* stream) {
  const AugmentArgs& args = input.args;
  if (input.n * args.channels * args.out_h * args.out_w == 0) return;
  use_device(device);
  const char* base = static_cast<const char*>(tables);
  DeviceCall call{};
  call.samples = reinterpret_cast<const AugmentSample*>(base + launch.samples_at);
  call.colors = reinterpret_cast<const AugmentColor*>(base + launch.colors_at);
  call.fill = reinterpret_cast<const float*>(base + launch.fill_at);
  call.gain = reinterpret_cast<const float*>(base + launch.gain_at);
  call.out = args.out;
  call.channels = args.channels;
  call.fill_stride = input.fill_rows == 1 ? 0 : args.channels;
  call.out_w = uint32_t(args.out_w);
  call.out_h = uint32_t(args.out_h);
  call.blocks = launch.blocks;
  call.out_type = args.out_type;
  call.bound = args.bound;
  call.quanta = args.in_type == DType::kUInt8 ? 0x1p16 : 0x1p24;
  call.nearest = args.nearest;
  call.channels_last = args.channels_last_out;
  const auto sums_of = [&](size_t pass) {
    return reinterpret_cast<double*>(static_cast<char*>(scratch) + pass % 2 * launch.sums_bytes);
  };
  const uint32_t all = uint32_t(input.n) * launch.blocks;
  call.sums = sums_of(0);
  with_source(args.in_type, [&](auto in) {
    using In = decltype(in);
    const auto kernel =
        args.channels == 3 ? augment_sample_kernel<In, 3> : augment_sample_kernel<In, 1>;
    launch_kernel("augment_sample_kernel", kernel, all, kThreads, 0, stream, call);
  });
  const int32_t* which = reinterpret_cast<const int32_t*>(base + launch.later_at);
  const auto finish = args.channels == 3 ? augment_finish_kernel<3> : augment_finish_kernel<1>;
  for (size_t pass = 1; pass <= launch.later.size(); ++pass) {
    const auto& images = launch.later[pass - 1];
    const uint32_t grid = uint32_t(images.size()) * launch.blocks;
    call.which = which;
    call.pass = int32_t(pass);
    call.sums_before = sums_of(pass - 1);
    call.sums = sums_of(pass);
    launch_kernel("augment_finish_kernel", finish, grid, kThreads, 0, stream, call);
    which += images.size();
  }
}

}  // namespace bigkernel
