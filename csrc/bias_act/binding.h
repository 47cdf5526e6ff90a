// What both bindings of bias_act check.
#pragma once
#include <optional>

#include "bias_act/bias_act.h"
#include "cpu/row_view.h"

namespace bigkernel {

using OptionalTensor = std::optional<Tensor>;

// All but the pointers and strides of x, dy and y. dy: null in forward.
inline BiasActArgs bias_act_args(const char* op, const Tensor& x, const OptionalTensor& bias,
                                 int64_t activation, const Tensor* dy = nullptr) {
  check_activation(op, activation);
  BK_CHECK(x.dim() >= 1, op, "x must have at least one dimension");
  BiasActArgs a{};
  a.type = float_type(x, op, "x");
  a.activation = activation;
  a.dim = x.size(x.dim() - 1);
  if (bias.has_value()) {
    BK_CHECK(bias->dim() == 1 && bias->size(0) == a.dim && bias->is_contiguous() &&
                 bias->scalar_type() == ScalarType::Float &&
                 bias->get_device_index() == x.get_device_index(),
             op, "bias must be fp32 [", a.dim, "], contiguous, on x's device");
    a.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  if (dy != nullptr)
    BK_CHECK(dy->scalar_type() == x.scalar_type() && same_shape(*dy, x), op,
             "dy must have the shape and dtype of bias_act_fwd's result");
  return a;
}

}  // namespace bigkernel
