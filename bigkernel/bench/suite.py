"""The tables that there are."""

import importlib

from bigkernel.bench.case import Case

OPS = ("attention", "adam", "augment", "train")


def cases_of(op: str, small: bool = False) -> list[Case]:
    """The cases of one table; ``small`` has the same ones at sizes for a test."""
    module = importlib.import_module(f"bigkernel.bench.{op}")
    cases: list[Case] = module.cases(small)
    return cases
