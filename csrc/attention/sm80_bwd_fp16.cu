#include "attention/sm80_bwd_choose.h"

namespace bigkernel {

AttentionLaunch attention_bwd_fp16(Part part, int32_t dim, bool general) {
  return choose_backward<fp16>(part, dim, general);
}

}  // namespace bigkernel
