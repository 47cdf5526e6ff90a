"""scale * x + y, element by element: the smallest op with a kernel of its own."""

from typing import Any

import torch
from torch import Tensor

from bigkernel import registry
from bigkernel._library import run
from bigkernel.backend import select
from bigkernel.expect import Expect

__all__ = ["scale_add"]

_EXPECT = Expect("scale_add")


def _impl(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return torch.add(y, x, alpha=scale)


def _fake(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape)


def _autograd(ops: Any) -> tuple[Any, Any]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.scale = inputs[2]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return ctx.scale * grad, grad, None

    return backward, setup_context


_OP = registry.register(
    registry.Op(
        noun="scale_add",
        title="scaled addition",
        functions=(
            registry.Function(
                "scale_add", "(Tensor x, Tensor y, float scale) -> Tensor", _impl, _fake, _autograd
            ),
        ),
        absent={"cuda": "it is an example"},
        dtypes=(torch.float32,),
    )
)


def scale_add(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """scale * x + y for x and y [...] of one shape and one dtype, float16 to float64.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which.
    """
    _EXPECT.floating({"x": x, "y": y})
    _EXPECT.shape("y", y, x.shape, of="x's shape")
    _EXPECT.like("y", y, "x", x)
    ops = select("scale_add", x.device, _OP.why_not_native((x,)))
    result: Tensor = run(ops, "scale_add", x, y, scale)
    return result
