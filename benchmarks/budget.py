"""Tuning several competitors with one budget: each tries the same points, as often.

The competitors take turns, so that what else the machine does falls on all alike. Of each the point
with the lowest mean score is chosen; a choice at the end of the list is said, since the list may be
too short. What is compared afterwards has seeds that the choice has not seen.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

# Learning rates a factor of two apart, about the demo's 3e-3; Muon bears more.
RATES = [1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2]
# Of each competitor, of each point: its score with each seed.
Scores = dict[str, dict[float, list[float]]]


def try_all(
    names: Sequence[str],
    points: Sequence[float],
    seeds: Iterable[int],
    score: Callable[[str, float, int], float],
) -> Scores:
    """What ``score(name, point, seed)`` says of every competitor at every point with every seed."""
    scores: Scores = {name: {point: [] for point in points} for name in names}
    for seed in seeds:
        for point in points:
            for name in names:
                scores[name][point].append(score(name, point, seed))
    return scores


def choose(scores: Mapping[str, Mapping[float, Sequence[float]]], option: str) -> dict[str, float]:
    """The point of each with the lowest mean score; ``option`` would give more points.

    Of several equal ones it is the middle one, which is the least likely to be on an edge.
    """
    best = {}
    for name, by_point in scores.items():
        means = {point: statistics.mean(tried) for point, tried in by_point.items()}
        lowest = min(means.values())
        best[name] = statistics.median_low(p for p, mean in means.items() if mean == lowest)
        if best[name] in (min(by_point), max(by_point)):
            print(f"{name}: {best[name]:g} is at the end of the list: give more with {option}")
    return best
