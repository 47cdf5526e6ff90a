"""AdamW and Adam: ``torch.optim``'s, with the whole step in one call of the Adam op.

Beyond torch's arguments there are ``max_grad_norm`` (clip by the global norm inside the step),
``master_weights`` (fp32 copies of 16-bit parameters), ``state_dtype`` (bf16 moments) and stochastic
rounding for bf16 parameters.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from numbers import Real
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from bigkernel.expect import Expect, shape_of
from bigkernel.ops.adam import AdamGroup, op
from bigkernel.ops.adam.reference import FLOAT8, NARROW

__all__ = ["Adam", "AdamW"]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
MASTER = "master_param"
_DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.complex64, torch.complex128, *FLOAT8),
)
_FLAGS = {  # which may be None
    "amsgrad": False,
    "maximize": False,
    "foreach": True,
    "capturable": True,
    "differentiable": False,
    "fused": True,
    "decoupled_weight_decay": False,
}
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

    ``lr``, ``betas``, ``eps`` and ``weight_decay`` may be tensors of one element; they stay what
    they are, and one that is changed in place counts from the next step on. On a GPU a tensor lr
    is read there; the others are read by the host at each step, which waits for them.

    ``step`` can be compiled, ``fullgraph=True`` included, where these are numbers or lr is a tensor
    on the parameters' device, and parameters are dense, real and no DTensors (others run as if it
    were not compiled). As in torch.optim, a number that changes makes torch.compile compile
    again: give lr as a tensor under a scheduler.

    Args:
        params: parameters or groups of them, float32, bfloat16, float16, float64, complex64,
            complex128 or one of torch's float8 dtypes with a sign; float64 and float8 run in plain
            PyTorch. Gradients must be dense; they are not modified.
        max_grad_norm: if given, the gradients of all groups together are clipped to this 2-norm, as
            ``torch.nn.utils.clip_grad_norm_`` would before the step, and a step whose norm is
            infinite or NaN is skipped. ``float("inf")`` only measures and skips. The norm before
            clipping is then in ``grad_norm``, a tensor that nothing has waited for.
        master_weights: keep an fp32 copy of each parameter of 16 or 8 bits and update that; it
            is its rounding. In the state under "master_param", which torch.optim ignores.
        state_dtype: torch.bfloat16 halves the moments; None means float32 (float64 for float64).
        stochastic_rounding: round bf16 parameters without a master copy up or down at random, so
            that updates below half an ulp count on average. False rounds to nearest as torch does.
        rounding_seed: key of those random numbers, which depend on nothing else than it, the step
            and the element's place; equal on all ranks, so that replicas stay equal.

    Under a ``torch.amp.GradScaler`` gradients are unscaled inside the step, and an overflowed step
    is skipped on the device. Skipped steps are not counted.
    """

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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        self._begin(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            master_weights=master_weights,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )

    def _begin(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        master_weights: bool,
        state_dtype: torch.dtype | None,
        stochastic_rounding: bool,
        rounding_seed: int,
    ) -> None:
        """What a constructor does with its arguments: check and keep them."""
        self._name = f"optim.{type(self).__name__}"
        expect = self._expect
        if max_grad_norm is not None:
            max_grad_norm = _number(expect, "max_grad_norm", max_grad_norm)
            expected = "above 0, or None for no clipping"
            expect(max_grad_norm > 0, "max_grad_norm", expected, max_grad_norm)
        _check_flag(expect, "master_weights", master_weights)
        _check_flag(expect, "stochastic_rounding", stochastic_rounding)
        narrow = state_dtype in (None, torch.float32, torch.bfloat16)
        expect(narrow, "state_dtype", "None, torch.float32 or torch.bfloat16", state_dtype)
        whole = hasattr(rounding_seed, "__index__") and -(2**63) <= rounding_seed < 2**63
        expect(whole, "rounding_seed", "a signed 64-bit integer", repr(rounding_seed))
        self.max_grad_norm = max_grad_norm
        self.master_weights = bool(master_weights)
        self.state_dtype = state_dtype
        self.stochastic_rounding = bool(stochastic_rounding)
        self.rounding_seed = int(rounding_seed)
        # A dict, since what a compiled step sets on an optimizer itself is lost.
        self._outcome: dict[str, Tensor | None] = {"grad_norm": None}
        self._check_group(defaults)
        Optimizer.__init__(self, params, defaults)

    @property
    def _expect(self) -> Expect:
        return Expect(self._name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim; may be called at any time."""
        super().add_param_group(param_group)
        group, expect = self.param_groups[-1], self._expect
        try:
            self._check_group(group)
            for key in _OWN_SETTINGS:
                fix = "Give it to the optimizer: it holds for all groups"
                given = group.get(key, "none")
                expect(key not in group, f"{key} of a group", "left out", given, fix)
            for i, p in enumerate(group["params"]):
                what = f"params[{i}] of group {len(self.param_groups) - 1}"
                expected = "float32, bfloat16, float16, float64, complex or float8 with a sign"
                expect.dtype(what, p, _DTYPES, expected)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _defaults_of(self, group: dict[str, Any]) -> dict[str, Any]:
        """What holds for options that a group does not have."""
        return self.defaults

    def _check_group(self, group: dict[str, Any]) -> None:
        """Whether a group's options are of the types and in the ranges that they may have."""
        _check_options(self._expect, group)

    def _check_loaded(self, group: dict[str, Any], saved: dict[str, Any]) -> None:
        """Whether a group's options in a loaded state dict are what a step can read."""
        _check_types(self._expect, self._defaults_of(group) | saved)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return state | {key: getattr(self, key) for key in (*_OWN_SETTINGS, "_name")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_outcome", {"grad_norm": None})
        for group in self.param_groups:
            for key, value in self._defaults_of(group).items():
                group.setdefault(key, value)
            for key in ("betas", "ns_coefficients"):
                if key in group:
                    group[key] = tuple(group[key])

    # ---- the step ----

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradients' norm before clipping in the last step; None without ``max_grad_norm``."""
        return self._outcome["grad_norm"]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        ``closure``, if given, reevaluates the model and returns the loss, which is passed on.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    def _take_step(self) -> None:
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        work = self._collect(self.param_groups)
        norm = None
        if self.max_grad_norm is not None and work.needs_total_norm():
            norm = work.total_norm(grad_scale)
        norm = self._update(work, norm, grad_scale, found_inf)
        if self.max_grad_norm is not None:
            self._outcome["grad_norm"] = op.no_norm() if norm is None else norm

    def _update(
        self,
        work: "_Work",
        norm: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor | None:
        """Write the parameters; returns the norm, which one call of the op measures by itself."""
        stochastic = self.stochastic_rounding and not self.master_weights
        for device, groups in work.by_device.items():
            result = op.launch(
                groups,
                max_norm=self.max_grad_norm,
                total_norm=_on(norm, device),
                grad_scale=_on(grad_scale, device),
                found_inf=_on(found_inf, device),
                seed=self.rounding_seed if stochastic else None,
            )
            norm = result if norm is None else norm
        return norm

    def _collect(self, all_options: Sequence[dict[str, Any]]) -> "_Work":
        """The tensors of this step as arguments of the op.

        Parameters, gradients and state may be replaced at any time: nothing is kept from step to
        step.
        """
        work = _Work(self._expect)
        for options in all_options:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            exp_avgs: list[Tensor] = []
            exp_avg_sqs: list[Tensor] = []
            maxima: list[Tensor] = []
            masters: list[Tensor] = []
            steps: list[Tensor] = []
            lists = (params, grads, exp_avgs, exp_avg_sqs, maxima, masters, steps)
            alike = self._init_group(options, *lists)
            if alike and params:
                work.add(params[0].device, _op_group(self._expect, options, lists))
            elif params:
                # Without fullgraph this makes torch.compile leave the step to the interpreter.
                if torch.compiler.is_compiling():
                    what = "what a step compiled with fullgraph=True updates"
                    expected = "dense, real, not sharded, and on one device a group"
                    got = "other parameters or gradients"
                    fix = "Compile without fullgraph, or leave the step out"
                    raise self._expect.error(what, expected, got, fix, RuntimeError)
                work.add_one_by_one(options, lists)
        return work

    def _init_group(
        self,
        options: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        maxima: list[Tensor],
        masters: list[Tensor],
        steps: list[Tensor],
    ) -> bool:
        """Fill the lists with a group's tensors; creates state that is missing.

        Returns whether they are dense real tensors on one device. Name and kind of signature are
        torch.optim's: torch.compile runs this method while it traces a step, and then knows each
        tensor by the place where it found it. Lists are filled by comprehensions, since of
        thousands of small tensors a plain loop takes as long as the update.
        """
        everything = options["params"]
        found = [p.grad for p in everything]
        params += [p for p, g in zip(everything, found, strict=True) if g is not None]
        grads += [g for g in found if g is not None]
        state_of = self.state
        states = [state_of[p] for p in params]
        amsgrad, dtypes = bool(options["amsgrad"]), {p.dtype for p in params}
        narrow: list[dict[str, Any]] = []
        if self.master_weights and not dtypes.isdisjoint(NARROW):
            narrow = [s for p, s in zip(params, states, strict=True) if p.dtype in NARROW]
        for complete in (True, False):
            try:
                exp_avgs[:] = [s["exp_avg"] for s in states]
                exp_avg_sqs[:] = [s["exp_avg_sq"] for s in states]
                steps[:] = [s["step"] for s in states]
                maxima[:] = [s["max_exp_avg_sq"] for s in states] if amsgrad else []
                masters[:] = [s[MASTER] for s in narrow]
                break
            except KeyError:
                assert complete
                for p, s in zip(params, states, strict=True):
                    self._complete(p, s, amsgrad)
        return (
            len({p.device for p in params}) == 1
            and set(map(type, grads)) == {Tensor}
            and {g.layout for g in grads} == {torch.strided}
            and dtypes.isdisjoint((torch.complex64, torch.complex128))
        )

    # ---- state ----

    def _moment_dtype(self, p: Tensor) -> torch.dtype:
        if p.dtype in (torch.complex64, torch.complex128):
            return p.dtype
        if p.dtype == torch.float64:
            return torch.float64
        return self.state_dtype or torch.float32

    def _complete(self, p: Tensor, state: dict[str, Any], amsgrad: bool) -> None:
        """Create what a parameter's state lacks: all of it before the first step."""
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for key in MOMENTS if amsgrad else MOMENTS[:2]:
            if key not in state:
                # Also right for a DTensor, whose state is then sharded like the parameter.
                state[key] = torch.zeros_like(
                    p, dtype=self._moment_dtype(p), memory_format=torch.preserve_format
                )
        if self.master_weights and p.dtype in NARROW and MASTER not in state:
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
        expected = f"for groups of {sizes} parameters"
        fix = "build the optimizer with the groups that it was saved with"
        fits = sizes == saved_sizes
        self._expect(fits, "the loaded state_dict", expected, saved_sizes, fix)
        parameter_of: dict[Any, tuple[Tensor, dict[str, Any]]] = {}
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            self._check_loaded(group, saved)
            for number, p in zip(saved["params"], group["params"], strict=True):
                parameter_of[number] = p, group
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, value in state_dict["state"].items():
            if key in parameter_of:
                p, group = parameter_of[key]
                state[p] = self._adopt(key, p, group, value)
            else:
                state[key] = value
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            saved["params"] = group["params"]
            if "param_names" in group:
                saved.setdefault("param_names", group["param_names"])
        self.__setstate__({"state": state, "param_groups": saved_groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _kept(self, p: Tensor, group: dict[str, Any]) -> tuple[str, set[str], dict[str, Any]]:
        """What a parameter's state is of: in words, what it has to have, dtypes of the tensors."""
        words = f"of an Adam, with step, {' and '.join(MOMENTS[:2])}"
        return words, {"step", *MOMENTS[:2]}, dict.fromkeys(MOMENTS, self._moment_dtype(p))

    def _adopt(
        self, number: Any, p: Tensor, group: dict[str, Any], saved: dict[str, Any]
    ) -> dict[str, Any]:
        """One parameter's loaded state, copied to its device and layout and to our dtypes."""
        adopted: dict[str, Any] = {}
        expected, needed, dtypes = self._kept(p, group)
        if saved and not needed <= saved.keys():
            what = f"the state of parameter {number} in the loaded state_dict"
            got = ", ".join(map(str, saved))
            fix = "the state of another kind of optimizer cannot be continued"
            raise self._expect.error(what, expected, got, fix)
        for key, value in saved.items():
            if key == "step":
                step = torch.as_tensor(value, dtype=torch.float32, device=p.device)
                adopted[key] = step.detach().reshape(()).clone()
            elif key in dtypes or key == MASTER:
                if key == MASTER and not (self.master_weights and p.dtype in NARROW):
                    continue  # it would go stale
                what = f"{key!r} of parameter {number} in the loaded state_dict"
                self._expect.shape(what, value, p.shape, of="the parameter's shape")
                dtype = torch.float32 if key == MASTER else dtypes[key]
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


def _op_group(expect: Expect, options: dict[str, Any], lists: Sequence[list[Tensor]]) -> AdamGroup:
    beta1, beta2 = _two_betas(expect, options["betas"])
    params, grads, exp_avgs, exp_avg_sqs, maxima, masters, steps = lists
    lr = options["lr"]
    return AdamGroup(
        lr=lr if isinstance(lr, Tensor) else _number(expect, "lr", lr),
        beta1=_number(expect, "betas[0]", beta1),
        beta2=_number(expect, "betas[1]", beta2),
        eps=_number(expect, "eps", options["eps"]),
        weight_decay=_number(expect, "weight_decay", options["weight_decay"]),
        amsgrad=bool(options["amsgrad"]),
        maximize=bool(options["maximize"]),
        decoupled=bool(options["decoupled_weight_decay"]),
        params=params,
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        steps=steps,
        max_exp_avg_sqs=maxima,
        masters=masters,
    )


class _Work:
    """What one step has to do: groups by device, and gradients whose norm spans several ranks."""

    def __init__(self, expect: Expect) -> None:
        self.expect = expect
        self.by_device: dict[torch.device, list[AdamGroup]] = {}
        # (mesh, its dimensions over which the gradient is cut) -> this rank's pieces
        self.sharded: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
        # What is updated beside the op (by Muon), and its gradients, which count in the norm.
        self.beside: list[Any] = []
        self.beside_grads: dict[torch.device, list[Tensor]] = {}

    def needs_total_norm(self) -> bool:
        """Whether one call of the op does not see all gradients."""
        return bool(self.sharded or self.beside_grads) or len(self.by_device) > 1

    def add(self, device: torch.device, group: AdamGroup) -> None:
        self.by_device.setdefault(device, []).append(group)

    def add_one_by_one(self, options: dict[str, Any], lists: Sequence[list[Tensor]]) -> None:
        """A group of tensors on several devices, or of which some have to be unwrapped."""
        params, grads, exp_avgs, exp_avg_sqs, maxima, masters, steps = lists
        parts: dict[torch.device, AdamGroup] = {}
        next_maximum, next_master = iter(maxima), iter(masters)
        for i, p in enumerate(params):
            tensors = [p, grads[i], exp_avgs[i], exp_avg_sqs[i]]
            if maxima:
                tensors.append(next(next_maximum))
            mastered = bool(masters) and p.dtype in NARROW
            if mastered:
                tensors.append(next(next_master))
            if type(grads[i]) is not Tensor or grads[i].layout is not torch.strided:
                tensors = self.unwrap(tensors)
            elif p.is_complex():
                tensors = [torch.view_as_real(t) for t in tensors]
            if p.device not in parts:
                parts[p.device] = _op_group(self.expect, options, [[] for _ in lists])
                self.add(p.device, parts[p.device])
            here = parts[p.device]
            here.params.append(tensors[0])
            here.grads.append(tensors[1])
            here.exp_avgs.append(tensors[2])
            here.exp_avg_sqs.append(tensors[3])
            here.steps.append(steps[i])
            if maxima:
                here.max_exp_avg_sqs.append(tensors[4])
            if mastered:
                here.masters.append(tensors[-1])

    def unwrap(self, tensors: list[Tensor]) -> list[Tensor]:
        """A parameter, its gradient and its state as plain real tensors.

        This rank's part of DTensors, and the real view of complex ones.
        """
        from torch.distributed.tensor import DTensor

        param, grad = tensors[0], tensors[1]
        what = f"the gradient of a parameter of shape {tuple(param.shape)}"
        fix = "use torch.optim.SparseAdam for it, or Embedding(sparse=False)"
        self.expect.dense(what, grad, "dense", fix, RuntimeError)
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
        grads_on = {device: list(grads) for device, grads in self.beside_grads.items()}
        for device, groups in self.by_device.items():
            grads_on.setdefault(device, []).extend(g for group in groups for g in group.grads)
        parts = []
        for device, grads in grads_on.items():
            whole = [g for g in grads if id(g) not in elsewhere]
            if whole:
                parts.append(op.adam_norm(whole, _on(grad_scale, device)))
        for (mesh, cut), pieces in self.sharded.items():
            square = op.adam_norm(pieces, _on(grad_scale, pieces[0].device)).double().square()
            for dim in cut:
                torch.distributed.all_reduce(square, group=mesh.get_group(dim))
            parts.append(square.sqrt())
        if not parts:
            return op.no_norm()
        device = parts[0].device
        norms = torch.stack([part.to(device, torch.float64, non_blocking=True) for part in parts])
        return torch.linalg.vector_norm(norms).float()


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def _number(expect: Expect, argument: str, value: Any) -> float:
    """A hyper-parameter's value; TypeError that names it where it is neither number nor tensor."""
    if type(value) is float:
        return value
    expected = "a number or a tensor of one element"
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise expect.error(argument, expected, shape_of(value))
        expect(value.device.type != "meta", argument, expected, "a meta tensor, without value")
    elif not isinstance(value, Real):
        raise expect.error(argument, expected, _shown(value), cls=TypeError)
    return float(value)


def _shown(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _two_betas(expect: Expect, betas: Any) -> tuple[Any, Any]:
    if not hasattr(betas, "__len__") or isinstance(betas, str):
        raise expect.error("betas", "two numbers", _shown(betas), cls=TypeError)
    expect(len(betas) == 2, "betas", "two numbers", betas)
    return betas[0], betas[1]


def _check_flag(expect: Expect, argument: str, value: Any, none: bool = False) -> None:
    if not isinstance(value, bool | int | np.bool_) and not (none and value is None):
        expected = "True, False or None" if none else "True or False"
        raise expect.error(argument, expected, _shown(value), cls=TypeError)


def _check_types(expect: Expect, options: dict[str, Any]) -> None:
    """Whether the hyper-parameters of a group are what a step can read."""
    for key in ("lr", "eps", "weight_decay"):
        _number(expect, key, options[key])
    for i, beta in enumerate(_two_betas(expect, options["betas"])):
        _number(expect, f"betas[{i}]", beta)
    for key, none in _FLAGS.items():
        _check_flag(expect, key, options[key], none)
    fix = "torch.optim's own optimizers can be differentiated through"
    expect(not options["differentiable"], "differentiable", "False", True, fix)


def _check_options(expect: Expect, options: dict[str, Any]) -> None:
    """Check one group's hyper-parameters; betas become a tuple, tensors stay tensors."""
    _check_types(expect, options)
    for key in ("lr", "eps", "weight_decay"):
        value = _number(expect, key, options[key])
        expect(value >= 0, key, "at least 0", value)
    options["betas"] = _two_betas(expect, options["betas"])
    for i, beta in enumerate(options["betas"]):
        value = _number(expect, f"betas[{i}]", beta)
        expect(0 <= value < 1, f"betas[{i}]", "at least 0 and below 1", value)
