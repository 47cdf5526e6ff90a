"""The tables of `bigkernel bench`: `pytest -m bench benchmarks -k attention`, for example."""

import pytest


@pytest.mark.bench
def test_table(measure, case, implementation):
    measure(case, implementation)
