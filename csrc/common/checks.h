// Checks that memory safety depends on, and the bridge from torch's dtypes. Binding code only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtypes.h"

// BK_CHECK(condition, "attention_fwd", "k must have ", n, " heads, got ", m). Torch's own macro
// puts the place in the source before the sentence, which says nothing to the caller.
#define BK_CHECK(condition, op, ...)                          \
  do {                                                        \
    if (!(condition)) [[unlikely]]                            \
      ::bigkernel::fail("bigkernel.", op, ": ", __VA_ARGS__); \
  } while (0)

namespace bigkernel {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Args>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  throw std::runtime_error(text.str());
}

inline DType dtype_of(const Tensor& t, const char* op, const char* argument) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Byte:
      return DType::kUInt8;
    case ScalarType::Bool:
      return DType::kBool;
    default:
      BK_CHECK(false, op, argument,
               " must be float32, bfloat16, float16, uint8 or bool for the native kernel");
  }
  return DType::kFloat32;
}

// A number for `with_activation` (activations.h).
inline void check_activation(const char* op, int64_t activation) {
  constexpr int64_t kActivations = 7;
  BK_CHECK(activation >= 0 && activation < kActivations, op, "activation must be 0 to ",
           kActivations - 1, ", got ", activation);
}

// Calls f with a value of the element type: with_dtype(t, "op", "q", [&](auto tag) { using T =
// decltype(tag); ... }).
template <class F>
void with_float_dtype(DType t, const char* op, const char* argument, F&& f) {
  switch (t) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bf16{});
    case DType::kFloat16:
      return f(fp16{});
    default:
      BK_CHECK(false, op, argument, " must be float32, bfloat16 or float16");
  }
}

}  // namespace bigkernel
