"""Cross-entropy: schema, checks, fake, autograd, and the public function.

What is computed is written down as a formula in ``reference.py``.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from bigkernel import _library, registry
from bigkernel.backend import select
from bigkernel.expect import Expect, shape_of
from bigkernel.ops.cross_entropy import contest, reference
from bigkernel.ops.cross_entropy.checks import check_labels, check_options

_EXPECT = Expect("cross_entropy")
# logits [N, V]; labels [N] int64, or [N, V] probabilities; weight [V] float32; losses [N] and total
# [] and stats [2, N] float32 (float64 for float64 logits); scale [N], of their dtype: the gradient
# of each loss.
_OPTIONS = "SymInt ignore_index, float smoothing, float z_loss, float softcap"
_SCHEMA_FWD = (
    f"(Tensor logits, Tensor labels, Tensor? weight, {_OPTIONS}) "
    "-> (Tensor losses, Tensor total, Tensor stats)"
)
_SCHEMA_BWD = (
    f"(Tensor scale, Tensor logits, Tensor labels, Tensor? weight, Tensor stats, {_OPTIONS}) "
    "-> Tensor"
)
_SCHEMA_INPLACE = (
    "(Tensor scale, Tensor(a!) logits, Tensor labels, Tensor? weight, Tensor stats, "
    f"{_OPTIONS}) -> ()"
)


def _fake_fwd(
    logits: Tensor, labels: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    n = logits.shape[0]
    shapes: list[Any] = [(n,), (), (2, n)]
    losses, total, stats = (logits.new_empty(shape, dtype=dtype) for shape in shapes)
    return losses, total, stats


def _fake_bwd(scale: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_inplace(*arguments: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, weight, *ctx.options = inputs
    ctx.save_for_backward(logits, labels, weight, output[2])
    ctx.set_materialize_grads(False)


def _scale(ctx: Any, dlosses: Tensor | None, dtotal: Tensor | None) -> Tensor | None:
    """The gradient of each row's loss, from that of the losses and that of their sum."""
    stats = ctx.saved_tensors[3]
    if dtotal is not None:
        dtotal = dtotal.expand(stats.shape[1])
        return (dtotal if dlosses is None else dlosses + dtotal).contiguous()
    return None if dlosses is None else dlosses.contiguous()


def _autograd(ops: Any) -> tuple[Any, Any]:
    def backward(ctx: Any, dlosses: Tensor | None, dtotal: Tensor | None, _: Any) -> Any:
        scale = _scale(ctx, dlosses, dtotal)
        dlogits = None
        if scale is not None:
            dlogits = _library.run(
                ops, "cross_entropy_bwd", scale, *ctx.saved_tensors, *ctx.options
            )
        return dlogits, *[None] * (2 + len(ctx.options))

    return backward, _setup_context


_OP = registry.register(
    registry.Op(
        noun="cross_entropy",
        title="cross-entropy of given logits, forward, backward and backward in place",
        functions=(
            registry.Function(
                "cross_entropy_fwd", _SCHEMA_FWD, reference.cross_entropy_fwd, _fake_fwd, _autograd
            ),
            registry.Function(
                "cross_entropy_bwd",
                _SCHEMA_BWD,
                reference.cross_entropy_bwd,
                _fake_bwd,
                registry.no_second_derivative("cross_entropy"),
            ),
            registry.Function(
                "cross_entropy_bwd_",
                _SCHEMA_INPLACE,
                reference.cross_entropy_bwd_inplace,
                _fake_inplace,
            ),
        ),
        absent={"cuda": "only the CPU kernels are written so far"},
        in_models={"cross_entropy": registry.InModels(contest.SMALLEST, compiled=True)},
        contests=contest.contests(lambda *tensors: cross_entropy(*tensors)),
    )
)


class _InPlace(torch.autograd.Function):
    """The gradient is written over the logits, and they are marked as changed.

    Whoever has kept them too, this function at a second backward included, gets autograd's error.
    """

    @staticmethod
    def forward(ctx: Any, ops: Any, *arguments: Any) -> Any:
        output = _library.run(ops, "cross_entropy_fwd", *arguments)
        _setup_context(ctx, arguments, output)
        ctx.ops = ops
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        scale = _scale(ctx, grads[0], grads[1])
        if scale is None:
            return (None,) * (4 + len(ctx.options))
        if torch.is_grad_enabled():
            raise NotImplementedError("bigkernel: cross_entropy has no second derivative.")
        logits, *saved = ctx.saved_tensors
        gradient = logits.detach()
        ctx.ops.cross_entropy_bwd_(scale, gradient, *saved, *ctx.options)
        torch.autograd.graph.increment_version(gradient)
        return None, gradient, *[None] * (2 + len(ctx.options))


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    overwrite_logits: bool = False,
) -> Tensor:
    """Cross-entropy of rows of logits with their labels, hard or soft.

    Args:
        logits: [N, V], float16, bfloat16, float32 or float64; any strides, evenly spaced rows are
            read in place.
        labels: [N], int64: 0 to V - 1, or ignore_index. Or [N, V], float32 or of logits's dtype:
            probabilities, which get no gradient; a teacher's, or those of mixed images.
        weight: [V], float32 or of logits's dtype, a weight for each class; gets no gradient. As in
            torch, "mean" then divides by the sum of the labels' weights, but by N with
            probabilities.
        ignore_index: rows with this label have loss 0, get no gradient and are not counted.
            Probabilities have none.
        reduction: "mean" over the rows that are not ignored (NaN if all are, as in torch), "sum" or
            "none".
        label_smoothing: 0 to 1, the share of the label's probability that all classes share.
        z_loss: at least 0; z_loss * logsumexp(logits)^2 is added to each row's loss, which keeps
            the logits from drifting (class weights do not apply to it).
        softcap: if positive, logits become softcap * tanh(logits / softcap) first (Gemma 2). 0 or
            None: off.
        overwrite_logits: backward writes the gradient into the memory of the logits, instead of new
            memory of their size, and they are lost. Autograd notices anyone else who wants them:
            an error, never a wrong gradient. Not done where it cannot be (torch.compile does so of
            its own accord; a leaf, unevenly spaced rows).

    Returns:
        A scalar, or [N] with "none", float32 (float64 for float64 logits), computed in it too:
        16-bit logits need no copy in float32. A row's bits do not depend on the batch, nor sums on
        threads. Kept for backward: the logits and two float32 a row. There is no second derivative.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and how to fix it.
    """
    _check(logits, labels, weight)
    softcap = 0.0 if softcap is None else softcap
    check_options(_EXPECT, reduction, label_smoothing, z_loss, softcap)
    soft = labels.is_floating_point()
    if not soft and not torch.compiler.is_compiling() and labels.device.type == "cpu":
        check_labels(_EXPECT, "labels", labels, ignore_index, logits.shape[1])
    if weight is not None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        weight = weight.detach().to(wide)
    ops = select("cross_entropy_fwd", logits.device, _OP.why_not_native((logits,)))
    arguments = (logits, labels, weight, ignore_index, label_smoothing, z_loss, softcap)
    if overwrite_logits and _can_overwrite(logits, labels):
        losses, total, _ = _InPlace.apply(ops, *arguments)
    else:
        losses, total, _ = _library.run(ops, "cross_entropy_fwd", *arguments)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return total
    if soft:
        return total / labels.shape[0] if labels.shape[0] else total * float("nan")
    counted = labels != ignore_index
    if weight is None:
        return total / counted.sum()
    weights = weight[labels.masked_fill(~counted, 0)].masked_fill(~counted, 0.0)
    return total / weights.sum(dtype=torch.float64).to(total.dtype)


def _can_overwrite(logits: Tensor, labels: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.is_grad_enabled()
        and logits.requires_grad
        and not logits.is_leaf
        and (logits.stride(1) == 1 or logits.shape[1] == 1)
        and (logits.stride(0) >= logits.shape[1] or logits.shape[0] == 1)
        and logits.untyped_storage().data_ptr() != labels.untyped_storage().data_ptr()
    )


def _check(logits: Tensor, labels: Tensor, weight: Tensor | None) -> None:
    expect = _EXPECT
    expect.floating({"logits": logits, "weight": weight}, ("weight",))
    if logits.dim() != 2 or logits.shape[1] < 1:
        fix = "Flatten batch and length: logits.view(-1, V), labels.view(-1)"
        raise expect.error("logits", "[N, V]", shape_of(logits), fix)
    if not isinstance(labels, Tensor) or labels.dtype not in (
        torch.int64,
        torch.float32,
        logits.dtype,
    ):
        expected = "an int64 tensor, or probabilities that are float32 or of logits's dtype"
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise expect.error("labels", expected, got, "Convert it with .long()", TypeError)
    expect.meaning("labels", labels)
    soft = labels.dtype != torch.int64
    expect.shape("labels", labels, logits.shape if soft else logits.shape[:1])
    expect.device("labels", labels, logits.device, "logits")
    if labels.requires_grad and torch.is_grad_enabled():
        fix = "Give labels.detach()"
        raise expect.error("labels", "without a gradient", "labels that require one", fix)
    if weight is not None:
        expect.shape("weight", weight, logits.shape[1:])
        allowed = (torch.float32, logits.dtype)
        expect.dtype("weight", weight, allowed, "float32 or of logits's dtype")
