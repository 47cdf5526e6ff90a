"""Attention's errors in float32 over many draws, whose mean does not hang on the luck of one.

`compare` (attention_cases.py) looks at the largest error of one draw, as the rule of the house has
it; here are those of thousands of rows.
"""

import attention_cases
import pytest
import torch
from attention_cases import Case, build, by_definition, device_of, run, to_dtype

import bigkernel
from bigkernel.ops.attention import blocks as attention_blocks

backend = attention_cases.backend

# Where a row sees few keys, many, all in one tile of the kernel, and more than that.
MANY = [
    Case(lengths=(5, 9), dim=24, causal="top_left", batch=200, dlse=True),
    Case(lengths=(40, 40), dim=24, causal="top_left", batch=24, dlse=True),
    Case(lengths=(33, 150), dim=24, batch=12, dlse=True),
    Case(lengths=(128, 128), dim=64, batch=4, dlse=True),
    Case(lengths=(20, 30), dim=16, batch=32, softcap=1.5, alibi="H", mask="float:1HQK"),
]


@pytest.mark.parametrize("case", MANY, ids=str)
def test_attention_errors_of_many_draws(backend, case):
    """Root mean squares over many draws, which do not hang on the luck of one, as maxima do: at
    most 1.3 times PyTorch's.

    The portable kernels round a product and then its sum, PyTorch's with AVX2 or more round once:
    twice the squares.
    """
    at_most = 1.3 * 2**0.5 if backend == "cpu-portable" else 1.3
    inputs = build(case)
    exact, same = (by_definition(case, to_dtype(inputs, d)) for d in (torch.float64, torch.float32))
    device = device_of(backend)
    actual = run(case, inputs.map(lambda x: x.to(device)))
    for name, expected in exact.items():
        finite = expected.isfinite()
        ours, torchs = (
            (x[name].cpu().double() - expected)[finite].square().mean().sqrt().item()
            for x in (actual, same)
        )
        assert ours <= at_most * torchs, (
            f"{name}: {ours:.3e} is {ours / torchs:.2f} times PyTorch's"
        )


@pytest.mark.parametrize("budget", [4, 4 * 32 * 4096], ids=["of few rows", "and one row more"])
def test_attention_torch_backend_of_the_last_row(budget, monkeypatch):
    """PyTorch's products of few rows are less exact than those of many, so no block has few."""
    monkeypatch.setitem(attention_blocks.SCORE_BUDGET, "cpu", budget)
    case = Case(lengths=(33, 4096), dim=64, heads=(4, 4), batch=1)
    inputs = build(case)
    exact, same = (by_definition(case, to_dtype(inputs, d)) for d in (torch.float64, torch.float32))
    with bigkernel.use_backend("torch"):
        actual = run(case, inputs)
    for name in ("out", "dq"):
        ours, torchs = (
            (x[name] - exact[name])[:, :, -1].square().mean().sqrt() for x in (actual, same)
        )
        assert 0 < ours <= 1.3 * torchs, (
            f"{name}: {ours:.3e} is {ours / torchs:.2f} times PyTorch's"
        )
