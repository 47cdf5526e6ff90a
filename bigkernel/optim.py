"""AdamW and Adam: ``torch.optim``'s, with the whole step in one call of the Adam op.

A state dict goes both ways between these classes and torch's. Beyond torch's arguments there are
``max_grad_norm`` (clip by the global norm inside the step), ``master_weights`` (fp32 copies of
16-bit parameters), ``state_dtype`` (bf16 moments) and stochastic rounding for bf16 parameters.
"""

from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from bigkernel import backend
from bigkernel.errors import check
from bigkernel.ops.adam import AdamGroup, op

__all__ = ["Adam", "AdamW"]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
MASTER = "master_param"
_NARROW = (torch.bfloat16, torch.float16)
_OWN_SETTINGS = (
    "max_grad_norm",
    "master_weights",
    "state_dtype",
    "stochastic_rounding",
    "rounding_seed",
)


class Adam(Optimizer):
    r"""Adam (arXiv:1412.6980) as ``torch.optim.Adam``, one fused call for all parameters.

    Takes ``torch.optim.Adam``'s arguments. ``foreach``, ``fused`` and ``capturable`` are accepted
    and change nothing: the step is always fused, keeps its counts on the parameters' device and
    never waits for it. ``differentiable=True`` is refused.

    Args:
        params: parameters or groups of them, float32, bfloat16, float16 or float64 (complex too);
            float64 runs in plain PyTorch. Gradients must be dense; they are not modified.
        max_grad_norm: if given, the gradients of all groups together are clipped to this 2-norm, as
            ``torch.nn.utils.clip_grad_norm_`` would before the step, and a step whose norm is
            infinite or NaN is skipped. ``float("inf")`` only measures and skips. The norm before
            clipping is then in ``grad_norm``, a tensor that nothing has waited for.
        master_weights: keep an fp32 copy of each 16-bit parameter and update that; the parameter
            is its rounding. In the state under "master_param", which torch.optim ignores.
        state_dtype: torch.bfloat16 halves the moments; None means float32 (float64 for float64).
        stochastic_rounding: round bf16 parameters without a master copy up or down at random, so
            that updates below half an ulp count on average. False rounds to nearest as torch does.
        rounding_seed: key of those random numbers, which depend on nothing else than it, the step
            and the element's place; equal on all ranks, so that replicas stay equal.

    Under a ``torch.amp.GradScaler`` gradients are unscaled inside the step, and an overflowed step
    is skipped on the device. Skipped steps are not counted.
    """

    # The plan of the next step, and the steps done without one.
    _planned: "_Planned | None" = None
    _unplanned = 0

    # GradScaler hands over grad_scale and found_inf instead of unscaling and deciding itself.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        rounding_seed: int = 0,
    ) -> None:
        name = f"optim.{type(self).__name__}"
        mend = "torch.optim's own optimizers can be differentiated through"
        check(not differentiable, name, "differentiable", "False", differentiable, mend)
        check(
            max_grad_norm is None or max_grad_norm > 0,
            name,
            "max_grad_norm",
            "above 0, or None for no clipping",
            max_grad_norm,
        )
        check(
            state_dtype in (None, torch.float32, torch.bfloat16),
            name,
            "state_dtype",
            "None, torch.float32 or torch.bfloat16",
            state_dtype,
        )
        whole = hasattr(rounding_seed, "__index__") and -(2**63) <= rounding_seed < 2**63
        check(whole, name, "rounding_seed", "a signed 64-bit integer", repr(rounding_seed))
        self._name = name
        self.max_grad_norm = max_grad_norm
        self.master_weights = bool(master_weights)
        self.state_dtype = state_dtype
        self.stochastic_rounding = bool(stochastic_rounding)
        self.rounding_seed = int(rounding_seed)
        self.grad_norm: Tensor | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": False,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        _check_options(name, defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim; may be called at any time."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(self._name, group)
            for key in _OWN_SETTINGS:
                mend = "Give it to the optimizer: it holds for all groups"
                given = group.get(key, "none")
                check(key not in group, self._name, f"{key} of a group", "left out", given, mend)
            for i, p in enumerate(group["params"]):
                check(
                    p.is_floating_point() or p.is_complex(),
                    self._name,
                    f"params[{i}] of group {len(self.param_groups) - 1}",
                    "floating point or complex",
                    p.dtype,
                    cls=TypeError,
                )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return state | {key: getattr(self, key) for key in (*_OWN_SETTINGS, "_name")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("grad_norm", None)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            group["betas"] = tuple(float(beta) for beta in group["betas"])

    # ---- the step ----

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # A compiled training loop calls it as it is: there is nothing left to fuse.
    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        ``closure``, if given, reevaluates the model and returns the loss, which is passed on.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        if found_inf is None and grad_scale is None and self._step_as_planned():
            return loss
        work = self._collect()
        norm = None
        if self.max_grad_norm is not None and (work.sharded or len(work.by_device) > 1):
            norm = work.total_norm(grad_scale)
        for device, groups in work.by_device.items():
            seed = None
            if self.stochastic_rounding and not self.master_weights and work.bf16:
                seed = torch.full((), self.rounding_seed, dtype=torch.int64, device=device)
            result = op.launch(
                groups,
                max_norm=self.max_grad_norm,
                total_norm=_on(norm, device),
                grad_scale=_on(grad_scale, device),
                found_inf=_on(found_inf, device),
                seed=seed,
            )
            norm = result if norm is None else norm
        if self.max_grad_norm is not None:
            self.grad_norm = torch.zeros(()) if norm is None else norm
        self._unplanned += 1
        if self._unplanned == 2:  # as it was twice, it may be the next time
            self._planned = _Planned.of(self, work)
        return loss

    def _step_as_planned(self) -> bool:
        """Whether the step was done, on tensors that the kernel knows from earlier steps."""
        plan = self._planned
        if plan is None:
            return False
        norm = plan.step(self)
        if norm is None:
            self._planned, self._unplanned = None, 0
        elif self.max_grad_norm is not None:
            self.grad_norm = torch.tensor(norm)
        return norm is not None

    def _collect(self) -> "_Work":
        """The tensors of this step as arguments of the op; creates state that is missing.

        A loop over all parameters in every step: it stays short and leaves the rare cases to
        ``_complete`` and ``_Work.unwrap``. Parameters, gradients and state may be replaced at any
        time: ``_Planned`` looks whether they are the same.
        """
        work = _Work(self._name)
        state_of = self.state
        master_weights = self.master_weights
        for group in self.param_groups:
            amsgrad = bool(group["amsgrad"])
            here: AdamGroup | None = None
            device: torch.device | None = None
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                dtype = p.dtype
                master = master_weights and dtype in _NARROW
                state = state_of[p]
                if len(state) != 3 + amsgrad + master:
                    self._complete(p, state, amsgrad, master)
                tensors = [p, grad, state["exp_avg"], state["exp_avg_sq"]]
                if amsgrad:
                    tensors.append(state["max_exp_avg_sq"])
                if master:
                    tensors.append(state[MASTER])
                if type(grad) is not Tensor or grad.layout is not torch.strided or dtype.is_complex:
                    tensors = work.unwrap(tensors)
                if here is None or p.device != device:
                    device = p.device
                    here = work.group(device, group)
                here.params.append(tensors[0])
                here.grads.append(tensors[1])
                here.exp_avgs.append(tensors[2])
                here.exp_avg_sqs.append(tensors[3])
                here.steps.append(state["step"])
                if amsgrad:
                    here.max_exp_avg_sqs.append(tensors[4])
                if master:
                    here.masters.append(tensors[-1])
                if dtype is torch.bfloat16:
                    work.bf16 = True
        return work

    # ---- state ----

    def _moment_dtype(self, p: Tensor) -> torch.dtype:
        if p.dtype in (torch.complex64, torch.complex128):
            return p.dtype
        if p.dtype == torch.float64:
            return torch.float64
        return self.state_dtype or torch.float32

    def _complete(self, p: Tensor, state: dict[str, Any], amsgrad: bool, master: bool) -> None:
        """Create what a parameter's state lacks: all of it before the first step."""
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for key in MOMENTS if amsgrad else MOMENTS[:2]:
            if key not in state:
                # Also right for a DTensor, whose state is then sharded like the parameter.
                state[key] = torch.zeros_like(
                    p, dtype=self._moment_dtype(p), memory_format=torch.preserve_format
                )
        if master and MASTER not in state:
            state[MASTER] = p.detach().to(torch.float32)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim's Adam and AdamW.

        Moments are taken to the dtype that this optimizer keeps them in, whatever the parameter's
        (torch casts them to that); master copies stay fp32, and are dropped
        without ``master_weights``. Tensors are copied. ValueError if groups or shapes differ.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            if changed is not None:
                state_dict = changed
        saved_groups = deepcopy(state_dict["param_groups"])
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        check(
            sizes == saved_sizes,
            self._name,
            "the loaded state_dict",
            f"for groups of {sizes} parameters",
            saved_sizes,
            "build the optimizer with the groups that it was saved with",
        )
        parameter_of = dict(
            zip(
                chain.from_iterable(group["params"] for group in saved_groups),
                chain.from_iterable(group["params"] for group in self.param_groups),
                strict=True,
            )
        )
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, value in state_dict["state"].items():
            if key in parameter_of:
                state[parameter_of[key]] = self._adopt(key, parameter_of[key], value)
            else:
                state[key] = value
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            saved["params"] = group["params"]
            if "param_names" in group:
                saved.setdefault("param_names", group["param_names"])
        self.__setstate__({"state": state, "param_groups": saved_groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _adopt(self, number: Any, p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        """One parameter's loaded state, copied to its device and layout and to our dtypes."""
        adopted: dict[str, Any] = {}
        check(
            not saved or {"step", *MOMENTS[:2]} <= saved.keys(),
            self._name,
            f"the state of parameter {number} in the loaded state_dict",
            f"of an Adam, with step, {' and '.join(MOMENTS[:2])}",
            ", ".join(map(str, saved)),
            "another kind of optimizer's state cannot be gone on with",
        )
        for key, value in saved.items():
            if key == "step":
                step = torch.as_tensor(value, dtype=torch.float32, device=p.device)
                adopted[key] = step.detach().reshape(()).clone()
            elif key in MOMENTS or key == MASTER:
                if key == MASTER and not (self.master_weights and p.dtype in _NARROW):
                    continue  # it would go stale
                check(
                    value.shape == p.shape,
                    self._name,
                    f"{key!r} of parameter {number} in the loaded state_dict",
                    f"of the parameter's shape {tuple(p.shape)}",
                    tuple(value.shape),
                )
                dtype = torch.float32 if key == MASTER else self._moment_dtype(p)
                adopted[key] = torch.empty_like(
                    p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
                ).copy_(value.detach())
            else:
                adopted[key] = deepcopy(value)
        return adopted


class AdamW(Adam):
    r"""AdamW (arXiv:1711.05101) as ``torch.optim.AdamW``: Adam with decoupled weight decay.

    Arguments are those of ``bigkernel.optim.Adam``; weight_decay is 1e-2 unless given, and does
    not enter the moments.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        rounding_seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            max_grad_norm=max_grad_norm,
            master_weights=master_weights,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # also when Adam's state is loaded
            group["decoupled_weight_decay"] = True


class _Planned:
    """A step on the CPU whose tensors are those of the step before, but for the gradients."""

    def __init__(self, plan: op.Plan, optimizer: Adam, bf16: bool) -> None:
        self.plan = plan
        self.bf16 = bf16
        self.settings = self._settings(optimizer)

    @classmethod
    def of(cls, optimizer: Adam, work: "_Work") -> "_Planned | None":
        """The plan of a step like the one that was just done, if it can have one."""
        groups = next(iter(work.by_device.values()), [])
        params = [p for group in groups for p in group.params]
        everything = [p for group in optimizer.param_groups for p in group["params"]]
        if (
            len(work.by_device) != 1
            or work.unwrapped
            or len(groups) != len(optimizer.param_groups)
            or len(params) != len(everything)
            or params[0].device.type != "cpu"
            or params[0].is_inference()
            or torch.float64 in {p.dtype for p in params}
            or backend.decide("adam_step_", "cpu")[0] != "cpu"
        ):
            return None
        plan = op.Plan.of(groups, optimizer.state)
        return None if plan is None else cls(plan, optimizer, work.bf16)

    @staticmethod
    def _settings(optimizer: Adam) -> tuple[Any, ...]:
        return optimizer.master_weights, optimizer.state_dtype

    def step(self, optimizer: Adam) -> float | None:
        """The norm of the step; None, and nothing is done, where something was replaced."""
        if self._settings(optimizer) != self.settings:
            return None
        if backend.decide("adam_step_", "cpu")[0] != "cpu":
            return None
        groups = optimizer.param_groups
        stochastic = self.bf16 and optimizer.stochastic_rounding and not optimizer.master_weights
        return self.plan.step(
            [group["params"] for group in groups],
            optimizer.state,
            [_hyper_parameters(group) for group in groups],
            optimizer.max_grad_norm,
            optimizer.rounding_seed % 2**64 if stochastic else None,
        )


def _hyper_parameters(options: dict[str, Any]) -> AdamGroup:
    """An op group without tensors."""
    beta1, beta2 = options["betas"]
    return AdamGroup(
        lr=options["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        amsgrad=bool(options["amsgrad"]),
        maximize=bool(options["maximize"]),
        decoupled=bool(options["decoupled_weight_decay"]),
    )


class _Work:
    """What one step has to do: groups by device, and gradients whose norm spans several ranks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.by_device: dict[torch.device, list[AdamGroup]] = {}
        # (mesh, its dimensions over which the gradient is cut) -> this rank's pieces
        self.sharded: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
        self.bf16 = False
        self.unwrapped = False

    def group(self, device: torch.device, options: dict[str, Any]) -> AdamGroup:
        """A new op group on ``device`` with the hyper-parameters of a parameter group."""
        group = _hyper_parameters(options)
        self.by_device.setdefault(device, []).append(group)
        return group

    def unwrap(self, tensors: list[Tensor]) -> list[Tensor]:
        """A parameter, its gradient and its state as plain real tensors: this rank's part of
        DTensors, and the real view of complex ones.
        """
        from torch.distributed.tensor import DTensor

        self.unwrapped = True
        param, grad = tensors[0], tensors[1]
        check(
            grad.layout is torch.strided,
            self.name,
            f"the gradient of a parameter of shape {tuple(param.shape)}",
            "dense",
            grad.layout,
            "use torch.optim.SparseAdam for it, or Embedding(sparse=False)",
            cls=RuntimeError,
        )
        if isinstance(param, DTensor) and isinstance(grad, DTensor):
            if grad.placements != param.placements:
                grad = grad.redistribute(param.device_mesh, param.placements)
            cut = tuple(i for i, where in enumerate(param.placements) if not where.is_replicate())
            piece = grad.to_local()
            piece = torch.view_as_real(piece) if piece.is_complex() else piece
            if cut:
                self.sharded.setdefault((param.device_mesh, cut), []).append(piece)
            tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
            tensors[1] = piece
        if param.is_complex():
            tensors = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        return tensors

    def total_norm(self, grad_scale: Tensor | None) -> Tensor:
        """The gradients' norm over all devices, and over the ranks that hold pieces of them."""
        elsewhere = {id(piece) for pieces in self.sharded.values() for piece in pieces}
        parts = []
        for device, groups in self.by_device.items():
            whole = [g for group in groups for g in group.grads if id(g) not in elsewhere]
            if whole:
                parts.append(op.adam_norm(whole, _on(grad_scale, device)))
        for (mesh, cut), pieces in self.sharded.items():
            square = op.adam_norm(pieces, _on(grad_scale, pieces[0].device)).double().square()
            for dim in cut:
                torch.distributed.all_reduce(square, group=mesh.get_group(dim))
            parts.append(square.sqrt())
        if not parts:
            return torch.zeros(())
        device = parts[0].device
        norms = torch.stack([part.to(device, torch.float64, non_blocking=True) for part in parts])
        return torch.linalg.vector_norm(norms).float()


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Check one group's hyper-parameters; betas become floats."""
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor):
        check(lr.numel() == 1, name, "lr", "a number or a tensor of one element", tuple(lr.shape))
    check(bool(lr >= 0), name, "lr", "at least 0", lr)
    check(len(betas) == 2, name, "betas", "two numbers", betas)
    options["betas"] = tuple(float(beta) for beta in betas)
    for i, beta in enumerate(options["betas"]):
        check(0 <= beta < 1, name, f"betas[{i}]", "at least 0 and below 1", beta)
    check(options["eps"] >= 0, name, "eps", "at least 0", options["eps"])
    check(options["weight_decay"] >= 0, name, "weight_decay", "at least 0", options["weight_decay"])
    check(not options["differentiable"], name, "differentiable", "False", True)
