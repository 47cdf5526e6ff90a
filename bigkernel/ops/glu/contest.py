"""What models run in place of a gated unit, for ``tuning.py`` and the benchmark."""

import torch
from torch import Tensor

from bigkernel import registry, tuning
from bigkernel.ops.glu.reference import FUNCTIONS

SMALLEST = 1 << 18  # as `registry.InModels` has it


def apart(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """act_fn(gate) * up."""
    return FUNCTIONS[activation](gate) * up


def _draw(count: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(count // 512, 512, generator=generator).to(dtype) for _ in range(2)]


def contests(glu: tuning.Function) -> dict[str, registry.Contest]:
    """Of SwiGLU, the most usual one."""

    def theirs(gate: Tensor, up: Tensor) -> Tensor:
        return apart("silu", gate, up)

    return {"glu": tuning.sized("act_fn(gate) * up", _draw, glu, theirs, SMALLEST)}
