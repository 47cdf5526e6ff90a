"""What gated linear units compute, in plain PyTorch: also the ``torch`` backend.

    y = act(gate) * up

in float32 (float64 for float64 inputs), rounded once to the inputs' dtype.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkernel.expect import Expect

ROOT_2_PI = math.sqrt(2 / math.pi)


def _swish(x: Tensor, factor: float) -> Tensor:
    s = torch.sigmoid(factor * x)
    return s + factor * x * s * (1 - s)


def _gelu_slope(x: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    t = torch.tanh(ROOT_2_PI * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * ROOT_2_PI * (1 + 3 * 0.044715 * x * x)


def _sigmoid_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


# Values and slopes, by the number that the operators take; the order is that of
# csrc/common/activations.h. Slopes are written out, since an operator runs where autograd is off.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: _swish(x, 1.0),
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "quick_gelu": lambda x: _swish(x, 1.702),
    "relu": lambda x: torch.where(x <= 0, 0.0, 1.0).to(x.dtype),
    "relu2": lambda x: 2 * F.relu(x),
    "sigmoid": _sigmoid_slope,
}
ACTIVATIONS = tuple(FUNCTIONS)
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def number_of(expect: Expect, activation: object) -> int:
    """What the operators take for this name, the argument ``activation`` of a function."""
    number = _NUMBERS.get(activation) if isinstance(activation, str) else None
    if number is None:
        expected = f"one of {', '.join(ACTIVATIONS)}"
        raise expect.error("activation", expected, repr(activation))
    return number


def halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up, which gate holds both where up is None."""
    if up is not None:
        return gate, up
    half = gate.shape[-1] // 2
    return gate[..., :half], gate[..., half:]


def glu_fwd(gate: Tensor, up: Tensor | None, activation: int) -> Tensor:
    """act(gate) * up."""
    first, second = (t.to(_wide(t)) for t in halves(gate, up))
    return (FUNCTIONS[ACTIVATIONS[activation]](first) * second).to(gate.dtype)


def glu_bwd(dy: Tensor, gate: Tensor, up: Tensor | None, activation: int) -> tuple[Tensor, Tensor]:
    """(gradient of gate, of up); with both in gate that of gate, and an empty tensor."""
    name = ACTIVATIONS[activation]
    first, second = (t.to(_wide(t)) for t in halves(gate, up))
    dy = dy.to(first.dtype)
    dgate = (dy * second * SLOPES[name](first)).to(gate.dtype)
    dup = (dy * FUNCTIONS[name](first)).to(gate.dtype)
    if up is not None:
        return dgate, dup
    return torch.cat([dgate, dup], -1), gate.new_empty(0)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
