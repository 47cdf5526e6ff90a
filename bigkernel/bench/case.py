"""What a benchmark case is, and how one is run."""

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigkernel import backend, registry, tuning
from bigkernel.measure import Plan, Run, Timing, interleave

OURS = "bigkernel"
REFERENCE = "bigkernel-torch"  # our own pure-PyTorch backend
LIMIT = "limit"
_with_peers = True


@dataclass(frozen=True)
class Bar:
    """What a case must reach: so many times the speed ``over`` a peer, or a share of the limit."""

    at_least: float
    over: str

    def __str__(self) -> str:
        if self.over == LIMIT:
            return f">= {self.at_least:.0%} of the limit"
        return f">= {self.at_least:g}x {self.over}"

    def reached(self, result: "Result") -> float | None:
        return result.share if self.over == LIMIT else result.ratio(self.over)

    def holds(self, value: float) -> bool:
        return value >= self.at_least


@dataclass(frozen=True)
class MemoryBar:
    """What a case may take: so many times the memory of ``over`` at the peak."""

    at_most: float
    over: str

    def __str__(self) -> str:
        return f"<= {self.at_most:g}x the memory of {self.over}"

    def reached(self, result: "Result") -> float | None:
        ours, theirs = (
            result.alone[name].peak if name in result.alone else None for name in (OURS, self.over)
        )
        return ours / theirs if ours is not None and theirs else None

    def holds(self, value: float) -> bool:
        return value <= self.at_most


@dataclass(frozen=True)
class TimeBar:
    """How often as long as ``over`` a case may take: a bar of what is slower by nature."""

    at_most: float
    over: str

    def __str__(self) -> str:
        return f"<= {self.at_most:g}x the time of {self.over}"

    def reached(self, result: "Result") -> float | None:
        ratio = result.ratio(self.over)
        return None if ratio is None else 1 / ratio

    def holds(self, value: float) -> bool:
        return value <= self.at_most


@dataclass(frozen=True)
class Alone:
    """What one competitor took in a process of its own.

    peak: bytes above what was held before, None where the system does not say. parts: seconds of a
    step, by its part. losses: of each step. seconds: of the timed steps together.
    """

    peak: int | None
    parts: dict[str, float]
    losses: list[float]
    seconds: float = 0.0


@dataclass
class Ready:
    """A case with its tensors: what to run, and what must hold before it is timed.

    runs: by name, ours first. check: compares the results of the runs that it is given and returns
    what was compared; raises AssertionError. op, tensors: what `explain` is asked, so that a
    fallback is seen. limit: a run that does ``limit_work`` where a call of ours does ``work``, both
    in the same unit; limit_name says what it is. skipped: peers that are not there, with the
    reason. alone: measures what a run takes in a process of its own, by its name; told: is given
    that, in the place of the run itself.
    """

    runs: dict[str, Run]
    check: Callable[[dict[str, Run]], str]
    op: str
    tensors: Sequence[Tensor]
    limit: Run | None = None
    work: float = 1.0
    limit_work: float = 1.0
    limit_name: str = ""
    skipped: dict[str, str] = field(default_factory=dict)
    alone: Callable[[str], Alone] | None = None
    told: Callable[[str, Alone], float] = lambda name, alone: alone.seconds


@dataclass(frozen=True)
class Case:
    """One row of a table. ``competitors`` are all names that ``build`` may give a run or skip.

    threads: that it is measured with, where not those that were asked for.
    """

    table: str
    name: str
    competitors: tuple[str, ...]
    build: Callable[[], Ready]
    bars: tuple[Bar | MemoryBar | TimeBar, ...] = ()
    unit: str = "s"
    items: float = 0.0  # in a call, for a table that shows items per second
    threads: int | None = None


@dataclass(frozen=True)
class Result:
    """A case's timings, and what follows from them."""

    case: Case
    timings: dict[str, Timing]
    work: float
    limit_work: float
    compared: str
    backend: str
    skipped: dict[str, str]
    limit_name: str = ""
    alone: dict[str, Alone] = field(default_factory=dict)

    def ratio(self, peer: str) -> float | None:
        """How many times as fast as ``peer`` we are; None if it was not there."""
        if peer not in self.timings:
            return None
        return self.timings[peer].median / self.timings[OURS].median

    @property
    def share(self) -> float | None:
        """Our rate of work over the limit's."""
        ratio = self.ratio(LIMIT)
        return None if ratio is None else ratio * self.work / self.limit_work

    def held(self, bar: Bar | MemoryBar | TimeBar) -> bool | None:
        value = bar.reached(self)
        return None if value is None else bar.holds(value)


def peer(module: str) -> Any:
    """Import a peer's package. ImportError where it is not there, or not to be asked."""
    if not _with_peers:
        raise ImportError("not asked for")
    return importlib.import_module(module)


@contextlib.contextmanager
def without_peers() -> Iterator[None]:
    """Inside, cases are built as if nothing were installed but torch, which they are held to."""
    global _with_peers
    before, _with_peers = _with_peers, False
    try:
        yield
    finally:
        _with_peers = before


def judged(case: Case, ready: Ready) -> dict[str, Run]:
    """Our run and the one to whose error it is held, the first competitor that is not ours."""
    theirs = [name for name in case.competitors if name not in (OURS, REFERENCE)][:1]
    return {name: ready.runs[name] for name in (OURS, *theirs) if name in ready.runs}


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Inside, a fallback of an op to PyTorch is an error, and no call is left to torch by choice.

    (`bigkernel tune-kernels` may have measured that torch's own code is faster.)
    """
    before = os.environ.get("BIGKERNEL_STRICT")
    os.environ["BIGKERNEL_STRICT"] = "1"
    try:
        with tuning.ignored():
            yield
    finally:
        if before is None:
            del os.environ["BIGKERNEL_STRICT"]
        else:
            os.environ["BIGKERNEL_STRICT"] = before


def on_torch(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same call on bigkernel's own PyTorch backend."""

    def call(*arguments: Any) -> Any:
        with backend.use_backend("torch"):
            return run(*arguments)

    return call


def native_backend(case: Case, ready: Ready) -> str:
    """`explain`'s sentence; RuntimeError if our row would not be timed on the native kernel."""
    sentence = backend.explain(ready.op, *ready.tensors)
    if ready.tensors[0].device.type in registry.find(ready.op).absent:
        return sentence  # composed of torch's calls: there is nothing to fall back from
    if not sentence.startswith(f"{ready.op}: {ready.tensors[0].device.type}"):
        raise RuntimeError(
            f"the case {case.name!r} would not time the native kernel: {sentence}. "
            "Build it (make setup) and leave BIGKERNEL_BACKEND and BIGKERNEL_NATIVE unset."
        )
    return sentence


@contextlib.contextmanager
def with_threads(count: int | None) -> Iterator[None]:
    """Inside, torch and the kernels take so many threads; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _noting(runs: dict[str, Run], seconds: dict[str, float]) -> dict[str, Run]:
    """The runs, which also note how long their last call took."""

    def noting(name: str, run: Run) -> Run:
        def call() -> object:
            begin = time.perf_counter()
            result = run()
            took = time.perf_counter() - begin
            seconds[name] = result if isinstance(result, float) else took
            return result

        return call

    return {name: noting(name, run) for name, run in runs.items()}


def run_case(case: Case, plan: Plan) -> Result:
    """Build, check and time a case. RuntimeError if our row is not native, or is wrong."""
    with strict(), with_threads(case.threads):
        ready = case.build()
        runs = dict(ready.runs)
        sentence = native_backend(case, ready)
        alone: dict[str, Alone] = {}
        if plan.alone and ready.alone is not None:
            alone = {name: ready.alone(name) for name in runs}
            runs = {name: partial(ready.told, name, alone[name]) for name in runs}
        first_calls: dict[str, float] = {}
        try:
            compared = ready.check(_noting(runs, first_calls))
        except AssertionError as error:
            raise RuntimeError(f"the results of {case.name!r} do not agree: {error}") from error
        timings = {name: Timing((first_calls[name],)) for name in alone}
        left = {name: run for name, run in runs.items() if name not in alone}
        if ready.limit is not None:
            left[LIMIT] = ready.limit
        timings |= interleave(left, plan, first_calls) if left else {}
        if ready.alone is not None and not alone:
            alone = {name: ready.alone(name) for name in runs}
    return Result(
        case,
        timings,
        ready.work,
        ready.limit_work,
        compared,
        sentence,
        dict(ready.skipped),
        ready.limit_name,
        alone,
    )
