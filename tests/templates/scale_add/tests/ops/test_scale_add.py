"""Scaled addition against float64, on every instruction set; opcheck; bad input."""

import pytest
import torch
from bigkernel.ops.scale_add import scale_add
from fused_cases import assert_fused, normal


@pytest.mark.parametrize("size", [0, 1, 17, 40_000])
def test_scale_add_matches_torch(size, cpu_isa):
    inputs = [normal((size,), torch.float32, seed) for seed in (1, 2)]
    assert_fused(lambda x, y: scale_add(x, y, 0.3), lambda x, y: 0.3 * x + y, inputs)


def test_scale_add_opcheck():
    inputs = [normal((3, 5), torch.float32, seed).requires_grad_() for seed in (1, 2)]
    torch.library.opcheck(torch.ops.bigkernel.scale_add.default, (*inputs, 0.5))


def test_scale_add_rejects_bad_input():
    with pytest.raises(ValueError, match=r"y must be of x's shape \(2,\), got \(3,\)"):
        scale_add(torch.ones(2), torch.ones(3))
