"""linear_cross_entropy: schema, checks, fake, autograd, and the public function.

What is computed is written down as a formula in ``reference.py``. Forward makes the gradients of
the reduced loss with the loss, since a chunk's logits are at hand then; backward scales them. For
losses that are not reduced, backward makes the logits again.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from bigkernel import _library, precision, registry
from bigkernel.backend import select
from bigkernel.expect import Expect, shape_of
from bigkernel.ops.cross_entropy.checks import check_labels, check_options
from bigkernel.ops.linear_cross_entropy import contest, reference

_NAME = "linear_cross_entropy"
_EXPECT = Expect(_NAME)
# input [N, D]; linear_weight [V, D] and linear_bias [V], of its dtype or float32; target [N] int64,
# or [N, V]; weight [V] and divisor [] float32. losses [N], total [], stats [2, N], dlinear_weight
# [V, D], dlinear_bias [V]: float32. float64 for float64 inputs in place of all float32. dinput [N,
# D]. What is not asked for is empty [0]. scale [N]: the gradient of each loss.
_OPTIONS = (
    "SymInt ignore_index, float smoothing, float z_loss, float softcap, "
    "bool input_gradient, bool weight_gradient, bool bias_gradient"
)
_INPUTS = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight"
_GRADIENTS = "Tensor dinput, Tensor dlinear_weight, Tensor dlinear_bias"
_SCHEMA_FWD = (
    f"({_INPUTS}, Tensor? divisor, {_OPTIONS}) "
    f"-> (Tensor losses, Tensor total, Tensor stats, {_GRADIENTS})"
)
_SCHEMA_BWD = f"(Tensor scale, {_INPUTS}, Tensor stats, {_OPTIONS}) -> ({_GRADIENTS})"


def _fake_gradients(input: Tensor, linear_weight: Tensor, wanted: Any) -> tuple[Tensor, ...]:
    wide = reference.wide(input.dtype)
    kinds = (
        (input.shape, reference.dtype_of_dinput(input.dtype)),
        (linear_weight.shape, wide),
        (linear_weight.shape[:1], wide),
    )
    return tuple(
        input.new_empty(shape if want else (0,), dtype=dtype)
        for (shape, dtype), want in zip(kinds, wanted, strict=True)
    )


def _fake_fwd(input: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    n, dtype = input.shape[0], reference.wide(input.dtype)
    shapes: list[Any] = [(n,), (), (2, n)]
    results = [input.new_empty(shape, dtype=dtype) for shape in shapes]
    return *results, *_fake_gradients(input, linear_weight, rest[-3:])


def _fake_bwd(
    scale: Tensor, input: Tensor, linear_weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _fake_gradients(input, linear_weight, rest[-3:])


def _autograd(ops: Any) -> tuple[Any, Any]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.made = inputs[:6], inputs[-3:]
        ctx.options = inputs[6:-3]
        ctx.save_for_backward(*tensors[0], *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dlosses: Tensor | None, dtotal: Tensor | None, *_: Any) -> Any:
        *inputs, divisor, stats, dinput, dweight, dbias = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        nothing = (None,) * (6 + len(ctx.options))
        if dlosses is None and dtotal is None:
            return *(None,) * 3, *nothing
        made = all(made for made, want in zip(ctx.made, wanted, strict=True) if want)
        if dlosses is None and made and not torch.is_grad_enabled():
            assert dtotal is not None
            factor: Tensor | None = dtotal
            gradients: Any = (dinput, dweight, dbias)
        else:
            # Also for a second derivative, which the operator refuses.
            scale = dlosses
            if dtotal is not None:
                every = (dtotal if divisor is None else dtotal / divisor).expand(stats.shape[1])
                scale = every if dlosses is None else dlosses + every
            assert scale is not None
            factor = None
            gradients = _library.run(
                ops,
                f"{_NAME}_bwd",
                scale.contiguous(),
                *inputs,
                stats,
                *ctx.options,
                *wanted,
            )
        results = (
            _scaled(gradient, factor, x.dtype) if want else None
            for gradient, x, want in zip(gradients, inputs[:3], wanted, strict=True)
        )
        return *results, *nothing

    return backward, setup_context


def _scaled(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gradient * factor, in its own memory where nobody will ask for it again."""
    if factor is None:
        return gradient.to(dtype)
    if (
        torch.compiler.is_compiling()
        or type(gradient) is not Tensor
        or type(factor) is not Tensor
        or torch._C._autograd._get_current_graph_task_keep_graph()
    ):
        return (gradient * factor).to(dtype)
    gradient = gradient.detach()
    if factor.device.type != "cpu" or factor.item() != 1:
        gradient.mul_(factor)
    return gradient.to(dtype)


_OP = registry.register(
    registry.Op(
        noun=_NAME,
        title="linear layer and cross-entropy in chunks of rows, forward and backward",
        functions=(
            registry.Function(
                f"{_NAME}_fwd",
                _SCHEMA_FWD,
                reference.linear_cross_entropy_fwd,
                _fake_fwd,
                _autograd,
            ),
            registry.Function(
                f"{_NAME}_bwd",
                _SCHEMA_BWD,
                reference.linear_cross_entropy_bwd,
                _fake_bwd,
                registry.no_second_derivative(_NAME),
            ),
        ),
        in_models={
            _NAME: registry.InModels(contest.SMALLEST, compiled=True, contested=contest.CONTESTED)
        },
        contests=contest.contests(lambda *tensors: linear_cross_entropy(*tensors)),
        absent={"cuda": "only the CPU kernels are written so far"},
    )
)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the results of a linear layer: a language model's head and its loss.

    The logits of all rows never exist at once: a sixteenth of them do, of which the gradients of
    the loss are made too. No gradient is left out. Arguments are those of
    torch.nn.functional.linear_cross_entropy, without its options.

    Args:
        input: [.., D], float16, bfloat16, float32 or float64; any strides, evenly spaced rows are
            read in place. Inside torch.autocast it, linear_weight and linear_bias are converted as
            torch.nn.functional.linear has them.
        linear_weight: [V, D], of input's dtype.
        target: [..], int64: 0 to V - 1, or ignore_index. Or [.., V], of input's dtype or float32:
            probabilities, which get no gradient.
        linear_bias: [V], of input's dtype.
        weight: [V], float32 or of input's dtype, a weight for each class; gets no gradient. As in
            torch, "mean" then divides by the sum of the labels' weights.
        reduction: "mean" over the rows that are not ignored (NaN if all are, as in torch), "sum" or
            "none".
        ignore_index: rows with this label have loss 0, get no gradient and are not counted, and
            cost nothing. None: -100. Probabilities have none.
        label_smoothing: 0 to 1, the share of the label's probability that all classes share.
        z_loss: at least 0; z_loss * logsumexp(logits)^2 is added to each row's loss, which keeps
            the logits from drifting (class weights do not apply to it).
        softcap: if positive, logits become softcap * tanh(logits / softcap) first (Gemma 2). 0 or
            None: off.
        num_items: what "mean" divides by instead: the items of all micro-batches of a step.

    Returns:
        A scalar, or [..] with "none", float32 (float64 for float64 inputs). Where gradients are
        needed they are made with a loss that is reduced, and kept for backward: of input's size,
        and of linear_weight's in float32, in which it is summed. With "none" backward makes the
        logits again. Deterministic; sums over rows do not depend on threads, matrix products are
        torch's. There is no second derivative.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and how to fix it.
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    input, linear_weight, linear_bias = _autocast(input, linear_weight, linear_bias)
    _check(input, linear_weight, target, linear_bias, weight)
    softcap = 0.0 if softcap is None else softcap
    check_options(_EXPECT, reduction, label_smoothing, z_loss, softcap)
    classes = linear_weight.shape[0]
    soft = target.is_floating_point()
    rows = target.reshape(-1, classes) if soft else target.reshape(-1)
    if not soft and not torch.compiler.is_compiling() and target.device.type == "cpu":
        check_labels(_EXPECT, "target", rows, ignore_index, classes)
    wide = reference.wide(input.dtype)
    weight = None if weight is None else weight.detach().to(wide)
    divisor = None
    if num_items is not None:
        _EXPECT(reduction == "mean", "num_items", "None, as the reduction is not 'mean'", num_items)
        divisor = _number(num_items, input, wide)
    elif reduction == "mean":
        divisor = _count(rows, weight, ignore_index).to(wide)
    leaves = (input, linear_weight, linear_bias)
    ahead = reduction != "none" and torch.is_grad_enabled() and not _library.is_followed()
    wanted = [ahead and x is not None and x.requires_grad for x in leaves]
    ops = select(f"{_NAME}_fwd", input.device, _OP.why_not_native((input,)))
    losses, total, *_ = _library.run(
        ops,
        f"{_NAME}_fwd",
        input.reshape(-1, input.shape[-1]),
        linear_weight,
        linear_bias,
        rows,
        weight,
        divisor,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        *wanted,
    )
    result: Tensor = losses.view(input.shape[:-1]) if reduction == "none" else total
    return result


def _count(rows: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What "mean" divides by."""
    if rows.dim() == 2:
        return torch.full((), rows.shape[0], device=rows.device)
    counted = rows != ignore_index
    if weight is None:
        return counted.sum()
    weights = weight[rows.masked_fill(~counted, 0)].masked_fill(~counted, 0.0)
    return weights.sum(dtype=torch.float64)


def _number(number: int | float | Tensor, input: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(number, Tensor):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise _EXPECT.error("num_items", "a number or a tensor of one", number, cls=TypeError)
        return torch.full((), number, dtype=dtype, device=input.device)
    _EXPECT(number.numel() == 1, "num_items", "one number", shape_of(number))
    return number.detach().to(input.device, dtype).reshape(())


def _autocast(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inside torch.autocast, the input in its dtype.

    The operator converts the others itself: so their gradients are not rounded to 16 bits on the
    way.
    """
    if not isinstance(input, Tensor):
        return input, linear_weight, linear_bias
    dtype = precision.autocast_dtype(input.device.type)
    if dtype is None:
        return input, linear_weight, linear_bias

    def cast(x: Any, kept: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x if x.dtype == kept else x.to(dtype)

    return cast(input, dtype), cast(linear_weight, torch.float32), cast(linear_bias, torch.float32)


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
) -> None:
    named = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    named["weight"] = weight
    _EXPECT.floating(named, ("linear_bias", "weight"))
    _EXPECT(input.dim() >= 1 and input.shape[-1] >= 1, "input", "[.., D]", shape_of(input))
    if (
        linear_weight.dim() != 2
        or linear_weight.shape[0] < 1
        or linear_weight.shape[1] != input.shape[-1]
    ):
        raise _EXPECT.error("linear_weight", f"[V, {input.shape[-1]}]", shape_of(linear_weight))
    classes = linear_weight.shape[0]
    for name, x in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if x is not None and x.dtype != input.dtype and not _is_wide_in_autocast(x, input):
            expected = f"of input's dtype, {input.dtype}"
            fix = f"Convert one of them, or call {_NAME} inside torch.autocast"
            raise _EXPECT.error(name, expected, x.dtype, fix, TypeError)
    for name, x in (("linear_bias", linear_bias), ("weight", weight)):
        if x is not None:
            _EXPECT.shape(name, x, linear_weight.shape[:1])
    if weight is not None:
        allowed = (torch.float32, input.dtype)
        _EXPECT.dtype("weight", weight, allowed, "float32 or of input's dtype")
    _check_target(input, target, classes)


def _check_target(input: Tensor, target: Tensor, classes: int) -> None:
    kinds = (torch.int64, torch.float32, input.dtype)
    if not isinstance(target, Tensor) or target.dtype not in kinds:
        expected = "an int64 tensor, or probabilities that are float32 or of input's dtype"
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise _EXPECT.error("target", expected, got, "Convert it with .long()", TypeError)
    _EXPECT.meaning("target", target)
    lead = tuple(input.shape[:-1])
    _EXPECT.shape("target", target, lead if target.dtype == torch.int64 else (*lead, classes))
    _EXPECT.device("target", target, input.device, "input")
    if target.requires_grad and torch.is_grad_enabled():
        fix = "Give target.detach(), or use torch.nn.functional, where it gets one"
        one = "one that asks for a gradient"
        raise _EXPECT.error("target", "without requires_grad", one, fix)


def _is_wide_in_autocast(x: Tensor, input: Tensor) -> bool:
    return x.dtype == torch.float32 and input.dtype == precision.autocast_dtype(input.device.type)
