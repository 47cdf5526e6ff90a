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

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

from bigkernel import _library, backend, registry
from bigkernel.errors import check, has_tangent
from bigkernel.ops.adam import reference
from bigkernel.ops.adam.reference import AMSGRAD, DECOUPLED, MAXIMIZE

__all__ = ["AdamGroup", "adam_groups_step_", "adam_norm", "adam_step_"]

# The lists of a group, in the order of the op's arguments.
TENSORS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "steps")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *reference.FLOAT8)


def _norm_fake(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
    return grads[0].new_empty((), dtype=reference.norm_dtype(grads))


def _step_fake(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    group_sizes: list[int],
    flags: list[int],
    lrs: list[float],
    lr_tensors: list[Tensor],
    beta1s: list[float],
    beta2s: list[float],
    epss: list[float],
    weight_decays: list[float],
    max_norm: float | None,
    total_norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    shape = (0,) if max_norm is None else ()
    return params[0].new_empty(shape, dtype=reference.norm_dtype(grads))


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
                "adam_step_",
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
    """``adam_groups_step_`` without the Python checks, for the optimizer, whose state fits by
    construction; what memory safety depends on is checked again in C++. A ``seed`` that is a number
    becomes a tensor where a parameter needs it.
    """
    lists = _lists(groups)
    params, grads = lists[:2]
    if not params:
        return None if max_norm is None else no_norm()
    device = params[0].device
    lrs, lr_tensors = _learning_rates(groups, device)
    if isinstance(seed, int):
        needed = any(p.dtype is torch.bfloat16 for p in params)
        seed = torch.full((), seed, dtype=torch.int64, device=device) if needed else None
    namespace = backend.select("adam_step_", device, _OP.why_not_native([*params, *grads]))
    norm: Tensor = _library.call(
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


def _lists(groups: Sequence[AdamGroup]) -> list[list[Tensor]]:
    """The op's first seven arguments, in the order of ``TENSORS``."""
    if len(groups) == 1:
        return [getattr(groups[0], name) for name in TENSORS]
    return [[t for group in groups for t in getattr(group, name)] for name in TENSORS]


def _learning_rates(
    groups: Sequence[AdamGroup], device: torch.device
) -> tuple[list[float], list[Tensor]]:
    """Numbers if all are numbers (or live on the CPU while the tensors do not); else tensors."""
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
    op = "adam_norm"
    _check_untransformed(op, lambda: grads)
    for i, grad in enumerate(grads):
        _check_tensor(op, f"grads[{i}]", grad, grads[0].device)
    _check_scalar(op, "grad_scale", grad_scale, grads[0].device)
    differentiated = torch.is_grad_enabled() and any(grad.requires_grad for grad in grads)
    mend = "Call it under torch.no_grad(), or torch.linalg.vector_norm for its derivative"
    got = "one that requires a gradient"
    cls = NotImplementedError
    check(not differentiated, op, "grads", "tensors without requires_grad", got, mend, cls)
    namespace = backend.select(op, grads[0].device, _OP.why_not_native(grads))
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
    op = "adam_step_"
    _check_untransformed(op, lambda: [x for tensors in _lists(groups) for x in tensors])
    _check_groups(groups)
    everything = [p for group in groups for p in group.params]
    if everything:
        device = everything[0].device
        _check_scalar(op, "grad_scale", grad_scale, device)
        _check_scalar(op, "found_inf", found_inf, device)
        _check_scalar(op, "total_norm", total_norm, device)
        if seed is not None:
            check(
                seed.numel() == 1 and seed.dtype == torch.int64 and seed.device == device,
                op,
                "seed",
                f"one int64 element on {device}",
                f"{tuple(seed.shape)} {seed.dtype} on {seed.device}",
            )
    check(max_norm is None or max_norm >= 0, op, "max_norm", "None or at least 0", max_norm)
    check(
        total_norm is None or max_norm is not None,
        op,
        "total_norm",
        "given only with max_norm",
        "total_norm alone",
    )
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
        check(steps >= 1, "adam_step_", "steps", "the number of this step, from 1", steps)
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


def _check_untransformed(op: str, tensors: Callable[[], Iterable[object]]) -> None:
    """Neither the norm nor the step has a derivative; a custom op would say so by a silent 0."""
    mend = "torch.linalg.vector_norm has derivatives; torch.optim.Adam takes differentiable=True"
    cls = NotImplementedError
    expected = "outside of torch.func.grad, vjp, jvp and vmap"
    check(maybe_current_level() is None, op, "the call", expected, "one inside", mend, cls)
    if forward_ad._current_level >= 0:
        dual = any(isinstance(x, Tensor) and has_tangent(x) for x in tensors())
        check(not dual, op, "tensors", "without tangents", "dual ones", mend, cls)


def _check_tensor(op: str, name: str, tensor: object, device: torch.device) -> None:
    check(isinstance(tensor, Tensor), op, name, "a tensor", type(tensor).__name__, cls=TypeError)
    assert isinstance(tensor, Tensor)
    mend = "Adam takes dense gradients: use torch.optim.SparseAdam, or Embedding(sparse=False)"
    check(tensor.layout is torch.strided, op, name, "dense", str(tensor.layout), mend)
    check(tensor.dtype in _FLOATS, op, name, "of a float dtype", tensor.dtype)
    check(tensor.device == device, op, name, f"on {device}", tensor.device)


def _check_scalar(op: str, name: str, tensor: Tensor | None, device: torch.device) -> None:
    if tensor is None:
        return
    check(isinstance(tensor, Tensor), op, name, "a tensor", type(tensor).__name__, cls=TypeError)
    check(tensor.numel() == 1, op, name, "a tensor of one element", tuple(tensor.shape))
    check(tensor.dtype in (torch.float32, torch.float64), op, name, "float32", tensor.dtype)
    check(tensor.device == device, op, name, f"on {device}", tensor.device)


def _check_groups(groups: Sequence[AdamGroup]) -> None:
    op = "adam_step_"
    device = next((p.device for group in groups for p in group.params), torch.device("cpu"))
    narrow = sum(p.dtype in reference.NARROW for group in groups for p in group.params)
    masters = [t for group in groups for t in group.masters]
    check(
        len(masters) in (0, narrow),
        op,
        "masters",
        f"empty or one for each of the {narrow} parameters of 16 or 8 bits",
        len(masters),
    )
    for group in groups:
        _check_hyper_parameters(op, group, device)
        n = len(group.params)
        for name in ("grads", "exp_avgs", "exp_avg_sqs", "steps"):
            got = len(getattr(group, name))
            check(got == n, op, name, f"a list of {n} tensors, like params", got)
        got = len(group.max_exp_avg_sqs)
        expected = n if group.amsgrad else 0
        check(got == expected, op, "max_exp_avg_sqs", f"a list of {expected} tensors", got)
        copies = iter(group.masters)
        for i, param in enumerate(group.params):
            _check_tensor(op, f"params[{i}]", param, device)
            wide = torch.float64 if param.dtype == torch.float64 else torch.float32
            moments = (wide, torch.bfloat16)
            _check_state(op, f"grads[{i}]", group.grads[i], param, _FLOATS)
            _check_state(op, f"exp_avgs[{i}]", group.exp_avgs[i], param, moments)
            same = (group.exp_avgs[i].dtype,)
            _check_state(op, f"exp_avg_sqs[{i}]", group.exp_avg_sqs[i], param, same)
            if group.amsgrad:
                _check_state(op, f"max_exp_avg_sqs[{i}]", group.max_exp_avg_sqs[i], param, same)
            if group.masters and param.dtype in reference.NARROW:
                master = next(copies, None)
                check(master is not None, op, "masters", "one for each narrow parameter", "fewer")
                assert master is not None
                _check_state(op, f"the master of params[{i}]", master, param, (torch.float32,))
            step = group.steps[i]
            check(
                isinstance(step, Tensor) and step.numel() == 1 and step.dtype == torch.float32,
                op,
                f"steps[{i}]",
                "a float32 tensor of one element",
                f"{step.dtype} {tuple(step.shape)}" if isinstance(step, Tensor) else step,
            )
            check(step.device == device, op, f"steps[{i}]", f"on {device}", step.device)


def _check_state(
    op: str, name: str, tensor: Tensor, param: Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    _check_tensor(op, name, tensor, param.device)
    check(tensor.dtype in dtypes, op, name, " or ".join(map(str, dtypes)), tensor.dtype)
    shape, expected = tuple(tensor.shape), tuple(param.shape)
    check(shape == expected, op, name, f"of its parameter's shape {expected}", shape)


def _check_hyper_parameters(op: str, group: AdamGroup, device: torch.device) -> None:
    if isinstance(group.lr, Tensor):
        check(group.lr.numel() == 1, op, "lr", "a tensor of one element", tuple(group.lr.shape))
        check(
            group.lr.dtype in (torch.float32, torch.float64),
            op,
            "lr",
            "float32 or float64",
            group.lr.dtype,
        )
        on_host = group.lr.device.type == "cpu"
        check(on_host or group.lr.device == device, op, "lr", f"on {device}", group.lr.device)
    else:
        check(group.lr >= 0, op, "lr", "at least 0", group.lr)
    for name in ("beta1", "beta2"):
        value = getattr(group, name)
        check(0 <= value < 1, op, name, "at least 0 and below 1", value)
    check(group.eps >= 0, op, "eps", "at least 0", group.eps)
    check(group.weight_decay >= 0, op, "weight_decay", "at least 0", group.weight_decay)
