"""The Adam op: one call updates a whole list of tensors, clipping and unscaling included.

Two ops are registered. ``adam_norm`` is the global gradient norm on its own, for callers who must
combine it over devices or ranks. ``adam_step_`` is the step:

- ``params`` .. ``steps`` are lists with one entry per tensor, except ``max_exp_avg_sqs``, which has
  one for each tensor of an amsgrad group, and ``masters``, which is empty or has one for each
  parameter of 16 or 8 bits. Group i owns the next ``group_sizes[i]`` tensors and the i-th entry of
  each hyper-parameter list; ``flags`` is a sum of AMSGRAD, MAXIMIZE and DECOUPLED. ``lr_tensors``
  is empty or has one learning rate per group, which then counts instead of ``lrs``.
- Gradients are only read. They are divided by ``grad_scale``; with ``max_norm`` they are clipped by
  the norm over all groups (``total_norm`` if given), and a norm that is not finite skips the step.
  So does a ``found_inf`` that is not 0. A skipped step changes nothing, step counts included.
- ``seed`` asks for stochastic rounding of bf16 parameters that have no master copy.
- The result is the norm before clipping, 0-d, or an empty tensor when ``max_norm`` is None.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

from bigkernel import _library, backend, registry
from bigkernel.errors import BadArgument, has_tangent
from bigkernel.expect import Expect
from bigkernel.ops.adam import reference
from bigkernel.ops.adam.reference import AMSGRAD, DECOUPLED, MAXIMIZE, StepArguments

__all__ = ["AdamGroup", "adam_groups_step_", "adam_norm", "adam_step_"]

_NORM, _STEP = Expect("adam_norm"), Expect("adam_step_")
# The lists of a group, in the op's order.
TENSORS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "steps")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *reference.FLOAT8)
_WIDE = (torch.float32, torch.float64)
_SPARSE = "Adam takes dense gradients: use torch.optim.SparseAdam, or Embedding(sparse=False)"


def _norm_fake(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
    return grads[0].new_empty((), dtype=reference.norm_dtype(grads))


def _step_fake(*given: Any) -> Tensor:
    call = StepArguments(*given)
    shape = (0,) if call.max_norm is None else ()
    return call.params[0].new_empty(shape, dtype=reference.norm_dtype(call.grads))


_OP = registry.register(
    registry.Op(
        noun="adam",
        title="Adam, AdamW",
        functions=(
            registry.Function(
                "adam_norm",
                "(Tensor[] grads, Tensor? grad_scale) -> Tensor",
                reference.adam_norm,
                _norm_fake,
            ),
            registry.Function(
                "adam_step_",  # StepArguments, in their order
                "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
                "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, "
                "Tensor(f!)[] steps, int[] group_sizes, int[] flags, float[] lrs, "
                "Tensor[] lr_tensors, float[] beta1s, float[] beta2s, float[] epss, "
                "float[] weight_decays, float? max_norm, Tensor? total_norm, Tensor? grad_scale, "
                "Tensor? found_inf, Tensor? seed) -> Tensor",
                reference.adam_step_,
                _step_fake,
            ),
        ),
        no_contest="both move the same memory, and torch's steps neither clip nor round by chance",
    )
)


@dataclass(slots=True)
class AdamGroup:
    """Tensors that share hyper-parameters. Each list has one entry per parameter.

    ``max_exp_avg_sqs`` is for amsgrad only; ``masters`` holds fp32 copies of the 16-bit and 8-bit
    parameters (of all of them, over all groups, or of none), in order.
    """

    lr: float | Tensor = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False
    decoupled: bool = True
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)


def launch(
    groups: Sequence[AdamGroup],
    *,
    max_norm: float | None = None,
    total_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: Tensor | int | None = None,
) -> Tensor | None:
    """``adam_groups_step_`` without the Python checks, for the optimizer.

    Its state fits by construction; what memory safety depends on is checked again in C++. A
    ``seed`` that is a number becomes a tensor where a parameter needs it.
    """
    lists = _lists(groups)
    params, grads = lists[:2]
    if not params:
        return None if max_norm is None else no_norm()
    device = params[0].device
    lrs, lr_tensors = _learning_rates(groups, device)
    dtypes = {p.dtype for p in params}
    if isinstance(seed, int):
        needed = torch.bfloat16 in dtypes
        seed = torch.full((), seed, dtype=torch.int64, device=device) if needed else None
    dtypes |= {g.dtype for g in grads}
    reason = None if dtypes.issubset(_OP.dtypes) else _OP.why_not_native([*params, *grads])
    namespace = backend.select("adam_step_", device, reason)
    norm: Tensor = _library.call(  # with `StepArguments`
        namespace,
        "adam_step_",
        *lists,
        [len(group.params) for group in groups],
        list(map(_flags, groups)),
        lrs,
        lr_tensors,
        [group.beta1 for group in groups],
        [group.beta2 for group in groups],
        [group.eps for group in groups],
        [group.weight_decay for group in groups],
        max_norm,
        total_norm,
        grad_scale,
        found_inf,
        seed,
    )
    if not torch.compiler.is_compiling() and not params[0].is_inference():
        # The dispatcher does not know that the op wrote: without this, a backward through a graph
        # that was recorded before the step would silently use the new values.
        torch.autograd.graph.increment_version(params)
    return None if max_norm is None else norm


def no_norm() -> Tensor:
    """Of no gradients, which have no device."""
    return torch.zeros((), dtype=torch.float32, device="cpu")


def _flags(group: AdamGroup) -> int:
    return AMSGRAD * group.amsgrad + MAXIMIZE * group.maximize + DECOUPLED * group.decoupled


def _lists(groups: Sequence[AdamGroup]) -> Sequence[list[Tensor]]:
    """Those of all groups, in the order of ``TENSORS``."""
    if len(groups) == 1:
        return [getattr(groups[0], name) for name in TENSORS]
    return [[t for group in groups for t in getattr(group, name)] for name in TENSORS]


def _learning_rates(
    groups: Sequence[AdamGroup], device: torch.device
) -> tuple[list[float], list[Tensor]]:
    """Numbers if all are numbers (or live on the CPU while the tensors do not); else tensors."""
    if len(groups) == 1 and type(groups[0].lr) is float:
        return [groups[0].lr], []
    rates = [
        float(group.lr)
        if isinstance(group.lr, Tensor) and group.lr.device.type == "cpu" != device.type
        else group.lr
        for group in groups
    ]
    numbers = [0.0 if isinstance(rate, Tensor) else float(rate) for rate in rates]
    if not any(isinstance(rate, Tensor) for rate in rates):
        return numbers, []
    return numbers, [
        (rate if rate.dtype in (torch.float32, torch.float64) else rate.to(torch.float64))
        if isinstance(rate, Tensor)
        else torch.full((), rate, dtype=torch.float64, device=device)
        for rate in rates
    ]


def adam_norm(grads: Sequence[Tensor], grad_scale: Tensor | None = None) -> Tensor:
    """The 2-norm of all gradients taken as one vector, divided by ``grad_scale``.

    ``grads`` are dense tensors of any shapes and float dtypes on one device; ``grad_scale`` is a
    tensor of one element there. Returns a 0-d float32 tensor (float64 if a gradient is), 0 for an
    empty list. The host is not synchronised.
    """
    grads = list(grads)
    if not grads:
        return no_norm()
    expect = _NORM
    _check_untransformed(expect, lambda: grads)
    for i, grad in enumerate(grads):
        _check_tensor(expect, f"grads[{i}]", grad, grads[0].device)
    _check_scalar(expect, "grad_scale", grad_scale, grads[0].device)
    if torch.is_grad_enabled() and any(grad.requires_grad for grad in grads):
        fix = "Call it under torch.no_grad(), or torch.linalg.vector_norm for its derivative"
        expected, got = "tensors without requires_grad", "one that requires a gradient"
        raise expect.error("grads", expected, got, fix, NotImplementedError)
    namespace = backend.select("adam_norm", grads[0].device, _OP.why_not_native(grads))
    norm: Tensor = namespace.adam_norm(grads, grad_scale)
    return norm


def adam_groups_step_(
    groups: Sequence[AdamGroup],
    *,
    max_norm: float | None = None,
    total_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor | None:
    """One Adam step, in place, for tensors in groups of different hyper-parameters.

    All tensors are on one device; a tensor's gradient, moments and master copy have its shape.
    Parameters and gradients are float32, bfloat16, float16 (float64, float8: PyTorch), moments
    float32 or bfloat16 (float64 for float64 parameters), masters and steps float32. Memory of any
    layout works; the same dense strides throughout avoid copies.

    Args:
        max_norm: clip the gradients to this 2-norm, taken over all groups (after unscaling), by
            ``max_norm / (norm + 1e-6)`` as ``torch.nn.utils.clip_grad_norm_`` does. A norm that is
            not finite skips the step.
        total_norm: that norm, if it is already known; a tensor of one element.
        grad_scale: gradients are divided by this tensor of one element.
        found_inf: a float32 tensor of one element; anything but 0 skips the step.
        seed: an int64 tensor of one element: bf16 parameters without a master copy are rounded
            stochastically, by random numbers that are a function of seed, step and position alone.

    Returns the norm before clipping as a 0-d tensor if ``max_norm`` was given, else None. A skipped
    step changes nothing, the step counts included. No value is read back to the host.

    Raises ValueError or TypeError, naming the tensor, for anything that does not fit.
    """
    expect = _STEP
    _check_untransformed(expect, lambda: [x for each in _lists(groups) for x in each])
    _check_groups(expect, groups)
    device = next((p.device for group in groups for p in group.params), None)
    if device is not None:
        _check_scalar(expect, "grad_scale", grad_scale, device)
        _check_scalar(expect, "found_inf", found_inf, device)
        _check_scalar(expect, "total_norm", total_norm, device)
        if seed is not None and (seed.numel(), seed.dtype, seed.device) != (1, torch.int64, device):
            got = f"{tuple(seed.shape)} {seed.dtype} on {seed.device}"
            raise expect.error("seed", f"one int64 element on {device}", got)
    expect(max_norm is None or max_norm >= 0, "max_norm", "None or at least 0", max_norm)
    if total_norm is not None and max_norm is None:
        raise expect.error("total_norm", "given only with max_norm", "total_norm alone")
    return launch(
        groups,
        max_norm=max_norm,
        total_norm=total_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        seed=seed,
    )


def adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor] | float,
    *,
    max_exp_avg_sqs: Sequence[Tensor] = (),
    masters: Sequence[Tensor] = (),
    lr: float | Tensor = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = True,
    max_norm: float | None = None,
    total_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor | None:
    """One Adam (``decoupled=False``) or AdamW step, in place, for a list of tensors.

    ``steps`` are float32 tensors of one element, one per parameter, which count the steps done so
    far and are advanced; or a number: that of this step, counted from 1. Everything else is as in
    ``adam_groups_step_``, whose only group these lists make.
    """
    params = list(params)
    if not isinstance(steps, Sequence):
        _STEP(steps >= 1, "steps", "the number of this step, from 1", steps)
        steps = [torch.full((), steps - 1.0, dtype=torch.float32, device=p.device) for p in params]
    group = AdamGroup(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
        decoupled=decoupled,
        params=params,
        grads=list(grads),
        exp_avgs=list(exp_avgs),
        exp_avg_sqs=list(exp_avg_sqs),
        steps=list(steps),
        max_exp_avg_sqs=list(max_exp_avg_sqs),
        masters=list(masters),
    )
    return adam_groups_step_(
        [group],
        max_norm=max_norm,
        total_norm=total_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        seed=seed,
    )


def _check_untransformed(expect: Expect, tensors: Callable[[], Iterable[object]]) -> None:
    """Neither the norm nor the step has a derivative; a custom op would say so by a silent 0."""
    fix = "torch.linalg.vector_norm has derivatives; torch.optim.Adam takes differentiable=True"
    cls = NotImplementedError
    expected = "outside of torch.func.grad, vjp, jvp and vmap"
    expect(maybe_current_level() is None, "the call", expected, "one inside", fix, cls)
    if forward_ad._current_level >= 0:
        dual = any(isinstance(x, Tensor) and has_tangent(x) for x in tensors())
        expect(not dual, "tensors", "without tangents", "dual ones", fix, cls)


def _check_tensor(expect: Expect, name: str, x: object, device: torch.device) -> Tensor:
    x = expect.tensor(name, x)
    expect.dense(name, x, "dense", _SPARSE, BadArgument)
    expect.dtype(name, x, _FLOATS, "of a float dtype", cls=BadArgument)
    expect.device(name, x, device)
    return x


def _check_scalar(expect: Expect, name: str, x: Tensor | None, device: torch.device) -> None:
    if x is None:
        return
    x = expect.tensor(name, x)
    if x.numel() != 1:
        raise expect.error(name, "a tensor of one element", tuple(x.shape))
    expect.dtype(name, x, _WIDE, "float32", cls=BadArgument)
    expect.device(name, x, device)


def _check_groups(expect: Expect, groups: Sequence[AdamGroup]) -> None:
    device = next((p.device for group in groups for p in group.params), torch.device("cpu"))
    narrow = sum(p.dtype in reference.NARROW for group in groups for p in group.params)
    masters = sum(len(group.masters) for group in groups)
    expected = f"empty or one for each of the {narrow} parameters of 16 or 8 bits"
    expect(masters in (0, narrow), "masters", expected, masters)
    for group in groups:
        _check_hyper_parameters(expect, group, device)
        n = len(group.params)
        for name in ("grads", "exp_avgs", "exp_avg_sqs", "steps"):
            count = len(getattr(group, name))
            expect(count == n, name, f"a list of {n} tensors, like params", count)
        count, wanted = len(group.max_exp_avg_sqs), n if group.amsgrad else 0
        expect(count == wanted, "max_exp_avg_sqs", f"a list of {wanted} tensors", count)
        copies = iter(group.masters)
        for i, param in enumerate(group.params):
            _check_tensor(expect, f"params[{i}]", param, device)
            wide = torch.float64 if param.dtype == torch.float64 else torch.float32
            moments = (wide, torch.bfloat16)
            _check_state(expect, f"grads[{i}]", group.grads[i], param, _FLOATS)
            _check_state(expect, f"exp_avgs[{i}]", group.exp_avgs[i], param, moments)
            same = (group.exp_avgs[i].dtype,)
            _check_state(expect, f"exp_avg_sqs[{i}]", group.exp_avg_sqs[i], param, same)
            if group.amsgrad:
                largest = group.max_exp_avg_sqs[i]
                _check_state(expect, f"max_exp_avg_sqs[{i}]", largest, param, same)
            if group.masters and param.dtype in reference.NARROW:
                master = next(copies, None)
                expect(master is not None, "masters", "one for each narrow parameter", "fewer")
                _check_state(expect, f"the master of params[{i}]", master, param, (torch.float32,))
            step = group.steps[i]
            if not isinstance(step, Tensor) or step.numel() != 1 or step.dtype != torch.float32:
                got = f"{step.dtype} {tuple(step.shape)}" if isinstance(step, Tensor) else step
                raise expect.error(f"steps[{i}]", "a float32 tensor of one element", got)
            if step.device != device:
                raise expect.error(f"steps[{i}]", f"on {device}", step.device)


def _check_state(
    expect: Expect, name: str, x: object, param: Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    x = _check_tensor(expect, name, x, param.device)
    if x.dtype not in dtypes:
        raise expect.error(name, " or ".join(map(str, dtypes)), x.dtype)
    expect.shape(name, x, param.shape, of="its parameter's shape")


def _check_hyper_parameters(expect: Expect, group: AdamGroup, device: torch.device) -> None:
    lr = group.lr
    if isinstance(lr, Tensor):
        expect(lr.numel() == 1, "lr", "a tensor of one element", tuple(lr.shape))
        expect.dtype("lr", lr, _WIDE, "float32 or float64", cls=BadArgument)
        if lr.device.type != "cpu":
            expect.device("lr", lr, device)
    else:
        expect(lr >= 0, "lr", "at least 0", lr)
    for name in ("beta1", "beta2"):
        value = getattr(group, name)
        expect(0 <= value < 1, name, "at least 0 and below 1", value)
    expect(group.eps >= 0, "eps", "at least 0", group.eps)
    expect(group.weight_decay >= 0, "weight_decay", "at least 0", group.weight_decay)
