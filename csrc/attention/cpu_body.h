// The attention kernels of the CPU, written once and compiled for each instruction set.
//
// Sums are fp32. What is multiplied is fp32 too, bf16 and fp16 converted when a tile is packed;
// with AVX-512 BF16 and AMX, bf16 pairs (cpu/words.h). A score tile is a product of two small
// matrices that fit the L1 and L2 caches (cpu_tiling.h), computed by register-blocked kernels
// (cpu/products.h). Tiles that causality, window or mask close are skipped; of those they cut, only
// the vectors that some row sees are computed.
#pragma once

#include "attention/attention.h"
#include "attention/cpu_forward.h"
#include "attention/cpu_backward.h"
#include "attention/cpu_mask_gradient.h"

namespace bigkernel::BK_ISA {

template <class Words>
AttentionPlan plan_of(int64_t dim, int64_t dim_v, bool backward) {
  const Tiling t = tiling<Words>(dim, dim_v, backward);
  AttentionPlan plan{};
  plan.pack = Words::kPack;
  plan.block_q = t.block_q;
  plan.block_k = t.block_k;
  plan.ld_q = t.ld_q;
  plan.ld_v = t.ld_v;
  Arena arena{nullptr};
  if (backward) {
    backward_scratch<Words>(arena, t);
    Arena mask_arena{nullptr};
    mask_gradient_scratch<Words>(mask_arena, t);
    plan.scratch_floats_mask = mask_arena.used;
  } else {
    plan.tile_floats = packed_tile_floats<Words>(t);
    forward_scratch<Words>(arena, t);
  }
  plan.scratch_floats = arena.used;
  return plan;
}

AttentionPlan attention_plan(DType dtype, int64_t dim, int64_t dim_v, bool backward) {
  AttentionPlan plan{};
  with_words(dtype, [&](auto kind) { plan = plan_of<decltype(kind)>(dim, dim_v, backward); });
  return plan;
}

}  // namespace bigkernel::BK_ISA
