// The op's arguments as torch passes them, checked and turned into what the kernels take. Shared by
// the CPU and the CUDA binding.
#pragma once
#include <iterator>
#include <optional>
#include <vector>

#include "augment/augment.h"
#include "augment/tables.h"
#include "common/box.h"
#include "common/checks.h"
#include "common/tensors.h"
#include "cpu/results.h"

namespace bigkernel {

constexpr const char* kAugmentName = "augment";

inline DType augment_out_dtype(int64_t code) {
  BK_CHECK(code >= 0 && code < int64_t(std::size(kAugmentDTypes)), kAugmentName,
           "out_dtype must be float32, bfloat16, float16 or uint8 for the native kernel");
  return kAugmentDTypes[code];
}

inline ScalarType scalar_type_of(DType type) {
  return type == DType::kFloat32    ? ScalarType::Float
         : type == DType::kBFloat16 ? ScalarType::BFloat16
         : type == DType::kFloat16  ? ScalarType::Half
                                    : ScalarType::Byte;
}

// The images as the kernel sees them; keeps the copies of those that had to be made contiguous.
// The CPU's kernels know two layouts and 32-bit indices, the GPU's any strides.
class AugmentBatch {
 public:
  AugmentBatch(const std::vector<Tensor>& images, int64_t n, int64_t channels, bool channels_last,
               bool cuda)
      : cuda_(cuda) {
    const bool stacked = images.size() == 1 && images[0].dim() == 4;
    BK_CHECK(stacked ? images[0].size(0) == n : int64_t(images.size()) == n, kAugmentName,
             "geometry must have a row for each image");
    kept_.reserve(images.size());
    for (const Tensor& given : images) add(given, stacked, channels, channels_last);
  }

  const AugmentImage& operator[](int64_t i) const { return views_[i]; }
  const std::vector<AugmentImage>& views() const { return views_; }
  DType dtype() const { return dtype_; }

 private:
  static constexpr int64_t kLargestOnCpu = int64_t{1} << 30;  // gathers index with 32 bits

  void add(const Tensor& given, bool stacked, int64_t channels, bool channels_last) {
    const int64_t first = stacked ? 1 : 0;
    BK_CHECK((cuda_ ? given.is_cuda() : given.is_cpu()) && given.dim() == first + 3, kAugmentName,
             "images must be one batch of rank 4 or images of rank 3, on ",
             cuda_ ? "the GPU" : "the CPU");
    BK_CHECK(kept_.empty() || given.get_device_index() == kept_[0].get_device_index(), kAugmentName,
             "images must be on one device");
    const DType dtype = dtype_of(given, kAugmentName, "images");
    BK_CHECK(dtype != DType::kBool && (kept_.empty() || dtype == dtype_), kAugmentName,
             "images must have one dtype: uint8, float32, bfloat16 or float16");
    dtype_ = dtype;
    const int64_t c = channels_last ? first + 2 : first, y = channels_last ? first : first + 1;
    BK_CHECK(given.size(c) == channels, kAugmentName, "images must have ", channels,
             " channels, as fill does, got ", given.size(c));
    const auto fits = [&](const Tensor& t) {
      if (cuda_ || t.numel() == 0) return true;
      const bool planes = t.stride(y + 1) == 1 || t.size(y + 1) == 1;
      const bool interleaved = t.stride(c) == 1 && t.stride(y + 1) == channels;
      return planes || interleaved;
    };
    kept_.push_back(fits(given) ? given : without_gaps(given));
    const Tensor& t = kept_.back();
    AugmentImage view{t.const_data_ptr(), t.size(y), t.size(y + 1), t.stride(c), t.stride(y),
                      t.stride(y + 1),    0};
    if (!cuda_) {
      const bool interleaved = channels > 1 && view.stride_c == 1 && view.stride_x == channels;
      if (!interleaved) view.stride_x = 1;  // or of a single column, never stepped over
      view.readable = (view.height - 1) * view.stride_y + (view.width - 1) * view.stride_x + 1 +
                      (interleaved ? channels - 1 : 0);
      BK_CHECK(view.readable < kLargestOnCpu, kAugmentName,
               "an image must have fewer than 2^30 elements");
    }
    for (int64_t i = 0; i < (stacked ? t.size(0) : 1); ++i) {
      views_.push_back(view);
      if (stacked)
        views_.back().data =
            static_cast<const char*>(view.data) + i * t.stride(0) * int64_t(t.element_size());
    }
  }

  bool cuda_;
  std::vector<Tensor> kept_;
  std::vector<AugmentImage> views_;
  DType dtype_ = DType::kUInt8;
};

// A call of the op: everything checked, the tables contiguous on the CPU, the output allocated, on
// the device of `like`.
struct AugmentCall {
  AugmentCall(const std::vector<Tensor>& images, const Tensor& geometry_, const Tensor& color_,
              const Tensor& fill_, const std::optional<Tensor>& mean,
              const std::optional<Tensor>& std_, int64_t out_h, int64_t out_w,
              bool channels_last_in, bool channels_last_out, int64_t interpolation, bool antialias_,
              double in_scale, int64_t out_dtype, const Tensor& like)
      : antialias(antialias_) {
    BK_CHECK(geometry_.is_cpu() && geometry_.scalar_type() == ScalarType::Double &&
                 geometry_.dim() == 2 && geometry_.size(1) == kAugmentColumns,
             kAugmentName, "geometry must be float64 [N, ", kAugmentColumns, "] on the CPU");
    const int64_t n = geometry_.size(0);
    BK_CHECK(color_.is_cpu() && color_.scalar_type() == ScalarType::Float && color_.dim() == 3 &&
                 color_.size(0) == n && color_.size(2) == 2,
             kAugmentName, "color must be float32 [N, K, 2] on the CPU");
    BK_CHECK(fill_.is_cpu() && fill_.scalar_type() == ScalarType::Float && fill_.dim() == 2 &&
                 (fill_.size(0) == n || fill_.size(0) == 1),
             kAugmentName, "fill must be float32 [N, C] or [1, C] on the CPU");
    const bool is_nearest = interpolation == int64_t(AugmentInterpolation::kNearest);
    BK_CHECK(is_nearest || interpolation == int64_t(AugmentInterpolation::kBilinear), kAugmentName,
             "interpolation must be 0 or 1");
    BK_CHECK(out_h >= 0 && out_w >= 0, kAugmentName, "out_h and out_w must not be negative");
    geometry = without_gaps(geometry_);
    color = without_gaps(color_);
    fill = without_gaps(fill_);

    args.channels = fill.size(1);
    batch.emplace(images, n, args.channels, channels_last_in, like.is_cuda());
    args.in_type = batch->dtype();
    args.out_type = augment_out_dtype(out_dtype);
    args.out_h = out_h;
    args.out_w = out_w;
    args.nearest = is_nearest;
    args.channels_last_out = channels_last_out;
    args.bound = args.in_type == DType::kUInt8 ? 255.0f : 1.0f;
    gain = channel_values(std_, 1.0f, "std");
    offset = channel_values(mean, 0.0f, "mean");
    for (int64_t c = 0; c < args.channels; ++c) {
      offset[c] = float(-double(offset[c]) / double(gain[c]));
      gain[c] = float(in_scale / double(gain[c]));
    }
    args.gain = gain.data();
    args.offset = offset.data();
    std::vector<int64_t> shape = {n, args.channels, out_h, out_w};
    if (channels_last_out) shape = {n, out_h, out_w, args.channels};
    const ScalarType type = scalar_type_of(args.out_type);
    out = like.is_cpu() ? Results::empty(like, shape, type) : empty_tensor(like, shape, type);
    args.out = out.mutable_data_ptr();
  }
  AugmentCall(const AugmentCall&) = delete;  // args points into it

  int64_t samples() const { return geometry.size(0); }
  const double* geometry_row(int64_t i) const {
    return static_cast<const double*>(geometry.const_data_ptr()) + i * kAugmentColumns;
  }
  const float* fill_row(int64_t i) const {
    return static_cast<const float*>(fill.const_data_ptr()) +
           (fill.size(0) == 1 ? 0 : i * args.channels);
  }
  const float* colors() const { return static_cast<const float*>(color.const_data_ptr()); }
  AugmentChain chain(int64_t i) const {
    const int64_t k = color.size(1);
    return read_chain(colors() + i * k * 2, k, args.channels, args.in_type == DType::kUInt8);
  }

  AugmentArgs args{};
  std::optional<AugmentBatch> batch;
  bool antialias;
  Tensor geometry, color, fill, out;
  std::vector<float> gain, offset;

 private:
  std::vector<float> channel_values(const std::optional<Tensor>& t, float missing,
                                    const char* name) const {
    if (!t.has_value()) return std::vector<float>(args.channels, missing);
    BK_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 1 &&
                 t->size(0) == args.channels,
             kAugmentName, name, " must be float32 of ", args.channels, " elements on the CPU");
    const Tensor dense = without_gaps(*t);
    const float* p = static_cast<const float*>(dense.const_data_ptr());
    return std::vector<float>(p, p + args.channels);
  }
};

}  // namespace bigkernel
