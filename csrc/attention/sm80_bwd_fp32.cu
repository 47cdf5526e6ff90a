#include "attention/sm80_bwd_choose.h"

namespace bigkernel {

AttentionLaunch attention_bwd_fp32(Part part, int32_t dim, bool general) {
  return choose_backward<float>(part, dim, general);
}

}  // namespace bigkernel
