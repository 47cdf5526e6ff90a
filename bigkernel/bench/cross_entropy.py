"""Cross-entropy of given logits against torch's, as transformers calls it: on float32 copies."""

import itertools
from functools import partial

import torch
from torch import Tensor

from bigkernel.bench import fused
from bigkernel.bench.case import LIMIT, Bar, Case
from bigkernel.ops import cross_entropy
from bigkernel.ops.cross_entropy.contest import theirs

TORCH = "F.cross_entropy"
SIZES = ((2048, 8192), (1024, 65536))


def cases(small: bool = False) -> list[Case]:
    """The table; ``small`` has the same cases at sizes for a test."""
    sizes = [(12, classes // 64) for _, classes in SIZES] if small else SIZES
    table = []
    for (rows, classes), dtype, backward in itertools.product(
        sizes, (torch.float32, torch.bfloat16), (False, True)
    ):
        labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(1))
        table.append(
            fused.case(
                "cross_entropy",
                f"{fused.NAMES[dtype]} {rows} x {classes}",
                partial(_ours, labels),
                {TORCH: partial(theirs, labels)},
                partial(_make, rows, classes, dtype),
                backward,
                saved=1,
                bars=[Bar(1.5, TORCH), Bar(0.5, LIMIT)],
            )
        )
    return table


def _make(rows: int, classes: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    return [fused.draw(generator, rows, classes, dtype=dtype)]


def _ours(labels: Tensor, logits: Tensor) -> Tensor:
    return cross_entropy(logits, labels)
