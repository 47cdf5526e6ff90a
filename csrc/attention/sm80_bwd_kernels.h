// The backward kernels for sm_80 and later. Those by type have one file each, so that they compile
// side by side.
#pragma once
#include "attention/cuda.h"

namespace bigkernel {

// What a kernel computes: dk and dv, dk, dv, dq, or dS for the gradient of the mask.
enum class Part { kKeysValues, kKeys, kValues, kQueries, kMask };

// The narrowest kernel that holds this many columns; all of the launch but its blocks. `kernel` is
// null where one of another part does it: dk and dv are computed together in narrow heads.
AttentionLaunch attention_bwd_bf16(Part part, int32_t dim, bool general);
AttentionLaunch attention_bwd_fp16(Part part, int32_t dim, bool general);
AttentionLaunch attention_bwd_fp32(Part part, int32_t dim, bool general);

// What each row needs before them; tile_rows: rows of a block.
AttentionLaunch attention_bwd_rows(DType dtype, bool general);
// Sums up what blocks that share a tile of keys have left; tile_rows: keys of a block.
AttentionLaunch attention_bwd_sum(DType dtype);
// The gradient of a mask that is broadcast along the keys; tile_rows: elements of a block.
AttentionLaunch attention_bwd_mask_rows();

}  // namespace bigkernel
