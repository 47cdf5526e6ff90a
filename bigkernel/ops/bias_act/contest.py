"""What models run in place of a bias with an activation, for ``tuning.py`` and the benchmark."""

import torch
from torch import Tensor

from bigkernel import registry, tuning
from bigkernel.ops.glu.reference import FUNCTIONS

SMALLEST = 1 << 18  # as `registry.InModels` has it


def apart(activation: str, x: Tensor, bias: Tensor) -> Tensor:
    """act_fn(x + bias)."""
    return FUNCTIONS[activation](x + bias)


def _draw(count: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    shapes = (count // 512, 512), (512,)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def contests(bias_act: tuning.Function) -> dict[str, registry.Contest]:
    """Of GELU, the most usual one."""

    def theirs(x: Tensor, bias: Tensor) -> Tensor:
        return apart("gelu", x, bias)

    return {"bias_act": tuning.sized("act_fn(x + bias)", _draw, bias_act, theirs, SMALLEST)}
