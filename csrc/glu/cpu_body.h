// Gated linear units on the CPU, once per instruction set. For each element:
//   y = act(gate) * up;  dgate = dy * up * act'(gate),  dup = dy * act(gate)
// In fp32; 16-bit elements are widened as they are loaded, and results rounded once.
#include "cpu/rows.h"

#include "common/activations.h"
#include "glu/glu.h"

namespace bigkernel::BK_ISA {
namespace glu {

template <class T, class Activation>
void forward(const GluArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* y = static_cast<T*>(a.y) + row * a.dim;
    for_elements(a.dim, [&](int64_t i, int n) BK_LAMBDA {
      VecF value, slope;
      Activation::both(load_some(gate + i, n), value, slope);
      store_some(y + i, value * load_some(up + i, n), n);
    });
  }
}

template <class T, class Activation>
void backward(const GluArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    T* dgate = static_cast<T*>(a.dgate) + row * a.grad_stride;
    T* dup = static_cast<T*>(a.dup) + row * a.grad_stride;
    for_elements(a.dim, [&](int64_t i, int n) BK_LAMBDA {
      VecF value, slope;
      Activation::both(load_some(gate + i, n), value, slope);
      const VecF d = load_some(dy + i, n);
      store_some(dgate + i, d * load_some(up + i, n) * slope, n);
      store_some(dup + i, d * value, n);
    });
  }
}

}  // namespace glu

void glu_forward(const GluArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto type) BK_LAMBDA {
    with_activation(a.activation, [&](auto activation) BK_LAMBDA {
      glu::forward<decltype(type), decltype(activation)>(a, begin, end);
    });
  });
}

void glu_backward(const GluArgs& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto type) BK_LAMBDA {
    with_activation(a.activation, [&](auto activation) BK_LAMBDA {
      glu::backward<decltype(type), decltype(activation)>(a, begin, end);
    });
  });
}

}  // namespace bigkernel::BK_ISA
