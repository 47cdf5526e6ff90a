#include "attention/sm80_fwd_choose.h"

namespace bigkernel {

AttentionLaunch attention_fwd_fp32(int32_t dim, bool general, const DeviceTraits& device) {
  return choose_forward<float, 32, 64, 128, 256>("attention_fwd_kernel<float>", dim, general,
                                                 device);
}

}  // namespace bigkernel
