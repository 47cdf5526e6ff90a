// scale * x + y: what the binding hands to the kernel. No torch header here.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace bigkernel {

struct ScaleAddArgs {
  const float *x, *y;  // [n], contiguous
  float* out;
  float scale;
};

BK_DECLARE_PER_ISA(
    // Elements begin..end.
    void scale_add(const ScaleAddArgs& args, int64_t begin, int64_t end))

}  // namespace bigkernel
