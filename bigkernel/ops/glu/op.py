"""Gated linear units: schema, checks, fake, autograd, and the public function."""

from typing import Any

import torch
from torch import Tensor

from bigkernel import registry
from bigkernel._library import run
from bigkernel.backend import select
from bigkernel.expect import Expect, shape_of
from bigkernel.ops.glu import contest, reference
from bigkernel.ops.glu.reference import number_of

_EXPECT = Expect("glu")
# gate and up [.., I], or gate [.., 2 I] with up as its second half; activation: see ACTIVATIONS.
# dgate has gate's shape; dup has up's, or is empty [0].
_SCHEMA_FWD = "(Tensor gate, Tensor? up, int activation) -> Tensor"
_SCHEMA_BWD = "(Tensor dy, Tensor gate, Tensor? up, int activation) -> (Tensor dgate, Tensor dup)"


def _fake_fwd(gate: Tensor, up: Tensor | None, activation: int) -> Tensor:
    last = gate.shape[-1] // 2 if up is None else gate.shape[-1]
    return gate.new_empty((*gate.shape[:-1], last))


def _fake_bwd(
    dy: Tensor, gate: Tensor, up: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


def _autograd(ops: Any) -> tuple[Any, Any]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, ctx.activation = inputs
        ctx.save_for_backward(gate, up)

    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = run(ops, "glu_bwd", dy, gate, up, ctx.activation)
        return dgate, None if up is None else dup, None

    return backward, setup_context


_OP = registry.register(
    registry.Op(
        noun="glu",
        title="gated linear units (SwiGLU, GeGLU, ...), forward and backward",
        functions=(
            registry.Function("glu_fwd", _SCHEMA_FWD, reference.glu_fwd, _fake_fwd, _autograd),
            registry.Function(
                "glu_bwd",
                _SCHEMA_BWD,
                reference.glu_bwd,
                _fake_bwd,
                registry.no_second_derivative("glu"),
            ),
        ),
        absent={"cuda": "only the CPU kernels are written so far"},
        in_models={"glu": registry.InModels(contest.SMALLEST)},
        contests=contest.contests(lambda *tensors: glu(*tensors)),
    )
)


def glu(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    """act(gate) * up, element by element.

    Args:
        gate: [.., I], float16, bfloat16, float32 or float64; any strides, evenly spaced rows of a
            contiguous last dimension are read in place. Or, without up, [.., 2 I]: gate, then up,
            as a product with merged weights leaves them.
        up: of gate's shape and on its device. Of two dtypes the result has the one that torch
            promotes them to.
        activation: "silu" (SwiGLU), "gelu" (GeGLU, with erf), "gelu_tanh" (its approximation with
            tanh), "quick_gelu" (x * sigmoid(1.702 x)), "relu" (ReGLU), "relu2" (relu squared) or
            "sigmoid" (the first gated unit; torch.nn.functional.glu has its halves the other way
            round).

    Returns:
        [.., I], contiguous. Computed in float32 (float64 for float64 inputs) and rounded once. Kept
        for backward: the arguments. There is no second derivative.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and how to fix it.
    """
    number = number_of(_EXPECT, activation)
    _EXPECT.floating({"gate": gate, "up": up}, ("up",))
    if up is None:
        if gate.dim() < 1 or gate.shape[-1] % 2 != 0:
            expected = "[.., 2 I], gate and up, as up is left out"
            raise _EXPECT.error("gate", expected, tuple(gate.shape))
    else:
        _EXPECT.shape("up", up, gate.shape, of="gate's shape")
        if gate.dim() < 1:
            raise _EXPECT.error("gate", "[.., I]", shape_of(gate))
        if gate.dtype != up.dtype:
            dtype = torch.promote_types(gate.dtype, up.dtype)
            gate, up = gate.to(dtype), up.to(dtype)
    ops = select("glu_fwd", gate.device, _OP.why_not_native((gate,)))
    y: Tensor = run(ops, "glu_fwd", gate, up, number)
    return y
