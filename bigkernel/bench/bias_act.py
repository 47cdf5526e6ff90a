"""A bias with the activation after it against act_fn(x + bias), as torch runs it."""

import itertools
from functools import partial

import torch
from torch import Tensor

from bigkernel.bench import fused
from bigkernel.bench.case import LIMIT, Bar, Case
from bigkernel.ops import bias_act
from bigkernel.ops.bias_act.contest import apart

APART = "act_fn(x + bias)"
SIZE = 2048, 3072


def cases(small: bool = False, device: str = "cpu") -> list[Case]:
    """The table; ``small`` has the same cases at a size for a test."""
    rows, width = (12, 96) if small else SIZE
    return [
        fused.case(
            "bias_act",
            f"{activation} {fused.NAMES[dtype]} {rows} x {width}",
            partial(ours, activation),
            {APART: partial(apart, activation)},
            partial(make, rows, width, dtype, device=device),
            backward,
            saved=2,
            bars=[Bar(1.2, APART), Bar(0.7, LIMIT)],
        )
        for dtype, activation, backward in itertools.product(
            (torch.float32, torch.bfloat16), ("gelu", "gelu_tanh", "relu2"), (False, True)
        )
    ]


def make(
    rows: int, width: int, dtype: torch.dtype, generator: torch.Generator, device: str = "cpu"
) -> list[Tensor]:
    """x and bias."""
    shapes = (rows, width), (width,)
    return [fused.draw(generator, *shape, dtype=dtype).to(device) for shape in shapes]


def ours(activation: str, x: Tensor, bias: Tensor) -> Tensor:
    """The op."""
    return bias_act(x, bias, activation)
