// The forward kernels for sm_80 and later by type: one file each, so that they compile side by
// side.
#pragma once
#include "attention/cuda.h"

namespace bigkernel {

// The narrowest kernel that holds this many columns, its tiles as the device has room for; all of
// the launch but its blocks.
AttentionLaunch attention_fwd_bf16(int32_t dim, bool general, const DeviceTraits& device);
AttentionLaunch attention_fwd_fp16(int32_t dim, bool general, const DeviceTraits& device);
AttentionLaunch attention_fwd_fp32(int32_t dim, bool general, const DeviceTraits& device);

}  // namespace bigkernel
