// Activation functions and their derivatives: on the vectors of an instruction set, and on the
// single floats of a CUDA thread. Each F(x) has value and slope; what both need is computed once.
#pragma once

#if defined(__CUDACC__)
#include "cuda/vec.h"
#else
#include "cpu/exp.h"
#endif

namespace bigkernel::BK_ISA {

// The logistic function s of x, and s (1 - s), both to their last digits in both tails.
BK_INLINE void logistic(VecF x, VecF& s, VecF& bend) {
  const VecF e = vexp(-vabs(x));
  const VecF far = reciprocal(1.0f + e), near = e * far;
  s = x < 0.0f ? near : far;
  bend = near * far;
}

// bend * x * z'(x), where z' may overflow: where bend is nothing, so is this (but not of an
// infinite x, of which torch gives NaN).
BK_INLINE VecF bent(VecF bend, VecF x, VecF change) {
  return bend == 0.0f ? x * 0.0f : bend * x * change;
}

// x * logistic(kNumber / 1000 * x): silu, and with 1702 what CLIP calls quick_gelu.
template <int kNumber>
struct Swish {
  static BK_INLINE void both(VecF x, VecF& value, VecF& slope) {
    VecF s, bend;
    logistic(x * (kNumber * 1e-3f), s, bend);
    value = x * s;
    slope = s + bent(bend, x, set1(kNumber * 1e-3f));
  }
};

// x * Phi(x), Phi the distribution of a normal variable. Its lower tail is exp(-x^2 / 2) / 2 times
// the scaled complementary error function at |x| / sqrt(2), which is smooth: t times a polynomial
// of degree 9 in t = 1 / (1 + 0.34 |x| / sqrt(2)), relative error 4e-9, fitted for this file. So
// the tail keeps its digits where 1 + erf would have lost them, and the density is at hand.
struct Gelu {
  static BK_INLINE void both(VecF x, VecF& value, VecF& slope) {
    constexpr float kTail[10] = {0.191816462f,  0.192038497f, 0.178257687f,  0.174916798f,
                                 0.059276922f,  0.275715242f, -0.278548475f, 0.401876528f,
                                 -0.246077021f, 0.050727365f};
    const VecF density = vexp(x * x * -0.5f);
    const VecF t = reciprocal(fma(vabs(x), set1(0.240416306f), set1(1.0f)));
    VecF p = set1(kTail[9]);
    for (int i = 8; i >= 0; --i) p = p * t + kTail[i];
    const VecF tail = 0.5f * density * t * p;
    const VecF phi = x < 0.0f ? tail : 1.0f - tail;
    value = x * phi;
    slope = fma(x * 0.398942280f, density, phi);
  }
};

// 0.5 x (1 + tanh(z / 2)) = x * logistic(z),  z = 2 sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
  static BK_INLINE void both(VecF x, VecF& value, VecF& slope) {
    constexpr float kScale = 1.59576912f, kCubic = 0.0713548163f;
    const VecF square = x * x;
    VecF s, bend;
    logistic(x * fma(square, set1(kCubic), set1(kScale)), s, bend);
    value = x * s;
    slope = s + bent(bend, x, fma(square, set1(3 * kCubic), set1(kScale)));
  }
};

struct Relu {
  static BK_INLINE void both(VecF x, VecF& value, VecF& slope) {
    value = x <= 0.0f ? VecF{} : x;  // NaN stays
    slope = x <= 0.0f ? VecF{} : set1(1.0f);
  }
};

struct Relu2 {
  static BK_INLINE void both(VecF x, VecF& value, VecF& slope) {
    const VecF r = x <= 0.0f ? VecF{} : x;
    value = r * r;
    slope = 2.0f * r;
  }
};

struct Sigmoid {
  static BK_INLINE void both(VecF x, VecF& value, VecF& slope) { logistic(x, value, slope); }
};

// Calls f with the function of this number; the order is that of bigkernel/ops/glu/reference.py.
template <class F>
BK_INLINE void with_activation(int64_t number, const F& f) {
  switch (number) {
    case 0:
      return f(Swish<1000>{});
    case 1:
      return f(Gelu{});
    case 2:
      return f(GeluTanh{});
    case 3:
      return f(Swish<1702>{});
    case 4:
      return f(Relu{});
    case 5:
      return f(Relu2{});
    default:
      return f(Sigmoid{});
  }
}

}  // namespace bigkernel::BK_ISA
