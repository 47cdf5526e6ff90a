"""linear_cross_entropy against torch's two steps.

torch.nn.functional.linear_cross_entropy in chunks is no peer: it rounds a loss of bf16 to bf16, and
of fp32 its results are not always within twice the error of the two steps.
"""

import itertools
from functools import partial

import torch
from torch import Tensor

from bigkernel.bench import fused
from bigkernel.bench.case import Bar, Case
from bigkernel.ops import linear_cross_entropy
from bigkernel.ops.linear_cross_entropy.contest import theirs

TORCH = "F.linear, F.cross_entropy"
ROWS = 2048
SIZES = ((8192, 384), (65536, 384), (8192, 2048), (65536, 2048))


def cases(small: bool = False) -> list[Case]:
    """The table; ``small`` has the same cases at sizes for a test."""
    rows = ROWS // 64 if small else ROWS
    sizes = [(v // 64, d // 16) for v, d in SIZES] if small else SIZES
    table = []
    for (classes, width), dtype in itertools.product(sizes, (torch.float32, torch.bfloat16)):
        target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(1))
        table.append(
            fused.case(
                "linear_cross_entropy",
                f"{fused.NAMES[dtype]} {rows} x {width} -> {classes}",
                partial(_ours, target),
                {TORCH: partial(theirs, target)},
                partial(_make, rows, classes, width, dtype),
                backward=True,
                bars=[Bar(1.0, TORCH)],
            )
        )
    return table


def _make(
    rows: int, classes: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    weight = fused.draw(generator, classes, width, dtype=torch.float32) * 0.02
    return [fused.draw(generator, rows, width, dtype=dtype), weight.to(dtype)]


def _ours(target: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    return linear_cross_entropy(input, weight, target)
