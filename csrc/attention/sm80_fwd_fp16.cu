#include "attention/sm80_fwd_choose.h"

namespace bigkernel {

AttentionLaunch attention_fwd_fp16(int32_t dim, bool general, const DeviceTraits& device) {
  return choose_forward<fp16, 32, 64, 96, 128, 192, 256>("attention_fwd_kernel<fp16>", dim, general,
                                                         device);
}

}  // namespace bigkernel
