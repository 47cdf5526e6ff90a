"""Measuring on a GPU: CUDA events around each call, L2 flushed before it, competitors by turns.

The same functions run on a CPU with another clock, which is how they are tested.
"""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import bigkernel
from bigkernel.bench import adam, augment
from bigkernel.bench.attention import Spec
from bigkernel.bench.case import OURS, REFERENCE, on_torch, strict
from bigkernel.bench.measure import Plan, Run, Timing, interleave
from bigkernel.optim import AdamW
from bigkernel.testing.tolerance import assert_as_accurate

LIMIT = "limit"
PLAN = Plan(share=0.5, rounds=100, least=10, warmups=3, sample=0.0)
FLUSH = 256 << 20  # bytes; more than any L2 cache


class Clock(Protocol):
    """What takes the time of one call."""

    def flush(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> float:
        """Seconds since `start`, of the device's work."""
        ...


class CudaClock:
    """CUDA events on the current stream."""

    def __init__(self) -> None:
        self.room = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def flush(self) -> None:
        self.room.zero_()  # which also gives the host time to queue what is to be measured

    def start(self) -> None:
        self.events[0].record()

    def stop(self) -> float:
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3


class HostClock:
    """The processor's time, where there is no GPU."""

    def flush(self) -> None:
        pass

    def start(self) -> None:
        self.begin = time.perf_counter()

    def stop(self) -> float:
        return time.perf_counter() - self.begin


def timed(run: Callable[[], object], clock: Clock) -> Run:
    """A run that returns its own time, as `interleave` takes it."""

    def call() -> float:
        clock.flush()
        clock.start()
        run()
        return clock.stop()

    return call


@dataclass
class Row:
    """One case: times by competitor, and the work of a call, in ``unit`` (of the limit: its own).

    skipped: competitors that are not there or do not run this, with the reason.
    """

    case: str
    timings: dict[str, Timing]
    unit: str  # "FLOP", "B" or "images"
    work: float
    limit_work: float
    skipped: dict[str, str]

    def rate(self, name: str) -> float:
        work = self.limit_work if name == LIMIT else self.work
        return work / self.timings[name].median

    def share(self, name: str) -> float | None:
        """Of the limit's rate."""
        return self.rate(name) / self.rate(LIMIT) if LIMIT in self.timings else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "unit": self.unit,
            "skipped": self.skipped,
            "results": {
                name: {
                    "median_s": timing.median,
                    "quartiles_s": timing.quartiles,
                    "rounds": len(timing.samples),
                    "rate": self.rate(name),
                    "share_of_limit": self.share(name),
                }
                for name, timing in self.timings.items()
            },
        }


def measure(
    case: str,
    runs: Mapping[str, Callable[[], object]],
    skipped: dict[str, str],
    clock: Clock,
    work: tuple[str, float, float],
    plan: Plan = PLAN,
) -> Row:
    """Time the competitors that run at all; ours has to. Our own torch backend comes first."""
    order = [name for name in (REFERENCE, OURS) if name in runs]
    order += [name for name in runs if name not in order]
    able: dict[str, Run] = {}
    for name in order:
        run = timed(runs[name], clock)  # which waits for the result: errors come out here
        try:
            run()
        except Exception as error:
            if name == OURS:
                raise
            skipped[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            able[name] = run
    return Row(case, interleave(able, plan), *work, skipped)


def installed(module: str, skipped: dict[str, str], name: str) -> Any | None:
    """The module; None, and a reason in ``skipped``, where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package built for another torch fails in ways of its own
        skipped[name] = f"{type(error).__name__}: {error}"
        return None


def matrix_product(device: str, dtype: torch.dtype, side: int) -> Callable[[], object]:
    """A call that multiplies two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def attention_specs(small: bool = False) -> list[Spec]:
    """The shapes, dtypes and directions that attention is timed at; ``small`` ones for tests."""
    shapes = [(1, 24, 4608, 128), (8, 16, 1024, 64), (2, 16, 4096, 64), (2, 16, 4096, 128)]
    if small:
        shapes = [(1, 2, 40, 16)]
    return [
        Spec(*shape, dtype=dtype, causal=causal, backward=backward)
        for shape in shapes
        for dtype in (torch.bfloat16, *([torch.float32] if shape[3] == 64 else []))
        for causal in (False, True)
        for backward in (False, True)
    ]


# A table: the name of each case, and what measures it.
Cases = Iterator[tuple[str, Callable[[], Row]]]


def attention_cases(device: str, clock: Clock, small: bool = False) -> Cases:
    """Against each backend of SDPA, and flash-attn; the limit is a large matrix product."""
    side = 64 if small else 8192

    def row(spec: Spec) -> Row:
        product = matrix_product(device, spec.dtype, side)
        with strict():
            problem = Attention(spec, device)
            problem.check()
            runs, skipped = problem.runs()
            work = ("FLOP", spec.flops(), 2.0 * side**3)
            return measure(spec.name, {**runs, LIMIT: product}, skipped, clock, work)

    for spec in attention_specs(small):
        yield spec.name, partial(row, spec)


class Attention:
    """The tensors of a case, and what is run on them."""

    def __init__(self, spec: Spec, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shape, self.spec = (spec.batch, spec.length, spec.heads, spec.dim), spec

        def draw() -> Tensor:
            x = torch.randn(shape, generator=generator).to(device, spec.dtype)
            return x.transpose(1, 2).requires_grad_(spec.backward)

        self.inputs = (draw(), draw(), draw())
        self.dout = draw().detach()

    def whole(
        self,
        function: Callable[..., Tensor],
        inputs: tuple[Tensor, ...] | None = None,
        dout: Tensor | None = None,
    ) -> list[Tensor]:
        """The output, and with ``backward`` the gradients."""
        inputs, dout = inputs or self.inputs, self.dout if dout is None else dout
        out = function(*inputs)
        return [out, *(torch.autograd.grad(out, inputs, dout) if self.spec.backward else ())]

    def ours(self) -> list[Tensor]:
        causal = self.spec.causal
        return self.whole(
            lambda q, k, v: bigkernel.scaled_dot_product_attention(q, k, v, is_causal=causal)
        )

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * self.spec.dim**-0.5
        if self.spec.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(-1) @ v

    def check(self) -> None:
        """Ours against float64 on the last head, to twice the error of the plain computation."""
        heads = tuple(x[-1:, -1:].detach() for x in self.inputs)
        results = []
        for dtype in (torch.float64, self.spec.dtype):
            leaves = tuple(x.to(dtype).requires_grad_(self.spec.backward) for x in heads)
            results.append(self.whole(self.plain, leaves, self.dout[-1:, -1:].to(dtype)))
        for mine, exact, plain in zip(self.ours(), *results, strict=True):
            assert mine.isfinite().all(), f"{self.spec.name}: a result is not finite"
            assert_as_accurate(mine[-1:, -1:].detach(), exact.detach(), plain.detach())

    def runs(self) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
        causal, skipped = self.spec.causal, dict[str, str]()
        runs: dict[str, Callable[[], object]] = {REFERENCE: on_torch(self.ours), OURS: self.ours}
        kinds = importlib.import_module("torch.nn.attention")

        def through(backend: str) -> list[Tensor]:
            with kinds.sdpa_kernel(getattr(kinds.SDPBackend, backend)):
                return self.whole(lambda q, k, v: sdpa(q, k, v, is_causal=causal))

        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
            runs[f"SDPA {backend.split('_')[0].lower()}"] = partial(through, backend)
        flash = installed("flash_attn", skipped, "flash-attn")
        if flash is not None:

            def flash_attn(*inputs: Tensor) -> Tensor:
                rows = (x.transpose(1, 2) for x in inputs)
                out: Tensor = flash.flash_attn_func(*rows, causal=causal)
                return out.transpose(1, 2)

            runs["flash-attn"] = lambda: self.whole(flash_attn)
        return runs, skipped


def adam_cases(device: str, clock: Clock, small: bool = False) -> Cases:
    """GPT-2's parameters, against torch and Apex; the limit is a copy of as many bytes."""
    shapes = adam.gpt2(16, 1, 50, 10) if small else adam.gpt2()
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def params(dtype: torch.dtype) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        made = []
        for shape in shapes:
            p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
            p.grad = torch.randn(shape, generator=generator).to(device, dtype)
            made.append(p)
        return made

    def row(name: str, dtype: torch.dtype, width: int) -> Row:
        ours, skipped = AdamW(params(dtype), **options), dict[str, str]()
        runs: dict[str, Callable[[], object]] = {
            REFERENCE: on_torch(AdamW(params(dtype), **options).step),
            OURS: ours.step,
            "torch fused": torch.optim.AdamW(params(dtype), fused=True, **options).step,
            "torch foreach": torch.optim.AdamW(params(dtype), foreach=True, **options).step,
        }
        apex = installed("apex.optimizers", skipped, "Apex")
        if apex is not None:
            runs["Apex"] = apex.FusedAdam(params(dtype), adam_w_mode=True, **options).step
        work = width * sum(p.numel() for p in params(dtype))
        runs[LIMIT], moved = copy_of(work, device)
        with strict():
            # torch keeps moments in the parameters' dtype: in bf16 it moves less, and rounds more.
            return measure(name, runs, skipped, clock, ("B", work, moved))

    for dtype, width in ((torch.float32, 28), (torch.bfloat16, 22)):  # bytes an element
        name = f"{'fp32' if dtype == torch.float32 else 'bf16, fp32 moments'}, GPT-2, 124M"
        yield name, partial(row, name, dtype, width)


def copy_of(size: int, device: str) -> tuple[Callable[[], object], float]:
    """A copy that reads and writes about ``size`` bytes together, and how many they are."""
    source = torch.zeros(size // 8, device=device)
    return partial(torch.empty_like(source).copy_, source), 8.0 * source.numel()


def augment_cases(device: str, clock: Clock, small: bool = False) -> Cases:
    """Batches of uint8 images on the device, against torchvision image by image, and Kornia."""
    shape: dict[str, Any] = (
        {"count": 2, "size": (40, 32), "output": 24} if small else {"count": 256}
    )
    peers: dict[str, Any] = {
        augment.TORCHVISION: augment.Torchvision,
        augment.KORNIA: augment.Kornia,
    }

    def row(spec: augment.Spec) -> Row:
        skipped = dict[str, str]()
        images = [image.to(device) for image in augment._images(spec)]
        batch, chain = torch.stack(images), augment._ours(spec)
        runs: dict[str, Callable[[], object]] = {OURS: partial(chain, batch)}
        runs[REFERENCE] = on_torch(runs[OURS])
        for name, make in peers.items():
            try:
                runs[name] = make(spec).run(images)
            except Exception as error:  # one built for another torch fails in ways of its own
                skipped[name] = f"{type(error).__name__}: {error}"
        runs[LIMIT], _ = copy_of(batch.numel() + 4 * 3 * spec.count * spec.output**2, device)
        with strict():
            return measure(spec.name, runs, skipped, clock, ("images", spec.count, spec.count))

    simple = "crop + flip + normalise"
    full = "crop + flip + rotate + jitter + normalise"
    for spec in (augment.Spec(simple, **shape), augment.Spec(full, full=True, **shape)):
        yield spec.name, partial(row, spec)


TABLES = {"attention": attention_cases, "adam": adam_cases, "augment": augment_cases}


def deterministic(device: str, times: int = 30) -> list[str]:
    """Runs each op ``times`` times; AssertionError where two runs differ in a bit."""
    spec = Spec(2, 4, 300, 64, causal=True, backward=True)
    problem, chain_spec = Attention(spec, device), augment.Spec("", 4, (100, 90), 64, full=True)
    batch = torch.stack(augment._images(chain_spec)).to(device)
    chain = augment._ours(chain_spec)

    def transformed() -> list[Tensor]:
        ids = torch.arange(4)  # draws are keyed by them
        return [chain(batch, torch.Generator().manual_seed(3), ids=ids)]

    def stepped() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(5000, generator=generator).to(device, torch.bfloat16))
        optimizer = AdamW([p], max_grad_norm=1.0, stochastic_rounding=True)
        for _ in range(3):
            p.grad = torch.randn(5000, generator=generator).to(device, torch.bfloat16)
            optimizer.step()
        return [p.detach(), *optimizer.state[p].values()]

    compared = {"attention": problem.ours, "augment": transformed, "adam": stepped}
    for name, run in compared.items():
        first = [x.detach().clone() for x in run()]
        for k in range(1, times):
            for a, b in zip(first, run(), strict=True):
                assert torch.equal(a, b), f"{name}: run {k} differs from the first"
    return [f"{name}: {times} runs, the same bits" for name in compared]


Capture = Callable[[Callable[[], object]], Callable[[], object]]


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The run as a CUDA graph; returns its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def optimizer_in_graph(device: str, capture: Capture, steps: int = 5) -> str:
    """Steps replayed from a graph against steps as usual; AssertionError where they differ."""

    def train(through: Capture) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(5000, generator=generator).to(device))
        p.grad = torch.zeros_like(p)
        lr = torch.tensor(1e-2, device=device)
        optimizer = AdamW([p], lr=lr, max_grad_norm=1.0, capturable=True)
        optimizer.step()  # makes the state
        run: Callable[[], object] = through(optimizer.step)
        for k in range(steps):
            p.grad.copy_(torch.randn(5000, generator=generator))
            lr.fill_(1e-2 / (k + 1))
            run()
        return [p.detach(), *optimizer.state[p].values()]

    for a, b in zip(train(capture), train(lambda run: run), strict=True):
        assert torch.equal(a, b), "the optimizer's step differs when it is replayed from a graph"
    return f"{steps} steps with clipping and a changing lr, replayed: the same bits"
