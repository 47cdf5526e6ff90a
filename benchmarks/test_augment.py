"""The table of `bigkernel bench augment`: `pytest -m bench benchmarks/test_augment.py`."""

import pytest

TABLE = "augment"


@pytest.mark.bench
def test_augment(measure, case, implementation):
    measure(case, implementation)
