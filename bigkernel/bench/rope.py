"""Rotary position embedding against transformers' apply_rotary_pos_emb, operation by operation.

q and k are [B, S, H, D] transposed, as models hand them over.
"""

from functools import partial

import torch
from torch import Tensor

from bigkernel.bench import fused
from bigkernel.bench.case import LIMIT, Bar, Case
from bigkernel.ops import rope
from bigkernel.ops.rope.contest import llama, tables

LLAMA = "apply_rotary_pos_emb"
# batch, heads of q, heads of k, length, head dim
SIZES = ((4, 6, 6, 512, 64), (1, 32, 8, 2048, 64), (2, 16, 16, 1024, 128))


def cases(small: bool = False) -> list[Case]:
    """The table; ``small`` has the same cases at sizes for a test."""
    table = []
    for batch, q_heads, k_heads, length, dim in SIZES:
        length = 7 if small else length
        for dtype in (torch.float32, torch.bfloat16):
            for backward in (False, True):
                cos, sin = tables(length, dim, dtype)
                table.append(
                    fused.case(
                        "rope",
                        f"{fused.NAMES[dtype]} B{batch} H{q_heads}:{k_heads} S{length} D{dim}",
                        partial(_ours, cos, sin),
                        {LLAMA: partial(llama, cos, sin)},
                        partial(_make, batch, (q_heads, k_heads), length, dim, dtype),
                        backward,
                        bars=[Bar(2.0, LLAMA), Bar(0.7, LIMIT)],
                    )
                )
    return table


def _make(
    batch: int,
    heads: tuple[int, int],
    length: int,
    dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> list[Tensor]:
    return [
        fused.draw(generator, batch, length, h, dim, dtype=dtype).transpose(1, 2) for h in heads
    ]


def _ours(cos: Tensor, sin: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return rope(q, k, cos, sin)
