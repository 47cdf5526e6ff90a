"""The table of `bigkernel bench attention`: `pytest -m bench benchmarks/test_attention.py`."""

import pytest

TABLE = "attention"


@pytest.mark.bench
def test_attention(measure, case, implementation):
    measure(case, implementation)
