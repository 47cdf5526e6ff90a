"""Linear layers of one input run as one product: q, k and v of attention, gate and up of an MLP.

Under autocast each of them would round the input again, keep its own copy of that for backward, and
give a gradient of the input to be widened and added. One product does each of these once, and the
processor multiplies a wide matrix faster than narrow ones. The weights stay as they are: they are
put together and rounded in every forward, which autocast does with each of them anyway. Without
autocast there is nothing to round, and they are left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bigkernel import _library, precision
from bigkernel.integrations import native

OP = "projections"
_PLAIN = (Tensor, nn.Parameter)


def may_join(module: nn.Module) -> bool:
    """Whether this is a linear layer that runs torch's own code."""
    return type(module) is nn.Linear and "forward" not in vars(module)


def project(x: Any, *linears: Any) -> tuple[Any, ...]:
    """What each of some linear layers gives for x."""
    return split(product(x, *linears), x, *linears)


def split(joined: Tensor | None, x: Any, *linears: Any) -> tuple[Any, ...]:
    """The parts of their `product`, or what each gives by itself where there is none."""
    if joined is None:
        return tuple(linear(x) for linear in linears)
    sizes = [linear.weight.shape[0] for linear in linears]
    # Not views of one another: what is changed in place later is nobody else's.
    return torch.unsafe_split_with_sizes(joined, sizes, -1)


def product(x: Any, *linears: Any) -> Tensor | None:
    """What they give side by side in the last dimension; None where that is not to be one product.

    On GPUs it is not: there it has not been measured.
    """
    if (
        type(x) not in _PLAIN
        or x.device.type != "cpu"
        or not torch.is_grad_enabled()
        or not _library.is_usual()
    ):
        return None
    dtype = precision.autocast_dtype("cpu")
    if dtype is None or x.dim() < 2 or not x.is_floating_point():
        return None
    first = linears[0]
    for linear in linears:
        if not may_join(linear) or native.is_watched(linear):
            return None
        weight, bias = linear.weight, linear.bias
        if not (
            _rounded_by_autocast(weight, dtype)
            and weight.shape[1] == x.shape[-1]
            and (bias is None) == (first.bias is None)
            and (bias is None or _rounded_by_autocast(bias, dtype))
        ):
            return None
    weight = torch.cat([linear.weight for linear in linears]).to(dtype)
    bias = None
    if first.bias is not None:
        bias = torch.cat([linear.bias for linear in linears]).to(dtype)
    return functional.linear(x.to(dtype), weight, bias)


def _rounded_by_autocast(x: Any, dtype: torch.dtype) -> bool:
    """Whether this is a plain float32 parameter that learns, of which autocast makes another."""
    return (
        type(x) in _PLAIN
        and x.device.type == "cpu"
        and x.dtype == torch.float32 != dtype
        and x.requires_grad
    )
