"""These tests compile CUDA or Triton kernels to PTX and run them on the CPU."""

import pytest

from bigkernel.testing import ptx


@pytest.fixture(scope="session", autouse=True)
def _nvcc():
    if ptx.nvcc() is None:
        pytest.skip("nvcc is not on the path")
