"""RMS norm and layer norm: schema, checks, fake, autograd, and the public functions.

What is computed is written down as a formula in ``reference.py``.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from bigkernel import registry
from bigkernel._library import run
from bigkernel.backend import select
from bigkernel.expect import Expect, shape_of
from bigkernel.ops.norm import contest, reference

_RMS, _LAYER = Expect("rms_norm"), Expect("layer_norm")
_OPTIONAL = ("residual", "weight", "bias")
# x and residual [.., D]; weight and bias [D]. The sum is empty [0] where there is no residual;
# stats [1, ..] float32 (float64 for float64 inputs), rstd, or [2, ..], rstd and mean, with center.
_SCHEMA_FWD = (
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float offset, "
    "bool center, bool round_first) -> (Tensor y, Tensor sum, Tensor stats)"
)
# h: x, or the sum. dsum: what came to the sum from elsewhere. dweight and dbias are float32
# (float64), [D] or, where they are not needed, empty [0].
_SCHEMA_BWD = (
    "(Tensor dy, Tensor? dsum, Tensor h, Tensor? weight, Tensor stats, float offset, bool center, "
    "bool needs_dweight, bool needs_dbias) -> (Tensor dh, Tensor dweight, Tensor dbias)"
)


def _fake_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    round_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    stats_dtype = reference.accumulate_dtype(total, weight)
    if round_first and weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    stats = x.new_empty((2 if center else 1, *x.shape[:-1]), dtype=stats_dtype)
    return x.new_empty(x.shape, dtype=dtype), total, stats


def _fake_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    offset: float,
    center: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dim = h.shape[-1]
    return (
        h.new_empty(h.shape),
        stats.new_empty(dim if needs_dweight else 0),
        stats.new_empty(dim if needs_dbias else 0),
    )


def _autograd(ops: Any) -> tuple[Any, Any]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, bias, _, offset, center, _ = inputs
        _, total, stats = output
        ctx.save_for_backward(x if residual is None else total, weight, stats)
        ctx.scalars = offset, center
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias)]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, _: Any) -> tuple[Any, ...]:
        h, weight, stats = ctx.saved_tensors
        x_dtype, residual_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if residual_dtype is None:
            dsum = None
        if dy is None:  # only the sum was used
            dh, dweight, dbias = dsum, None, None
        else:
            needs = ctx.needs_input_grad
            dh, dweight, dbias = run(
                ops, "norm_bwd", dy, dsum, h, weight, stats, *ctx.scalars, needs[2], needs[3]
            )
            dweight = dweight.to(weight_dtype) if needs[2] else None
            dbias = dbias.to(bias_dtype) if needs[3] else None
        dx = None if dh is None else dh.to(x_dtype)
        dresidual = None if dh is None or residual_dtype is None else dh.to(residual_dtype)
        return dx, dresidual, dweight, dbias, None, None, None, None

    return backward, setup_context


_OP = registry.register(
    registry.Op(
        noun="norm",
        title="RMS norm and layer norm with residual, forward and backward",
        functions=(
            registry.Function("norm_fwd", _SCHEMA_FWD, reference.norm_fwd, _fake_fwd, _autograd),
            registry.Function(
                "norm_bwd",
                _SCHEMA_BWD,
                reference.norm_bwd,
                _fake_bwd,
                registry.no_second_derivative("rms_norm and layer_norm"),
            ),
        ),
        absent={"cuda": "only the CPU kernels are written so far"},
        in_models={
            "rms_norm": registry.InModels(0),
            # With a residual before it; alone, torch's is as fast at any size.
            "layer_norm": registry.InModels(contest.SMALLEST_LAYER),
        },
        contests=contest.contests(
            lambda *tensors, **rest: rms_norm(*tensors, **rest),
            lambda *tensors, **rest: layer_norm(*tensors, **rest),
        ),
    )
)


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: None = ...,
    offset: float = ...,
    casting: Literal["llama", "gemma"] = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: Tensor,
    offset: float = ...,
    casting: Literal["llama", "gemma"] = ...,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    casting: Literal["llama", "gemma"] = "llama",
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension.

    Args:
        x: [.., D], float16, bfloat16, float32 or float64; any strides, evenly spaced rows of a
            contiguous last dimension are read in place.
        weight: [D], of any of these dtypes; None: 1.
        eps: added to the mean square; at least 0.
        residual: of x's shape: x + residual is what is normalised, and is returned as well. The sum
            has the dtype that torch promotes the two to, and is rounded to it before it is
            normalised.
        offset: added to weight in float32: 1 for Gemma, whose weights are stored around 0.
        casting: what is rounded, for 16-bit inputs. "llama": the normalised row to its dtype, then
            the product with weight, to the dtype that torch promotes both to. "gemma": the product
            alone, to the row's dtype; `torch.nn.functional.rms_norm` does so too.

    Returns:
        y [.., D], contiguous; with residual (y, x + residual).

    Rows are normalised in float32 (float64 for float64 inputs). A row's bits depend on nothing but
    the row. The gradient of weight is summed in float32 and in an order that depends on the shape
    alone, not on threads. Kept for backward: x, or the sum, and one float32 a row. There is no
    second derivative.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and how to fix it.
    """
    _RMS.one_of("casting", casting, "llama", "gemma")
    y, total = _norm(_RMS, x, residual, weight, None, eps, offset, False, casting == "llama")
    return y if residual is None else (y, total)


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: None = ...,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: Tensor,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    Args:
        x: as for `rms_norm`; weight, bias: [D] or None (1 and 0); residual: as for `rms_norm`.

    Returns:
        y [.., D], contiguous, in x's dtype (with residual: the sum's), rounded once; with residual
        (y, x + residual). What `rms_norm` says of dtypes, bits, gradients and memory holds here;
        two float32 a row are kept.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and how to fix it.
    """
    y, total = _norm(_LAYER, x, residual, weight, bias, eps, 0.0, True, False)
    return y if residual is None else (y, total)


def _norm(
    expect: Expect,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    round_first: bool,
) -> tuple[Tensor, Tensor]:
    """Check the arguments, pick the backend and call its op: (y, sum)."""
    _check(expect, x, residual, weight, bias)
    fits = isinstance(eps, (int, float)) and 0 <= eps < float("inf")
    expect(fits, "eps", "a finite number of at least 0", eps)
    # Two dtypes that the kernels don't mix themselves; a float32 residual they do.
    if residual is not None and residual.dtype not in (x.dtype, torch.float32):
        x, residual = _promoted(x, residual)
    tensors = [t for t in (x, residual, weight, bias) if t is not None]
    ops = select("norm_fwd", x.device, _OP.why_not_native(tensors))
    y, total, _ = run(ops, "norm_fwd", x, residual, weight, bias, eps, offset, center, round_first)
    return y, total


def _promoted(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def _check(
    expect: Expect, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> None:
    named = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    expect.floating(named, _OPTIONAL)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise expect.error("x", "[.., D] with D of at least 1", shape_of(x))
    if residual is not None:
        expect.shape("residual", residual, x.shape, of="x's shape")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != x.shape[-1:]:
            raise expect.error(name, f"of shape ({x.shape[-1]},), as x's rows", tuple(t.shape))
