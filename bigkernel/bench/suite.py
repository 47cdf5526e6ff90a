"""The tables that there are: one for each op that has a benchmark, a call's overhead, training."""

import importlib

import bigkernel.ops  # noqa: F401 - registers the ops
from bigkernel import registry
from bigkernel.bench.case import Case

OPS = tuple(op.noun for op in registry.every() if "benchmark" not in op.absent)
TABLES = (*OPS, "overhead", "train")


def cases_of(table: str, small: bool = False, device: str = "cpu") -> list[Case]:
    """The cases of one table; ``small`` has the same ones at sizes for a test.

    device: another one than the CPU is known to the tables of ops that have kernels there. Those
    cases can be checked and not timed: a GPU has a clock and limits of its own (``gpu.py``).
    """
    module = importlib.import_module(f"bigkernel.bench.{table}")
    given = () if device == "cpu" else (device,)
    cases: list[Case] = module.cases(small, *given)
    return cases
