"""A bias and the activation after it: schema, checks, fake, autograd, and the public function."""

from typing import Any

from torch import Tensor

from bigkernel import registry
from bigkernel._library import run
from bigkernel.backend import select
from bigkernel.expect import Expect, shape_of
from bigkernel.ops.bias_act import contest, reference
from bigkernel.ops.glu.reference import number_of

_EXPECT = Expect("bias_act")
# x [.., D]; bias [D] float32 (float64 with x); activation: see ACTIVATIONS of glu.
_SCHEMA_FWD = "(Tensor x, Tensor? bias, int activation) -> Tensor"
# dbias is bias's, or empty [0] where it is not needed.
_SCHEMA_BWD = (
    "(Tensor dy, Tensor x, Tensor? bias, int activation, bool needs_dbias) "
    "-> (Tensor dx, Tensor dbias)"
)


def _fake_fwd(x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    return x.new_empty(x.shape)


def _fake_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: int, needs_dbias: bool
) -> tuple[Tensor, Tensor]:
    dbias = x.new_empty(x.shape[-1] if needs_dbias else 0, dtype=reference.wide(x))
    return x.new_empty(x.shape), dbias


def _autograd(ops: Any) -> tuple[Any, Any]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, ctx.activation = inputs
        ctx.save_for_backward(x, bias)

    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[1]
        dx, dbias = run(ops, "bias_act_bwd", dy, x, bias, ctx.activation, needed)
        return dx, dbias if needed else None, None

    return backward, setup_context


_OP = registry.register(
    registry.Op(
        noun="bias_act",
        title="bias and activation (GELU, squared ReLU, ...) in one pass, forward and backward",
        functions=(
            registry.Function(
                "bias_act_fwd", _SCHEMA_FWD, reference.bias_act_fwd, _fake_fwd, _autograd
            ),
            registry.Function(
                "bias_act_bwd",
                _SCHEMA_BWD,
                reference.bias_act_bwd,
                _fake_bwd,
                registry.no_second_derivative("bias_act"),
            ),
        ),
        in_models={"bias_act": registry.InModels(contest.SMALLEST)},
        contests=contest.contests(lambda *tensors, **rest: bias_act(*tensors, **rest)),
    )
)


def bias_act(x: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """act(x + bias), element by element.

    Args:
        x: [.., D], float16, bfloat16, float32 or float64; any strides, evenly spaced rows of a
            contiguous last dimension are read in place.
        bias: [D], of any of these dtypes and on x's device; None: none.
        activation: "gelu" (with erf), "gelu_tanh" (its approximation with tanh), "quick_gelu"
            (x * sigmoid(1.702 x), of CLIP), "relu", "relu2" (relu squared, of Primer and Nemotron),
            "silu" or "sigmoid".

    Returns:
        of x's shape and dtype, contiguous. Computed in float32 (float64 for float64 inputs), the
        sum too, and rounded once. Kept for backward: the arguments. The gradient of bias is summed
        in float32 from unrounded terms. There is no second derivative.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and how to fix it.
    """
    number = number_of(_EXPECT, activation)
    _EXPECT.floating({"x": x, "bias": bias}, ("bias",))
    if x.dim() < 1:
        raise _EXPECT.error("x", "[.., D]", shape_of(x))
    if bias is not None:
        _EXPECT.shape("bias", bias, x.shape[-1:], of="x's last dimension,")
        bias = bias.to(reference.wide(x))
    ops = select("bias_act_fwd", x.device, _OP.why_not_native((x,)))
    y: Tensor = run(ops, "bias_act_fwd", x, bias, number)
    return y
