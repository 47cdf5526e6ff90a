// The exponential and tanh with its slope, on vectors. Included by an op's cpu_body.h, inside an
// instruction set.
#pragma once

#include "cpu/vec.h"

namespace bigkernel::BK_ISA {

// e^x within 2 ulp; results below 2^-126 are 0. The multiple of log 2 is taken off in two parts, of
// which the first leaves nothing behind with or without FMA.
BK_INLINE VecF vexp(VecF x) {
  const VecF magic = set1(12582912.0f);  // 1.5 * 2^23: rounds, and leaves the integer in low bits
  const VecF shifted = fma(x, set1(1.44269504f), magic);
  const VecF whole = shifted - magic;
  VecF rest = fma(whole, set1(-0.693359375f), x);
  rest = fma(whole, set1(2.12194440e-4f), rest);
  const VecF f = rest * 1.44269504f;
  VecF p = set1(kExp2[6]);
  for (int i = 5; i >= 0; --i) p = p * f + kExp2[i];
  VecF r = (VecF)((VecI)p + (((VecI)shifted) << 23));
  r = x >= -87.3365f ? r : VecF{};
  r = x < 88.7228f ? r : set1(__builtin_inff());
  return x == x ? r : x;
}

// 1 / x
BK_INLINE VecF reciprocal(VecF x) { return 1.0f / x; }

// tanh within 2 ulp, and its slope 1 - tanh^2, which keeps its digits where tanh is near 1.
BK_INLINE void tanh_and_slope(VecF x, VecF& value, VecF& slope) {
  const VecF e = vexp(vabs(x) * -2.0f), r = 1.0f / (1.0f + e);
  const VecF near = vtanh(x);
  const VecI small = vabs(x) < 0.625f;
  value = small ? near : copysign((1.0f - e) * r, x);
  value = x == x ? value : x;
  slope = small ? 1.0f - near * near : 4.0f * e * r * r;
}

}  // namespace bigkernel::BK_ISA
