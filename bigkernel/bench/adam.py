"""AdamW against torch.optim's, and against a loop that only moves the step's memory.

Lists: 1,000 tensors of 1,000 elements; the 148 tensors of GPT-2 small, 124M parameters. All
implementations of a case work on the same tensors, moments included.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigkernel.bench.case import LIMIT, OURS, REFERENCE, Bar, Case, Ready, on_torch, peer
from bigkernel.bench.limits import adam_stream
from bigkernel.measure import Run
from bigkernel.ops.adam import reference
from bigkernel.optim import AdamW
from bigkernel.testing.tolerance import assert_as_accurate

FUSED, FOREACH = "torch fused", "torch foreach"
DEEPSPEED = "DeepSpeed CPUAdam"
THEIRS: dict[str, dict[str, Any]] = {FUSED: {"fused": True}, FOREACH: {"foreach": True}}
LR, DECAY, BETAS, EPS = 1e-4, 0.1, (0.9, 0.95), 1e-8
CLIP = 1.0
STEPS = 9.0  # done before: with step 1 all updates would be of one size
CHECKED = 1_000_000  # elements that are compared with float64


def gpt2(width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024) -> Any:
    """The shapes of GPT-2's parameters, in their order."""
    vector, wide = (width,), 4 * width
    block = [
        *(vector, vector, (width, 3 * width), (3 * width,), (width, width), vector),
        *(vector, vector, (width, wide), (wide,), (wide, width), vector),
    ]
    return [(vocabulary, width), (context, width), *block * layers, vector, vector]


def cases(small: bool = False, device: str = "cpu") -> list[Case]:
    """The table; ``small`` has the same cases at sizes for a test."""
    many = [(1000,)] * (20 if small else 1000)
    model = gpt2(16, 1, 50, 10) if small else gpt2()
    names = {"1,000 tensors of 1,000": many, "GPT-2, 124M parameters": model}
    bars = {
        ("1,000 tensors of 1,000", False): (Bar(5.0, FUSED),),
        ("GPT-2, 124M parameters", False): (Bar(1.0, FUSED), Bar(0.95, LIMIT)),
        ("GPT-2, 124M parameters", True): (Bar(1.3, FUSED),),
    }
    table = [
        Case(
            "adam",
            f"fp32 {'clip + step' if clip else 'step'}, {name}",
            (OURS, REFERENCE, FUSED, FOREACH, DEEPSPEED),
            partial(build, shapes, clip, device),
            bars.get((name, clip), ()),
        )
        for name, shapes in names.items()
        for clip in (False, True)
    ]
    masters = Case(
        "adam",
        "bf16, fp32 masters, step, GPT-2, 124M parameters",
        (OURS, REFERENCE, FUSED, FOREACH),
        partial(build_masters, model, device),
        (Bar(1.5, FUSED),),
    )
    return [*table, masters]


class Problem:
    """Parameters with gradients and moments that all optimizers of a case share."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(scale: float) -> list[Tensor]:
            return [torch.randn(s, generator=generator).mul_(scale).to(device) for s in shapes]

        self.params = [torch.nn.Parameter(x) for x in normal(1.0)]
        self.exp_avgs = normal(0.1)
        self.exp_avg_sqs = [x.square_() for x in normal(0.1)]
        for p, g in zip(self.params, normal(1.0), strict=True):
            p.grad = g
        # The smallest tensors, and the beginning of one large one.
        order = sorted(range(len(shapes)), key=lambda i: self.params[i].numel())
        self.checked: list[int] = []
        total = 0
        for i in order:
            total += self.params[i].numel()
            if total > CHECKED and self.checked:
                break
            self.checked.append(i)

    def share_state(self, optimizer: torch.optim.Optimizer, params: list[Any], **extra: Any) -> Any:
        """The optimizer, at step STEPS with our moments."""
        for i, p in enumerate(params):
            optimizer.state[p] = {
                "step": torch.tensor(STEPS, device=p.device),
                "exp_avg": self.exp_avgs[i],
                "exp_avg_sq": self.exp_avg_sqs[i],
                **{key: tensors[i] for key, tensors in extra.items()},
            }
        return optimizer


def _options() -> dict[str, Any]:
    return {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}


def build(shapes: list[tuple[int, ...]], clip: bool, device: str = "cpu") -> Ready:
    """A step in fp32, with or without clipping by the global norm first."""
    problem = Problem(shapes, device)
    params = problem.params
    grads = [p.grad for p in params if p.grad is not None]
    ours, plain = (
        problem.share_state(
            AdamW(params, max_grad_norm=CLIP if clip else None, **_options()), params
        )
        for _ in range(2)
    )
    optimizers = {OURS: ours, REFERENCE: plain}
    runs: dict[str, Run] = {OURS: ours.step, REFERENCE: on_torch(plain.step)}
    skipped = {}
    for name, flags in THEIRS.items():
        theirs = problem.share_state(torch.optim.AdamW(params, **flags, **_options()), params)
        optimizers[name] = theirs
        runs[name] = partial(_clip_and_step, params, theirs) if clip else theirs.step
    try:
        deepspeed = peer("deepspeed.ops.adam")
        theirs = deepspeed.DeepSpeedCPUAdam(params, adamw_mode=True, **_options())
        runs[DEEPSPEED] = partial(_clip_and_step, params, theirs) if clip else theirs.step
    except Exception as error:  # it compiles itself when it is made, which may fail in many ways
        skipped[DEEPSPEED] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    limit = None
    if device == "cpu":
        limit = adam_stream(params, grads, problem.exp_avgs, problem.exp_avg_sqs, norm=clip)
    return Ready(
        runs=runs,
        check=lambda runs: _check(problem, runs, optimizers, problem.params, clip),
        op="adam",
        tensors=params,
        limit=limit,
        skipped=skipped,
    )


def _clip_and_step(params: list[Any], optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(params, CLIP)
    optimizer.step()


def build_masters(shapes: list[tuple[int, ...]], device: str = "cpu") -> Ready:
    """A step of bf16 parameters by way of fp32 masters.

    torch's way: copy the gradients to fp32, step on the masters, copy them to the parameters.
    """
    problem = Problem(shapes, device)
    masters = problem.params
    narrow = [torch.nn.Parameter(p.detach().bfloat16()) for p in masters]
    wide_grads = [p.grad for p in masters if p.grad is not None]
    narrow_grads = [g.bfloat16() for g in wide_grads]
    for p, g in zip(narrow, narrow_grads, strict=True):
        p.grad = g
    copies = [p.detach() for p in masters]
    targets = [p.detach() for p in narrow]
    ours, plain = (
        problem.share_state(
            AdamW(narrow, master_weights=True, **_options()), narrow, master_param=copies
        )
        for _ in range(2)
    )
    optimizers = {OURS: ours, REFERENCE: plain}
    runs: dict[str, Run] = {OURS: ours.step, REFERENCE: on_torch(plain.step)}

    def through_masters(optimizer: torch.optim.Optimizer) -> None:
        torch._foreach_copy_(wide_grads, narrow_grads)
        optimizer.step()
        torch._foreach_copy_(targets, copies)

    for name, flags in THEIRS.items():
        optimizers[name] = problem.share_state(
            torch.optim.AdamW(masters, **flags, **_options()), masters
        )
        runs[name] = partial(through_masters, optimizers[name])
    return Ready(
        runs=runs,
        check=lambda runs: _check(problem, runs, optimizers, narrow, clip=False),
        op="adam",
        tensors=narrow,
    )


def _check(
    problem: Problem,
    runs: dict[str, Run],
    optimizers: dict[str, torch.optim.Optimizer],
    params: list[Any],
    clip: bool,
) -> str:
    """One step of each from the same state, against float64 on some of the tensors."""
    lists: dict[str, list[Any]] = {
        "params": problem.params,
        "exp_avgs": problem.exp_avgs,
        "exp_avg_sqs": problem.exp_avg_sqs,
    }
    some = problem.checked

    def take(tensors: list[Any]) -> list[Tensor]:
        return [tensors[i].detach().clone() for i in some]

    before = {name: take(tensors) for name, tensors in lists.items()}
    grads = [p.grad.clone() for p in params]  # clip_grad_norm_ scales them
    norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]).norm()

    exact = {name: [t.double() for t in tensors] for name, tensors in before.items()}
    reference.adam_step_(
        exact["params"],
        [grads[i].double() for i in some],
        exact["exp_avgs"],
        exact["exp_avg_sqs"],
        [],
        [],
        [torch.tensor(STEPS, device=norm.device) for _ in some],
        [len(some)],
        [reference.DECOUPLED],
        [LR],
        [],
        [BETAS[0]],
        [BETAS[1]],
        [EPS],
        [DECAY],
        CLIP if clip else None,
        norm if clip else None,
        None,
        None,
        None,
    )
    results: dict[str, dict[str, list[Tensor]]] = {}
    for name, run in runs.items():
        if name not in optimizers:
            continue  # its state is its own: nothing to begin from
        for key, tensors in lists.items():
            for i, value in zip(some, before[key], strict=True):
                tensors[i].detach().copy_(value)
        for p, g in zip(params, grads, strict=True):
            p.grad.copy_(g)
        for state in optimizers[name].state.values():
            state["step"].fill_(STEPS)
        run()
        results[name] = {key: take(tensors) for key, tensors in lists.items()}
    for p, g in zip(params, grads, strict=True):
        p.grad.copy_(g)
    for name, result in results.items():
        for key, tensors in result.items():
            mine, wanted, torchs = (
                torch.cat([t.flatten() for t in part])
                for part in (tensors, exact[key], results[FUSED][key])
            )
            try:
                assert_as_accurate(mine, wanted, torchs)
            except AssertionError as error:
                raise AssertionError(f"{key} of {name}: {error}") from None
    return (
        f"parameters and moments of {len(some)} tensors after one step, to twice torch's error "
        "against float64"
    )
