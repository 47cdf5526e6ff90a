// A bias and the activation after it on the CPU, once per instruction set. For each element:
//   y = act(x + bias);  dx = dy * act'(x + bias),  dbias = the sum of dx over the rows
// In fp32; 16-bit elements are widened as they are loaded, and results rounded once.
#include "cpu/rows.h"

#include "bias_act/bias_act.h"
#include "common/activations.h"

namespace bigkernel::BK_ISA {
namespace bias_act {

template <class T>
BK_INLINE VecF sum(const BiasActArgs& a, const T* x, int64_t i, int n) {
  const VecF v = load_some(x + i, n);
  return a.bias == nullptr ? v : v + load_some(a.bias + i, n);
}

template <class T, class Activation>
void forward(const BiasActArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.dim;
    for_elements(a.dim, [&](int64_t i, int n) BK_LAMBDA {
      VecF value, slope;
      Activation::both(sum(a, x, i, n), value, slope);
      store_some(y + i, value, n);
    });
  }
}

// Rows are taken a few at a time, so that their sums touch memory once.
template <class T, class Activation>
void backward(const BiasActArgs& a, int64_t begin, int64_t end, float* dbias, float* run) {
  constexpr int64_t kRows = 4;
  static_assert(kBiasActRun % kRows == 0);
  for (int64_t row = begin; row < end; row += kRows) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    T* dx = static_cast<T*>(a.y) + row * a.dim;
    const int64_t rows = end - row < kRows ? end - row : kRows;
    const bool flush = (row + kRows - begin) % kBiasActRun == 0 || row + kRows >= end;
    for_elements(a.dim, [&](int64_t i, int n) BK_LAMBDA {
      VecF part = {};
      for (int64_t r = 0; r < rows; ++r) {
        VecF value, slope;
        Activation::both(sum(a, x + r * a.x_stride, i, n), value, slope);
        const VecF d = load_some(dy + r * a.dy_stride + i, n) * slope;
        store_some(dx + r * a.dim + i, d, n);
        part += d;
      }
      if (dbias == nullptr) return;
      part += load_some(run + i, n);
      if (flush) store_some(dbias + i, load_some(dbias + i, n) + part, n);
      store_some(run + i, flush ? VecF{} : part, n);
    });
  }
}

}  // namespace bias_act

void bias_act_forward(const BiasActArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto type) BK_LAMBDA {
    with_activation(a.activation, [&](auto activation) BK_LAMBDA {
      bias_act::forward<decltype(type), decltype(activation)>(a, begin, end);
    });
  });
}

void bias_act_backward(const BiasActArgs& a, int64_t begin, int64_t end, float* dbias, float* run) {
  with_type(a.type, [&](auto type) BK_LAMBDA {
    with_activation(a.activation, [&](auto activation) BK_LAMBDA {
      bias_act::backward<decltype(type), decltype(activation)>(a, begin, end, dbias, run);
    });
  });
}

}  // namespace bigkernel::BK_ISA
