// Tensors that an op allocates. torch::stable's functions look for their operator by its name and
// go through the dispatcher, several times in a call of two microseconds. Binding code only.
#pragma once
#include <algorithm>
#include <optional>
#include <vector>

#include "common/checks.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has the one that does not say why
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace bigkernel {

// Uninitialised, on the device of `like`, and of its dtype if none is given.
inline Tensor empty_tensor(const Tensor& like, const std::vector<int64_t>& sizes,
                           const std::vector<int64_t>& strides,
                           std::optional<ScalarType> type = std::nullopt) {
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const ScalarType wanted = type.has_value() ? *type : like.scalar_type();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(wanted)), device_type,
      device_index, &handle));
  return Tensor(handle);
}

// The same without gaps.
inline Tensor empty_tensor(const Tensor& like, const std::vector<int64_t>& sizes,
                           std::optional<ScalarType> type = std::nullopt) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return empty_tensor(like, sizes, strides, type);
}

inline Tensor without_gaps(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace bigkernel
