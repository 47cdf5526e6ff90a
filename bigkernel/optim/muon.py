"""Muon: ``torch.optim.Muon``, with AdamW for what is no matrix in the same step and state dict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from bigkernel import precision
from bigkernel._eager import eager
from bigkernel.expect import FLOATING, FLOATING_NAMES, Expect, shape_of
from bigkernel.ops.adam.reference import NARROW
from bigkernel.ops.newton_schulz import op as newton_schulz
from bigkernel.ops.newton_schulz.op import COEFFICIENTS
from bigkernel.optim.adam import MASTER, Adam, _check_flag, _number, _on, _shown, _Work

__all__ = ["Muon"]

BUFFER = "momentum_buffer"
SCALINGS = ("original", "match_rms_adamw", "spectral_unclamped")
_MUON = (
    *("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps"),
    *("adjust_lr_fn", "ns_dtype", "transposed", "use_muon"),
)
# What an AdamW group has where it says nothing else; lr and weight_decay are the optimizer's.
_ADAMW = {
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
_SHARED = ("lr", "weight_decay", "use_muon")
# Elements of the parameters that are stepped together: what a step holds beside the state.
_MOST_ELEMENTS = 1 << 25


class Muon(Adam):
    r"""Muon (K. Jordan, 2024) as ``torch.optim.Muon``, and AdamW for everything else.

    Momentum is made nearly orthogonal, by a quintic Newton-Schulz iteration, before it is
    subtracted: every direction of a weight matrix moves by about as much. That is meant for the
    matrices between the layers of a network. Embeddings, the output layer, norms, biases and
    convolutions are AdamW's: give them in groups with ``"use_muon": False``, or let
    :func:`muon_groups` sort a model's parameters.

    Takes ``torch.optim.Muon``'s arguments, and equals it with ``ns_dtype=torch.bfloat16``, up to
    the order in which products add: matrices of one shape are multiplied in batches. (Without
    nesterov, torch 2.14 divides the momentum of bfloat16 parameters by its norm at each step.) A
    state dict of Muon groups alone goes both ways. A parameter of three dimensions is a row of
    matrices, such as the weights of experts, each of which is made orthogonal by itself.

    A group with ``"use_muon": False`` is one of :class:`AdamW`, with its options (betas, eps,
    amsgrad, maximize) and its defaults, except that lr and weight_decay are the optimizer's unless
    the group has its own. bfloat16 parameters are rounded to nearest there too.

    DTensors are gathered: every rank makes the whole matrix orthogonal and updates its part of it.
    ``torch.compile`` leaves the step to the interpreter. Schedulers that move the momentum, such as
    OneCycleLR, move Muon's and no betas.

    Args:
        params: parameters or groups of them. In Muon's groups of two or three dimensions and of
            float32, bfloat16, float16 or float64. Gradients must be dense; they are not modified.
        lr: learning rate, a number or a tensor of one element.
        weight_decay: decoupled, as in AdamW: a step multiplies parameters by 1 - lr * weight_decay.
        momentum: the share of the old momentum in the new, in [0, 1).
        nesterov: look ahead: use the gradient once more beside the momentum.
        ns_coefficients: a, b, c of x <- a x + (b x x^T + c (x x^T)^2) x.
        eps: the least norm by which a matrix is divided before the iteration; above 0.
        ns_steps: iterations, 0 to 99.
        adjust_lr_fn: by what the shape [out, in] scales lr. "original" or None:
            max(1, out / in)^0.5. "match_rms_adamw" (arXiv:2502.16982): 0.2 max(out, in)^0.5, with
            which updates are as large as AdamW's, so that lr and weight_decay found for it will do
            for both. "spectral_unclamped" (J. Bernstein, 2025): (out / in)^0.5.
        ns_dtype: what the iteration computes in: torch.bfloat16 or torch.float32. None is bfloat16,
            as in torch, and float32 where that is more than four times as fast (processors without
            AVX-512, GPUs before sm_80). What it was decided to be stands in the state dict, and
            holds for a run that goes on elsewhere.
        transposed: whether the matrices are stored [in, out], which the shape scaling asks for.
            None, not known, is refused where it matters.
        max_grad_norm: as in :class:`Adam`: the gradients of all groups together are clipped to this
            2-norm inside the step, and a step whose norm is infinite or NaN is skipped. The norm
            before clipping is then in ``grad_norm``.
        master_weights: keep an fp32 copy of each parameter of 16 bits and update that; momentum is
            then fp32 as well. Without, it has the parameter's dtype.

    All but the last two can also be given in a group. Under a ``torch.amp.GradScaler`` gradients
    are unscaled inside the step, and an overflowed step is skipped on the device.

    Raises:
        ValueError: an option out of its range, or one that does not belong to a group's kind.
        TypeError: an option of another type, or a parameter of a dtype that cannot be stepped.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype | None = None,
        transposed: bool | None = False,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "transposed": transposed,
            "use_muon": True,
        }
        self._begin(
            params,
            options,
            max_grad_norm=max_grad_norm,
            master_weights=master_weights,
            state_dtype=None,
            stochastic_rounding=False,
            rounding_seed=0,
        )

    # ---- groups ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, of Muon or, with ``"use_muon": False``, of AdamW; at any time."""
        self._expect.kind("a group", param_group, dict, "a dict")
        muon = param_group.get("use_muon", True)
        self._expect.kind("use_muon of a group", muon, bool, "True or False")
        kind = "a group of Muon" if muon else "a group with use_muon=False"
        foreign = set(_ADAMW if muon else _MUON) - set(_MUON if muon else _ADAMW) - set(_SHARED)
        for key in sorted(foreign & param_group.keys()):
            given = param_group[key]
            raise self._expect.error(f"{key} of {kind}", "left out", given, "It would do nothing")
        for key, value in self._defaults_of(param_group).items():
            param_group.setdefault(key, value)
        super().add_param_group(param_group)
        for key in foreign:  # torch gives every group all defaults
            self.param_groups[-1].pop(key, None)

    def _defaults_of(self, group: dict[str, Any]) -> dict[str, Any]:
        if group.get("use_muon", True):
            return {key: self.defaults[key] for key in _MUON}
        return {**_ADAMW, **{key: self.defaults[key] for key in _SHARED}, "use_muon": False}

    def _check_group(self, group: dict[str, Any]) -> None:
        if not group.get("use_muon", True):
            return super()._check_group(group)
        expect = self._expect
        _check_muon(expect, group)
        # The constructor checks its defaults, which have no parameters.
        number = len(self.param_groups) - 1 if "params" in group else 0
        for i, p in enumerate(group.get("params", ())):
            what = f"params[{i}] of group {number}"
            fix = "Muon's are real: give it in a group with use_muon=False"
            expect.dtype(what, p, FLOATING, FLOATING_NAMES, fix)
            _check_dims(expect, what, p)
            scaled = group["adjust_lr_fn"] != "match_rms_adamw" and p.shape[-2:].numel() > 0
            if scaled and group["transposed"] is None and p.shape[-2] != p.shape[-1]:
                what = f"transposed of group {number}"
                fix = "adjust_lr_fn='match_rms_adamw' does not ask for it"
                raise expect.error(what, "True or False, as the matrices are stored", None, fix)
        return None

    def _check_loaded(self, group: dict[str, Any], saved: dict[str, Any]) -> None:
        kinds = {True: "of Muon", False: "of AdamW"}
        mine, other = (bool(g.get("use_muon", True)) for g in (group, saved))
        what = "a group of the loaded state_dict"
        fix = "build the optimizer with the groups that it was saved with"
        self._expect(mine == other, what, kinds[mine], kinds[other], fix)
        if mine:
            _check_muon(self._expect, {**self.defaults, **saved})
        else:
            super()._check_loaded(group, saved)

    # ---- the step ----

    @eager
    def _take_step(self) -> None:
        super()._take_step()

    def _collect(self, all_options: Sequence[dict[str, Any]]) -> _Work:
        work = super()._collect([group for group in all_options if not group["use_muon"]])
        for group in all_options:
            if group["use_muon"]:
                self._add_matrices(work, group)
        return work

    def _add_matrices(self, work: _Work, group: dict[str, Any]) -> None:
        """A group's parameters that have a gradient, in batches."""
        options: _Options | None = None
        alike: dict[Any, list[_Matrix]] = {}  # on one device, of one dtype
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if options is None:
                options = _Options.of(self._expect, group, p.device)
            state = self.state[p]
            if BUFFER not in state:
                dtype = self._momentum_dtype(p)
                state[BUFFER] = torch.zeros_like(
                    p, dtype=dtype, memory_format=torch.preserve_format
                )
            mastered = self.master_weights and p.dtype in NARROW
            if mastered and MASTER not in state:
                state[MASTER] = p.detach().to(torch.float32)
            what = f"params[{i}] of a group"
            _check_dims(self._expect, what, p)
            tensors = [p, p.grad, state[BUFFER], *([state[MASTER]] if mastered else [])]
            if type(p.grad) is not Tensor or p.grad.layout is not torch.strided:
                tensors = work.unwrap(tensors)
            work.beside_grads.setdefault(p.device, []).append(tensors[1])
            if p.numel() > 0:
                part, grad, momentum, target = *tensors[:3], tensors[3 if mastered else 0]
                matrix = _Matrix(p, part, grad, momentum, target)
                alike.setdefault((p.device, momentum.dtype), []).append(matrix)
        for matrices in alike.values():
            assert options is not None
            work.beside += [(options, batch) for batch in _split(matrices)]

    def _update(
        self,
        work: _Work,
        norm: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor | None:
        norm = super()._update(work, norm, grad_scale, found_inf)
        decided: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}
        for options, batch in work.beside:
            device = batch[0].param.device
            if device not in decided:
                on_device = (_on(t, device) for t in (norm, grad_scale, found_inf))
                decided[device] = _factor_and_apply(self.max_grad_norm, *on_device)
            _step_batch(options, batch, *decided[device])
        return norm

    # ---- state ----

    def _momentum_dtype(self, p: Tensor) -> torch.dtype:
        return torch.float32 if self.master_weights and p.dtype in NARROW else p.dtype

    def _kept(self, p: Tensor, group: dict[str, Any]) -> tuple[str, set[str], dict[str, Any]]:
        if not group["use_muon"]:
            return super()._kept(p, group)
        return f"of Muon, with {BUFFER}", {BUFFER}, {BUFFER: self._momentum_dtype(p)}


@dataclass(frozen=True, slots=True)
class _Options:
    """A group's options as a step reads them."""

    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    coefficients: tuple[float, float, float]
    eps: float
    steps: int
    scaling: str
    dtype: torch.dtype
    transposed: bool

    @classmethod
    def of(cls, expect: Expect, group: dict[str, Any], device: torch.device) -> "_Options":
        _check_readable(expect, group)
        if group["ns_dtype"] is None:
            fast = precision.multiplies(device, torch.bfloat16)
            # Stored, so that a resumed run computes as this one.
            group["ns_dtype"] = torch.bfloat16 if fast else torch.float32
        a, b, c = group["ns_coefficients"]
        return cls(
            lr=_number(expect, "lr", group["lr"]),
            weight_decay=_number(expect, "weight_decay", group["weight_decay"]),
            momentum=_number(expect, "momentum", group["momentum"]),
            nesterov=bool(group["nesterov"]),
            coefficients=(float(a), float(b), float(c)),
            eps=_number(expect, "eps", group["eps"]),
            steps=int(group["ns_steps"]),
            scaling=group["adjust_lr_fn"] or "original",
            dtype=group["ns_dtype"],
            transposed=bool(group["transposed"]),
        )

    def scale(self, shape: Sequence[int]) -> float:
        """By what the shape of a matrix multiplies the learning rate."""
        outputs, inputs = shape[-2:][:: -1 if self.transposed else 1]
        if self.scaling == "match_rms_adamw":
            return 0.2 * math.sqrt(max(outputs, inputs))
        ratio = outputs / inputs
        return math.sqrt(max(1, ratio) if self.scaling == "original" else ratio)


@dataclass(slots=True)
class _Matrix:
    """A parameter, and this rank's part of the tensors that belong to it."""

    whole: Tensor
    param: Tensor
    grad: Tensor
    momentum: Tensor
    target: Tensor  # what is updated: the master copy, or the parameter

    def gather(self, update: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrices that this rank makes orthogonal: whole ones, sent between ranks as dtype."""
        if self.is_cut():
            from torch.distributed.tensor import DTensor

            whole: Any = self.whole
            where = whole.device_mesh, whole.placements
            narrow = update.to(dtype)
            update = DTensor.from_local(
                narrow, *where, run_check=False, shape=whole.shape, stride=whole.stride()
            ).full_tensor()
        return update

    def my_part(self, update: Tensor) -> Tensor:
        """What this rank updates of what `gather` gave."""
        if not self.is_cut():
            return update
        from torch.distributed.tensor import distribute_tensor

        whole: Any = self.whole
        # Every rank has all of it: nothing is sent.
        return distribute_tensor(
            update, whole.device_mesh, whole.placements, src_data_rank=None
        ).to_local()

    def is_cut(self) -> bool:
        """Whether this rank holds less than whole matrices; whole experts are enough."""
        cut = [where for where in getattr(self.whole, "placements", ()) if not where.is_replicate()]
        return any(self.whole.ndim == 2 or not where.is_shard(0) for where in cut)


def _split(matrices: list[_Matrix]) -> list[list[_Matrix]]:
    """Batches of one parameter, or of several that are small enough together."""
    batches: list[list[_Matrix]] = []
    room = 0
    for matrix in matrices:
        size = matrix.whole.numel()
        if size > room:
            batches.append([])
            room = _MOST_ELEMENTS
        batches[-1].append(matrix)
        room -= size
    return batches


def _factor_and_apply(
    max_norm: float | None, norm: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What gradients are multiplied by, and whether the step counts: as in the Adam op."""
    factor: Tensor | None = None
    apply: Tensor | None = None
    if grad_scale is not None:
        factor = grad_scale.double().reshape(()).reciprocal()
    if found_inf is not None:
        apply = found_inf.reshape(()) == 0
    if max_norm is not None and norm is not None:
        clip = (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)
        factor = clip if factor is None else clip * factor
        apply = norm.isfinite() if apply is None else apply & norm.isfinite()
    return (None if factor is None else factor.float()), apply


def _step_batch(
    options: _Options, batch: list[_Matrix], factor: Tensor | None, apply: Tensor | None
) -> None:
    """One step of some parameters."""
    if batch[0].param.device.type == "cpu":  # where nothing waits for an answer
        if apply is not None and not bool(apply):
            return
        apply = None
        factor = None if factor is not None and float(factor) == 1 else factor
    written = [t for m in batch for t in (m.momentum, m.target)]
    before = [t.clone() for t in written] if apply is not None else []
    updates = []
    # Not by torch._foreach_*, which on the CPU round a number to the dtype of the tensors first.
    for m in batch:
        grad = m.grad.to(m.momentum.dtype)
        if factor is not None:
            grad = grad * factor
        m.momentum.lerp_(grad, 1 - options.momentum)
        updates.append(grad.lerp(m.momentum, options.momentum) if options.nesterov else m.momentum)
    for m, update in zip(batch, _orthogonal(options, batch, updates), strict=True):
        m.target.mul_(1 - options.lr * options.weight_decay)
        m.target.add_(update, alpha=-options.lr * options.scale(m.whole.shape))
    if apply is not None:
        for tensor, old in zip(written, before, strict=True):
            tensor.copy_(torch.where(apply, tensor, old))
    for m in batch:
        if m.target is not m.param:
            m.param.copy_(m.target)


def _orthogonal(options: _Options, batch: list[_Matrix], updates: list[Tensor]) -> list[Tensor]:
    """The updates, made nearly orthogonal."""
    parts = [m.gather(u, options.dtype) for m, u in zip(batch, updates, strict=True)]
    done = newton_schulz.orthogonalize(
        parts, options.coefficients, options.steps, options.eps, options.dtype
    )
    return [m.my_part(piece) for m, piece in zip(batch, done, strict=True)]


def _check_dims(expect: Expect, what: str, p: Tensor) -> None:
    fix = "Give it in a group with use_muon=False, which is AdamW's"
    if p.ndim not in (2, 3):
        raise expect.error(what, "a matrix, or a row of them in three dimensions", shape_of(p), fix)


def _check_muon(expect: Expect, options: dict[str, Any]) -> None:
    """Check the options of a group of Muon; coefficients become a tuple."""
    for key in ("lr", "weight_decay"):
        value = _number(expect, key, options[key])
        expect(value >= 0, key, "at least 0", value)
    momentum = _number(expect, "momentum", options["momentum"])
    expect(0 <= momentum < 1, "momentum", "at least 0 and below 1", momentum)
    eps = _number(expect, "eps", options["eps"])
    expect(eps > 0, "eps", "above 0", eps)
    _check_readable(expect, options)


def _check_readable(expect: Expect, options: dict[str, Any]) -> None:
    """Check what a step cannot make a number of, also when it was set after the construction."""
    _check_flag(expect, "nesterov", options["nesterov"])
    _check_flag(expect, "transposed", options["transposed"], none=True)
    steps = options["ns_steps"]
    whole = hasattr(steps, "__index__") and 0 <= steps < 100
    expect(whole, "ns_steps", "a whole number from 0 to 99", _shown(steps))
    given = options["ns_coefficients"]
    three = isinstance(given, (tuple, list)) and len(given) == 3
    expect(three, "ns_coefficients", "three numbers", _shown(given), cls=TypeError)
    for i, value in enumerate(given):
        _number(expect, f"ns_coefficients[{i}]", value)
    options["ns_coefficients"] = tuple(given)
    scaling = options["adjust_lr_fn"]
    known = f"None, {', '.join(map(repr, SCALINGS[:-1]))} or {SCALINGS[-1]!r}"
    expect(scaling is None or scaling in SCALINGS, "adjust_lr_fn", known, repr(scaling))
    dtypes = (None, torch.bfloat16, torch.float32)
    known = "None, torch.bfloat16 or torch.float32"
    expect(options["ns_dtype"] in dtypes, "ns_dtype", known, options["ns_dtype"])
