// The forward kernels for sm_80 and later by type: one file each, so that they compile side by
// side.
#pragma once
#include "attention/cuda.h"

namespace bigkernel {

// The narrowest kernel that holds this many columns; all of the launch but its blocks.
AttentionLaunch attention_fwd_bf16(int32_t dim, bool general);
AttentionLaunch attention_fwd_fp16(int32_t dim, bool general);
AttentionLaunch attention_fwd_fp32(int32_t dim, bool general);

}  // namespace bigkernel
