"""Measuring on a GPU: CUDA events around each call, L2 flushed before it, competitors by turns.

Kernel time is the device's alone: it is kept busy until the host has queued the whole call. Eager
time is a call's share of some in a row, Python and launches included.

The same functions run on a CPU with another clock, which is how they are tested.
"""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

import bigkernel.ops  # noqa: F401 - registers the ops
from bigkernel import registry
from bigkernel.bench.case import LIMIT, OURS, REFERENCE, Bar, strict
from bigkernel.measure import Plan, Run, Timing, interleave
from bigkernel.optim import AdamW

PLAN = Plan(share=0.25, rounds=50, least=10, warmups=2, sample=0.0, settle=0.0)
# Of what is many times slower than the rest and only there for the record.
FEW = Plan(share=0.05, rounds=5, least=3, warmups=1, sample=0.0, settle=0.0)
MATH = "SDPA math"
SLOW = (REFERENCE, MATH)
FLUSH = 256 << 20  # bytes; more than any L2 cache
SPIN_MOST = 20e-3  # seconds; of calls of more launches than a queue holds the host's time is seen
EAGER_CALLS = 10
EAGER_SHARE = 0.1  # seconds of calls in a row, about


class Clock(Protocol):
    """What takes the time of one call."""

    def prepare(self, seconds: float) -> None:
        """Flush the L2 cache, and keep the device busy for so long; returns at once."""
        ...

    def start(self) -> None: ...
    def stop(self) -> float:
        """Seconds since `start`, of the device's work."""
        ...

    def wait(self) -> None:
        """Until the device has done all that was queued."""
        ...


class CudaClock:
    """CUDA events on the current stream."""

    def __init__(self) -> None:
        self.room = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.cycles = 1e9  # of a spin, a second
        for _ in range(2):  # the clock has risen at the second time
            self.start()
            torch.cuda._sleep(10_000_000)
            self.cycles = 1e7 / self.stop()

    def prepare(self, seconds: float) -> None:
        self.room.zero_()
        torch.cuda._sleep(int(seconds * self.cycles))

    def start(self) -> None:
        self.events[0].record()

    def stop(self) -> float:
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize()


class HostClock:
    """The processor's time, where there is no GPU."""

    def prepare(self, seconds: float) -> None:
        pass

    def start(self) -> None:
        self.begin = time.perf_counter()

    def stop(self) -> float:
        return time.perf_counter() - self.begin

    def wait(self) -> None:
        pass


def launch_time(run: Callable[[], object], clock: Clock) -> float:
    """Seconds that the host takes to queue a call, once all is loaded and allocated."""
    for _ in range(2):
        clock.wait()
        begin = time.perf_counter()
        run()
        took = time.perf_counter() - begin
    clock.wait()  # errors of the device come out here
    return took


def timed(run: Callable[[], object], clock: Clock, launches: float) -> Run:
    """A run that returns its own time, as `interleave` takes it.

    The device spins for twice the time that launching took, and then some: an event that it meets
    before the call is queued would count the host's time.
    """
    spin = min(2 * launches + 50e-6, SPIN_MOST)

    def call() -> float:
        clock.prepare(spin)
        clock.start()
        run()
        return clock.stop()

    return call


def eager_time(run: Callable[[], object], clock: Clock, about: float) -> float:
    """Seconds of a call among some in a row, launches included; it takes ``about`` so long."""
    calls = max(1, min(EAGER_CALLS, int(EAGER_SHARE / max(about, 1e-9))))
    clock.wait()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    clock.wait()
    return (time.perf_counter() - begin) / calls


@dataclass
class Row:
    """One case: times by competitor, and the work of a call, in ``unit`` (of the limit: its own).

    skipped: competitors that are not there or do not run this, with the reason. eager: seconds of
    a call with its launches. bars: what ours has to reach.
    """

    case: str
    timings: dict[str, Timing]
    unit: str  # "FLOP", "B" or "images"
    work: float
    limit_work: float
    skipped: dict[str, str]
    eager: dict[str, float] = field(default_factory=dict)
    bars: Sequence[Bar] = ()

    def rate(self, name: str) -> float:
        work = self.limit_work if name == LIMIT else self.work
        return work / self.timings[name].median

    def share(self, name: str) -> float | None:
        """Of the limit's rate."""
        return self.rate(name) / self.rate(LIMIT) if LIMIT in self.timings else None

    def reached(self, bar: Bar) -> float | None:
        """What ours reached of a bar; None where what it is over did not run."""
        if bar.over not in self.timings:
            return None
        if bar.over == LIMIT:
            return self.share(OURS)
        return self.timings[bar.over].median / self.timings[OURS].median

    def as_dict(self) -> dict[str, Any]:
        reached = {bar: self.reached(bar) for bar in self.bars}
        return {
            "case": self.case,
            "unit": self.unit,
            "skipped": self.skipped,
            "bars": [
                {"bar": str(bar), "value": v, "held": None if v is None else bar.holds(v)}
                for bar, v in reached.items()
            ],
            "results": {
                name: {
                    "median_s": timing.median,
                    "quartiles_s": timing.quartiles,
                    "rounds": len(timing.samples),
                    "eager_s": self.eager.get(name),
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
    bars: Sequence[Bar] = (),
    plan: Plan | None = None,
) -> Row:
    """Time the competitors that run at all; ours has to. Our own torch backend comes first."""
    order = [name for name in (REFERENCE, OURS) if name in runs]
    order += [name for name in runs if name not in order]
    able: dict[str, Run] = {}
    for name in order:
        try:
            able[name] = timed(runs[name], clock, launch_time(runs[name], clock))
        except Exception as error:
            if name == OURS:
                raise
            skipped[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    slow = {name: run for name, run in able.items() if name in SLOW}
    timings = interleave(
        {name: run for name, run in able.items() if name not in slow}, plan or PLAN
    )
    if slow:
        timings |= interleave(slow, FEW)
    timings = {name: timings[name] for name in able}
    eager = {name: eager_time(runs[name], clock, timing.median) for name, timing in timings.items()}
    return Row(case, timings, *work, skipped, eager, bars)


def installed(module: str, skipped: dict[str, str], name: str) -> Any | None:
    """The module; None, and a reason in ``skipped``, where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package built for another torch fails in ways of its own
        skipped[name] = f"{type(error).__name__}: {error}"
        return None


# A table: the name of each case, and what measures it.
Cases = Iterator[tuple[str, Callable[[], Row]]]


def copy_of(size: int, device: str) -> tuple[Callable[[], object], float]:
    """A copy that reads and writes about ``size`` bytes together, and how many they are."""
    source = torch.zeros(size // 8, device=device)
    return partial(torch.empty_like(source).copy_, source), 8.0 * source.numel()


OPS = tuple(op.noun for op in registry.every() if "cuda" not in op.absent)


def of_op(noun: str) -> Any:
    """What is measured of an op that has CUDA kernels: its ``cases``, and what is ``repeated``."""
    return importlib.import_module(f"bigkernel.bench.gpu_{noun}")


def deterministic(device: str, times: int = 30) -> list[str]:
    """Runs each op ``times`` times; AssertionError where two runs differ in a bit."""
    for name in OPS:
        run = of_op(name).repeated(device)
        with strict():
            first = [x.detach().clone() for x in run()]
            for k in range(1, times):
                for a, b in zip(first, run(), strict=True):
                    assert torch.equal(a, b), f"{name}: run {k} differs from the first"
    return [f"{name}: {times} runs, the same bits" for name in OPS]


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
