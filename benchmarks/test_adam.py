"""The table of `bigkernel bench adam`: `pytest -m bench benchmarks/test_adam.py`."""

import pytest

TABLE = "adam"


@pytest.mark.bench
def test_adam(measure, case, implementation):
    measure(case, implementation)
