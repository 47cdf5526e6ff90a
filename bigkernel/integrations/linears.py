"""Linear layers of 16-bit weights, or under autocast, on processors without 16-bit products.

torch's `nn.Linear` and transformers' `Conv1D`, whose weight is the transposed one, each by itself:
what comes before and after stays, and so do weights that layers share. Layers whose weights are
parameters of another kind of module (experts) call torch by themselves, and stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from bigkernel import precision
from bigkernel.integrations import native
from bigkernel.integrations.report import Change
from bigkernel.integrations.subclass import (
    give_subclass,
    is_swapped,
    original_class,
    why_no_subclass,
)
from bigkernel.ops.linear import linear
from bigkernel.ops.linear.op import NARROW, is_widened
from bigkernel.ops.linear.reference import FEW

OP = "linear"
_KINDS = (nn.Linear, Conv1D)


def apply(model: nn.Module, names: frozenset[str]) -> Change:
    """Replace the linear layers of ``model`` on a processor that multiplies what they do slowly."""
    change = Change()
    for module in model.modules():
        if not is_linear(module):
            continue
        weight: Any = module.weight
        narrow = weight.dtype in NARROW
        if weight.device.type != "cpu" or not (narrow or weight.dtype == torch.float32):
            continue
        # Those of float32 autocast narrows, to what it takes unless told otherwise.
        if precision.multiplies(weight.device, weight.dtype if narrow else torch.bfloat16):
            continue
        if not is_swapped(module):
            reason = why_no_subclass(module)
            if reason is not None:
                change.leave(module, OP, reason)
                continue
            change.undo += give_subclass(module, subclass)
        change.replace(module, OP, "" if narrow else "under autocast")
    return change


def is_linear(module: Any) -> bool:
    """Whether this is a product with a weight, perhaps plus a bias, and nothing more."""
    return original_class(module) in _KINDS


def product(module: Any, x: Tensor) -> Tensor:
    """What one of these gives without its bias."""
    weight = module.weight if original_class(module) is nn.Linear else module.weight.T
    if is_swapped(module) and _serves(x, weight, None):
        return linear(x, weight)
    return functional.linear(x, weight)


def subclass(base: Any) -> dict[str, Any]:
    """What a subclass of one of the two has."""
    if base is nn.Linear:

        def forward(self: Any, input: Tensor) -> Tensor:
            if _serves(input, self.weight, self.bias):
                return linear(input, self.weight, self.bias)
            return base.forward(self, input)  # type: ignore[no-any-return]

    else:

        def forward(self: Any, x: Tensor) -> Tensor:  # type: ignore[misc]
            if _serves(x, self.weight, self.bias):
                return linear(x, self.weight.T, self.bias)
            return base.forward(self, x)  # type: ignore[no-any-return]

    return {"forward": forward}


def _serves(x: Any, weight: Any, bias: Any) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not all(isinstance(t, Tensor) for t in tensors) or x.dim() == 0:
        return False
    dtype = precision.autocast_dtype(x.device.type)
    if dtype is None:
        dtype = x.dtype
        if any(t.dtype != dtype for t in tensors):
            return False
    rows = x.numel() // max(x.shape[-1], 1)
    if rows * weight.numel() < native.SMALLEST[OP] or not is_widened(dtype, *tensors):
        return False
    # Forward leaves few rows to torch, as in generation; it does so by itself in less time.
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return learns or rows >= FEW or weight.dtype != dtype
