// The attention kernels of the CPU, written once and compiled for each instruction set.
//
// All arithmetic is fp32; bf16 and fp16 are converted when a tile is packed. A score tile is a
// product of two small matrices that fit the L1 and L2 caches (cpu_tiling.h), computed by
// register-blocked kernels (cpu_gemm.h). Tiles that causality, window or mask close are skipped; of
// those they cut, only the vectors that some row sees are computed.
#pragma once

#include "attention/attention.h"
#include "cpu/philox_vec.h"
#include "attention/cpu_gemm.h"
#include "attention/cpu_pack.h"
#include "attention/cpu_tiling.h"
#include "attention/cpu_scores.h"
#include "attention/cpu_forward.h"
#include "attention/cpu_backward.h"
#include "attention/cpu_mask_gradient.h"

namespace bigkernel::BK_ISA {

AttentionPlan attention_plan(int64_t dim, int64_t dim_v, bool backward) {
  const Tiling t = tiling(dim, dim_v, backward);
  AttentionPlan plan{};
  plan.block_q = t.block_q;
  plan.block_k = t.block_k;
  plan.ld_q = t.ld_q;
  plan.ld_v = t.ld_v;
  Arena arena{nullptr};
  if (backward) {
    backward_scratch(arena, t);
    Arena mask_arena{nullptr};
    mask_gradient_scratch(mask_arena, t);
    plan.scratch_floats_mask = mask_arena.used;
  } else {
    plan.tile_floats = t.width_q * t.ld_s + t.block_k * t.ld_v;
    forward_scratch(arena, t);
  }
  plan.scratch_floats = arena.used;
  return plan;
}

}  // namespace bigkernel::BK_ISA
