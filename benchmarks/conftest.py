"""The cases of `bigkernel bench` under pytest-benchmark: one test for each implementation.

pytest-benchmark times one implementation after the other, so its tables are for watching one of
them over time; ratios that hold are those of `bigkernel bench`, which interleaves.
"""

from collections.abc import Callable
from typing import Any

import pytest

from bigkernel.bench import OPS, Case, cases_of
from bigkernel.bench.case import OURS, native_backend, strict

ROUNDS, WARMUPS = 10, 2


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument `implementation` runs once per case and competitor."""
    if "implementation" in metafunc.fixturenames:
        cases = [case for op in OPS for case in cases_of(op)]
        rows = [(case, name) for case in cases for name in case.competitors]
        ids = [f"{case.table}: {case.name}-{name}" for case, name in rows]
        metafunc.parametrize(("case", "implementation"), rows, ids=ids)


@pytest.fixture
def measure(benchmark: Any) -> Callable[[Case, str], None]:
    """Times one implementation of a case; ours only on its native kernel and if it is right."""

    def run(case: Case, implementation: str) -> None:
        with strict():
            ready = case.build()
            if implementation in ready.skipped:
                pytest.skip(ready.skipped[implementation])
            if implementation == OURS:
                benchmark.extra_info["backend"] = native_backend(case, ready)
                benchmark.extra_info["compared"] = ready.check(ready.runs)
            benchmark.group = f"{case.table}: {case.name}"
            benchmark.pedantic(ready.runs[implementation], rounds=ROUNDS, warmup_rounds=WARMUPS)

    return run
