"""Benchmarks against the peers and against the machine: ``bigkernel bench``.

How it measures: every implementation of a case runs in turn, round by round, so that what the
machine does meanwhile falls on all alike; the first calls do not count; the result is a median
with its quartiles. Before a case is timed, its results are checked against float64. The limit of a
case, such as the rate of a matrix product, is one more competitor of the same rounds.
"""

from bigkernel.bench.case import Bar, Case, Result, run_case
from bigkernel.bench.suite import OPS, TABLES, cases_of
from bigkernel.measure import Plan, Timing, interleave

__all__ = [
    "OPS",
    "TABLES",
    "Bar",
    "Case",
    "Plan",
    "Result",
    "Timing",
    "cases_of",
    "interleave",
    "run_case",
]
