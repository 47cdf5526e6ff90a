"""linear: schema, checks, fake, autograd, and the public function.

What is computed is written down as a formula in ``reference.py``. There is no kernel: the products
are torch's of float32, beside which what else is done takes little.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkernel import _library, precision, registry
from bigkernel.expect import Expect, shape_of
from bigkernel.ops.linear import reference

_EXPECT = Expect("linear")
_PLAIN = (Tensor, torch.nn.Parameter)
NARROW = (torch.bfloat16, torch.float16)
# input [.., K], dy [.., M]; weight [M, K] and bias [M], of its dtype or float32. dinput [.., K],
# dweight [M, K] of weight's dtype, dbias [M] float32 (float64 of float64): or, where they are not
# needed, empty [0].
_SCHEMA_FWD = "(Tensor input, Tensor weight, Tensor? bias) -> Tensor"
_SCHEMA_BWD = (
    "(Tensor dy, Tensor? input, Tensor weight, bool needs_dinput, bool needs_dbias) "
    "-> (Tensor dinput, Tensor dweight, Tensor dbias)"
)


def _fake_fwd(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fake_bwd(
    dy: Tensor, input: Tensor | None, weight: Tensor, needs_dinput: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        dy.new_empty((*dy.shape[:-1], weight.shape[1]) if needs_dinput else 0),
        dy.new_empty(0) if input is None else torch.empty_like(weight),
        dy.new_empty(weight.shape[0] if needs_dbias else 0, dtype=reference.wide(dy.dtype)),
    )


def _autograd(ops: Any) -> tuple[Any, Any]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias = inputs
        # Frozen weights, as under an adapter, keep no input alive.
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        input, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dinput, dweight, dbias = _library.run(
            ops, "linear_bwd", dy, input, weight, needs[0], needs[2]
        )
        return (
            dinput if needs[0] else None,
            dweight if needs[1] else None,
            dbias.to(ctx.bias_dtype) if needs[2] else None,
        )

    return backward, setup_context


_WHY = "its products are torch's, which are at the limit there"
registry.register(
    registry.Op(
        noun="linear",
        title="linear layers of 16-bit tensors in float32, forward and backward",
        functions=(
            registry.Function(
                "linear_fwd", _SCHEMA_FWD, reference.linear_fwd, _fake_fwd, _autograd
            ),
            registry.Function(
                "linear_bwd",
                _SCHEMA_BWD,
                reference.linear_bwd,
                _fake_bwd,
                registry.no_second_derivative("linear"),
            ),
        ),
        absent={"cpu": _WHY, "cuda": _WHY},
        no_contest="which is faster is measured in each process (bigkernel.precision.multiplies)",
        in_models={"linear": registry.InModels(1 << 20, compiled=True)},
    )
)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input weight^T + bias, as torch.nn.functional.linear, of 16-bit tensors at float32's speed.

    Processors without products of 16 bits (those before AVX-512 BF16; nearly all of float16)
    multiply float32 faster than what torch does there, several times in forward and up to a hundred
    times in backward. There, tensors stay of 16 bits, what is multiplied is widened chunk by chunk,
    and results are rounded once. Everywhere else this is torch's function: for float32 and float64,
    on other devices, and where the processor has such products, which is measured once
    (bigkernel.precision.multiplies).

    Args:
        input: [.., K], float16, bfloat16, float32 or float64; any strides. Inside torch.autocast
            it is converted as torch.nn.functional.linear has it.
        weight: [M, K], of input's dtype; any strides. Inside torch.autocast float32 weights are
            not rounded to 16 bits, nor are their gradients.
        bias: [M], of input's dtype.

    Returns:
        [.., M], contiguous. Kept for backward: the weight, and the input where the weight asks for
        a gradient. Where it is widened there is no second derivative, and matrix products are
        torch's: their bits may depend on the number of threads.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and how to fix it.
    """
    _EXPECT.floating({"input": input, "weight": weight, "bias": bias}, ("bias",))
    if input.dim() < 1:
        raise _EXPECT.error("input", "[.., K]", shape_of(input))
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        raise _EXPECT.error("weight", f"[M, {input.shape[-1]}]", shape_of(weight))
    if bias is not None:
        _EXPECT.shape("bias", bias, weight.shape[:1])
    dtype = precision.autocast_dtype(input.device.type)
    if dtype is None:
        for name, x in (("weight", weight), ("bias", bias)):
            if x is not None and x.dtype != input.dtype:
                expected = f"of input's dtype, {input.dtype}"
                fix = "Convert one of them, or call linear inside torch.autocast"
                raise _EXPECT.error(name, expected, x.dtype, fix, TypeError)
        dtype = input.dtype
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not is_widened(dtype, *tensors):
        return F.linear(input, weight, bias)
    input, weight = input.to(dtype), _kept(weight, dtype)
    bias = None if bias is None else _kept(bias, dtype)
    y: Tensor = _library.run(_library.OPS, "linear_fwd", input, weight, bias)
    return y


def is_widened(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether a product of these in ``dtype`` is computed in float32, and not by torch."""
    return (
        dtype in NARROW
        and all(
            x.device.type == "cpu" and type(x) in _PLAIN and x.dtype != torch.float64
            for x in tensors
        )
        # What a transform of torch.func follows, or forward mode, is torch's own.
        and not _library.is_followed()
        and not precision.multiplies(torch.device("cpu"), dtype)
    )


def _kept(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == torch.float32 else x.to(dtype)
