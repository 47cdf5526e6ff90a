// The kernels for few queries for sm_80 and later, by type.
#pragma once
#include "attention/cuda.h"

namespace bigkernel {

// The narrowest kernel that holds this many columns, and the one that adds up its splits; all of
// the launch but its blocks. bf16 and fp16.
AttentionLaunch attention_few_bf16(int32_t dim);
AttentionLaunch attention_few_fp16(int32_t dim);
AttentionLaunch attention_few_sum_bf16();
AttentionLaunch attention_few_sum_fp16();

}  // namespace bigkernel
