"""What a bias with an activation computes, in plain PyTorch: also the ``torch`` backend.

    y = act(x + bias)

in float32 (float64 for float64 inputs), the sum too, and rounded once to x's dtype.
"""

import torch
from torch import Tensor

from bigkernel.ops.glu.reference import ACTIVATIONS, FUNCTIONS, SLOPES


def wide(x: Tensor) -> torch.dtype:
    """What is computed in, and what bias has."""
    return torch.promote_types(x.dtype, torch.float32)


def _sum(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.to(wide(x)) if bias is None else x.to(wide(x)) + bias


def bias_act_fwd(x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """act(x + bias)."""
    return FUNCTIONS[ACTIVATIONS[activation]](_sum(x, bias)).to(x.dtype)


def bias_act_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: int, needs_dbias: bool
) -> tuple[Tensor, Tensor]:
    """(gradient of x, of bias: the sum over all rows, or empty)."""
    d = dy.to(wide(x)) * SLOPES[ACTIVATIONS[activation]](_sum(x, bias))
    dbias = d.sum_to_size(x.shape[-1:]) if needs_dbias else d.new_empty(0)
    return d.to(x.dtype), dbias
