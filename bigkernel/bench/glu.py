"""Gated linear units against act_fn(gate) * up, as the MLPs of transformers run it."""

import itertools
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkernel.bench import fused
from bigkernel.bench.case import LIMIT, Bar, Case
from bigkernel.ops import glu
from bigkernel.ops.glu.contest import apart

APART = "act_fn(gate) * up"
SIZES = ((2048, 1024), (2048, 11008))


def cases(small: bool = False) -> list[Case]:
    """The table; ``small`` has the same cases at sizes for a test."""
    sizes = [(12, width // 32) for _, width in SIZES] if small else SIZES
    table = []
    for (rows, width), dtype, activation, backward in itertools.product(
        sizes, (torch.float32, torch.bfloat16), ("silu", "gelu", "gelu_tanh"), (False, True)
    ):
        table.append(
            fused.case(
                "glu",
                f"{activation} {fused.NAMES[dtype]} {rows} x {width}",
                partial(_ours, activation),
                {APART: partial(apart, activation)},
                partial(_make, rows, width, dtype),
                backward,
                saved=2,
                bars=[Bar(1.2, APART), Bar(0.7, LIMIT)],
            )
        )
    for dtype, backward in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        rows, width = sizes[0]
        table.append(
            fused.case(
                "glu",
                f"silu {fused.NAMES[dtype]} {rows} x {width} of one product",
                _merged,
                {APART: _merged_apart},
                partial(_make_merged, rows, width, dtype),
                backward,
                saved=1,
                bars=[Bar(1.2, APART), Bar(0.7, LIMIT)],
            )
        )
    return table


def _make(rows: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    return [fused.draw(generator, rows, width, dtype=dtype) for _ in range(2)]


def _make_merged(
    rows: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    return [fused.draw(generator, rows, 2 * width, dtype=dtype)]


def _ours(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    return glu(gate, up, activation)


def _merged(x: Tensor) -> Tensor:
    return glu(x)


def _merged_apart(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up
