"""Timing several functions side by side."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# A function under test; if it returns a float, that is the time it took, in seconds, by its own
# clock (a training run that leaves its set-up out).
Run = Callable[[], object]


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    share: seconds that each function of a case may take; rounds: at most so many samples of
    each; least: at least so many, of however slow a function; warmups: calls before that, two
    for a function whose first takes longer than its share; sample: seconds that a sample lasts
    at least, over as many calls as that takes; settle: a function that takes less is called
    once, untimed, before each sample, so that it finds in the caches what it left there and not
    what another one did. The first call, which pays for what is loaded and allocated once
    (torch's first gradient imports sympy, some seconds), is a sample only of a function that
    takes more than ``patience`` seconds: it is not called again. alone: of
    what can be run in a process of its own, that one run is all that is taken.
    """

    share: float = 2.0
    rounds: int = 60
    least: int = 3
    warmups: int = 3
    sample: float = 2e-3
    settle: float = 2e-2
    patience: float = 10.0
    alone: bool = False


QUICK = Plan(share=0.2, rounds=15, least=1, warmups=2, alone=True)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the samples, their median and their quartiles."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Distance of the quartiles (IQR), as a share of the median."""
        low, high = self.quartiles
        return (high - low) / self.median


def once(run: Run, calls: int = 1) -> float:
    """Seconds of a call, on average over ``calls``."""
    begin = time.perf_counter()
    own = run()
    if isinstance(own, float):
        return own
    for _ in range(calls - 1):
        run()
    return (time.perf_counter() - begin) / calls


def interleave(
    runs: Mapping[str, Run], plan: Plan, first_calls: Mapping[str, float] | None = None
) -> dict[str, Timing]:
    """Time each function in turn, round by round.

    ``first_calls`` are the seconds of calls that were made before, where there were any.

    A function whose share of time is too short for every round takes part in rounds that are spread
    evenly over the measurement. Each round begins with another function.
    """
    names = list(runs)
    calls, wanted, only = {}, {}, {}
    settled = set()
    for name, run in runs.items():
        first = (first_calls or {}).get(name) or once(run)
        slow = first > plan.share
        if first > plan.patience:
            wanted[name], only[name] = 0, first
            continue
        took = min([first, *(once(run) for _ in range(1 if slow else plan.warmups - 1))])
        if took < plan.settle:
            settled.add(name)
            took = min(took, once(run))
        calls[name] = max(1, math.ceil(plan.sample / max(took, 1e-9)))
        samples = int(plan.share / max(took * calls[name], 1e-9))
        wanted[name] = max(plan.least, min(plan.rounds, samples))
    rounds = max(wanted.values())
    samples_of = {name: [only[name]] if name in only else [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            start = i % len(names)
            for name in names[start:] + names[:start]:
                if (i + 1) * wanted[name] // rounds > i * wanted[name] // rounds:
                    if name in settled:
                        runs[name]()
                    samples_of[name].append(once(runs[name], calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(samples)) for name, samples in samples_of.items()}
