"""Activations of a model, by what they compute: tried on numbers, whatever they are called."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bigkernel.integrations import linears, native, projections
from bigkernel.integrations.report import Change
from bigkernel.integrations.subclass import (
    give_subclass,
    is_swapped,
    original_class,
    why_no_subclass,
)
from bigkernel.ops.bias_act import bias_act
from bigkernel.ops.glu import glu
from bigkernel.ops.glu.reference import FUNCTIONS

# Written out in elementary operations in transformers, and one kernel in torch.
_FUSED_IN_TORCH = {"gelu": "none", "gelu_tanh": "tanh"}
# Of which `bias_act` keeps no more for backward than torch does. torch's relu and sigmoid keep
# their result, which the product after them keeps anyway.
SERVED = frozenset(("silu", "gelu", "gelu_tanh", "quick_gelu", "relu2"))


class _Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def name_of(module: Any) -> str | None:
    """The name in `bigkernel.ops.glu` of what this module computes, or None."""
    return _tried(module)[0]


def _tried(module: Any) -> tuple[str | None, int]:
    """(name, how many of torch's operators it takes)."""
    if (
        not isinstance(module, nn.Module)
        or not _is_elementwise(original_class(module))
        or next(module.parameters(), None) is not None
        or next(module.buffers(), None) is not None
        or next(module.children(), None) is not None
        or why_no_subclass(module) is not None
        or native.is_watched(module)
    ):
        return None, 0
    # Far out too, where some are cut off.
    x = torch.cat([torch.linspace(-9, 9, 91), torch.tensor([-300.0, -30.0, 30.0, 300.0])])
    x = x.to("cpu", torch.float64)
    try:
        with torch.no_grad(), _Count() as count:
            y = module.forward(x)
    except Exception:  # of as many kinds as there are modules without parameters
        return None, 0
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None, 0
    for name, function in FUNCTIONS.items():
        if torch.allclose(y.double(), function(x), rtol=1e-5, atol=1e-6):
            return name, count.calls
    return None, 0


@functools.cache
def _is_elementwise(cls: type[nn.Module]) -> bool:
    """Whether a module of this class is worth trying: one tensor in, and called an activation."""
    return cls.__module__ in ("transformers.activations", "torch.nn.modules.activation")


def apply(model: nn.Module, names: frozenset[str]) -> Change:
    """Let torch's fused kernel compute the activations that are written out in Python."""
    change = Change()
    for module in model.modules():
        if is_swapped(module):
            if "_bigkernel_gelu" in vars(type(module)):
                change.replace(module, "gelu", "torch's kernel in place of several")
            continue
        name, calls = _tried(module)
        if name in _FUSED_IN_TORCH and calls > 1:
            change.undo += give_subclass(module, subclass, _FUSED_IN_TORCH[name])
            change.replace(module, "gelu", "torch's kernel in place of several")
    return change


def subclass(base: type[nn.Module], approximate: str) -> dict[str, Any]:
    """What a subclass has that calls torch's gelu instead."""

    def forward(self: Any, input: Tensor) -> Tensor:
        return F.gelu(input, approximate=approximate)

    return {"forward": forward, "_bigkernel_gelu": approximate}


@functools.cache
def gated(kind: type[nn.Module], activation: str) -> Any:
    """A function (act, gate, up) -> act(gate) * up for modules ``act`` of this class."""

    def glu_of(act: Any, gate: Any, up: Any) -> Any:
        if (
            original_class(act) is kind
            and isinstance(gate, Tensor)
            and isinstance(up, Tensor)
            and gate.shape == up.shape
            and gate.dtype == up.dtype
            and native.takes("glu", gate, up)
            and not native.is_watched(act)
        ):
            return glu(gate, up, activation)
        return act(gate) * up

    return glu_of


@functools.cache
def gated_linears(kind: type[nn.Module], activation: str) -> Any:
    """A function (act, gate, up, x) -> act(gate(x)) * up(x), gate and up being linear layers."""
    glu_of = gated(kind, activation)  # type: ignore[arg-type]

    def glu_of_linears(act: Any, gate: Any, up: Any, x: Any) -> Any:
        joined = projections.product(x, gate, up)
        if (
            joined is not None
            and original_class(act) is kind
            and gate.weight.shape == up.weight.shape
            and native.takes("glu", joined, size=joined.numel() // 2)
            and not native.is_watched(act)
        ):
            return glu(joined, None, activation)
        return glu_of(act, *projections.split(joined, x, gate, up))

    return glu_of_linears


@functools.cache
def biased(kind: type[nn.Module], activation: str) -> Any:
    """A function (act, linear, x) -> act(linear(x)) for modules ``act`` of this class."""

    def bias_act_of(act: Any, linear: Any, x: Any) -> Any:
        if (
            original_class(act) is kind
            and linears.is_linear(linear)
            and isinstance(x, Tensor)
            and x.dim() > 1
            and native.takes(
                "bias_act", x, linear.weight, linear.bias, size=_size(x, linear.weight)
            )
            and not native.is_watched(act)
            and not native.is_watched(linear)
        ):
            return bias_act(linears.product(linear, x), linear.bias, activation)
        return act(linear(x))

    return bias_act_of


def _size(x: Tensor, weight: Tensor) -> int:
    """Elements of a product, of which x has the rows."""
    return x.numel() * weight.numel() // max(1, x.shape[-1]) ** 2
