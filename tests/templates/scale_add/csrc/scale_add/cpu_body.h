// scale * x + y on the CPU, once per instruction set; fp32.
#include "cpu/rows.h"
#include "scale_add/scale_add.h"

namespace bigkernel::BK_ISA {

void scale_add(const ScaleAddArgs& a, int64_t begin, int64_t end) {
  for_elements(end - begin, [&](int64_t i, int n) BK_LAMBDA {
    const int64_t at = begin + i;
    store_some(a.out + at, a.scale * load_some(a.x + at, n) + load_some(a.y + at, n), n);
  });
}

}  // namespace bigkernel::BK_ISA
