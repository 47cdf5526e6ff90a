"""Linear layers of 16-bit tensors against torch's, and against the same products in float32.

Where the processor multiplies 16 bits, ours are torch's, and the bars say no more than that.
"""

import itertools
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkernel import precision
from bigkernel.bench import fused
from bigkernel.bench.case import LIMIT, OURS, REFERENCE, Bar, Case, Ready
from bigkernel.ops import linear

TORCH = "F.linear"
# Rows, inputs, outputs: into and out of an MLP, a short batch, a head.
SIZES = ((2048, 384, 1024), (2048, 1024, 384), (512, 384, 1024), (2048, 384, 8192))


def cases(small: bool = False) -> list[Case]:
    """The table; ``small`` has the same cases at sizes for a test."""
    table = []
    for size, dtype, backward in itertools.product(
        SIZES, (torch.bfloat16, torch.float16), (False, True)
    ):
        if dtype == torch.float16 and size is not SIZES[0]:
            continue
        rows, width, outputs = (n // 16 for n in size) if small else size
        whole = fused.case(
            "linear",
            f"{fused.NAMES[dtype]} {rows} x {width} -> {outputs}",
            linear,
            {TORCH: F.linear},
            partial(_make, rows, width, outputs, dtype),
            backward,
        )
        bars = (Bar(0.85, LIMIT), Bar(_gain(dtype, backward), TORCH))
        build = partial(_build, whole, (rows, width, outputs), backward)
        table.append(replace(whole, competitors=(OURS, TORCH), build=build, bars=bars))
    return table


def _gain(dtype: torch.dtype, backward: bool) -> float:
    if precision.multiplies(torch.device("cpu"), dtype):
        return 0.9
    return 4.0 if backward else 1.5


def _make(
    rows: int, width: int, outputs: int, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    return [
        fused.draw(generator, *shape, dtype=dtype) for shape in ((rows, width), (outputs, width))
    ]


def _build(whole: Case, size: tuple[int, int, int], backward: bool) -> Ready:
    ready = whole.build()
    rows, width, outputs = size
    x, w, g = (torch.randn(shape) for shape in ((rows, width), (outputs, width), (rows, outputs)))

    def products() -> list[Tensor]:
        return [x @ w.T, g @ w, g.T @ x] if backward else [x @ w.T]

    # Composed of torch's calls it is its own definition.
    runs = {name: run for name, run in ready.runs.items() if name != REFERENCE}
    work = 2.0 * rows * width * outputs * (3 if backward else 1)
    name = "the same products in float32"
    return replace(ready, runs=runs, limit=products, work=work, limit_work=work, limit_name=name)
