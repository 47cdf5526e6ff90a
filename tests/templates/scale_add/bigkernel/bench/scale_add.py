"""Scaled addition against torch.add."""

from functools import partial

import torch
from bigkernel.ops.scale_add import scale_add
from torch import Tensor

from bigkernel.bench import fused
from bigkernel.bench.case import LIMIT, Bar, Case


def cases(small: bool = False) -> list[Case]:
    """The table; ``small`` has the same case at a size for a test."""
    size = 1000 if small else 4_000_000
    peers = {"torch.add": lambda x, y: torch.add(y, x, alpha=0.5)}
    ours = partial(scale_add, scale=0.5)
    bars = [Bar(0.9, "torch.add"), Bar(0.7, LIMIT)]
    return [
        fused.case("scale_add", f"fp32 {size}", ours, peers, partial(_make, size), False, bars=bars)
    ]


def _make(size: int, generator: torch.Generator) -> list[Tensor]:
    return [fused.draw(generator, size, dtype=torch.float32) for _ in range(2)]
