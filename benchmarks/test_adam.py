"""Adam against torch.optim.AdamW: `pytest -m bench benchmarks/test_adam.py`.

Cases: a transformer-like list of about 20M parameters and 1,000 tensors of 1,000, each with and
without clipping by the global norm. Groups of pytest-benchmark's table are the cases, rows the
implementations; all do the same work (the step, and where clipping is asked the norm before it).
"""

import pytest
import torch

import bigkernel
from bigkernel.optim import AdamW

pytestmark = pytest.mark.bench

LISTS = {
    "transformer-20M": [(8192, 512), *[(512, 2048), (2048, 512), (512, 512), (512,), (512,)] * 7],
    "1000x1000": [(1000,)] * 1000,
}
KINDS = ("bigkernel", "bigkernel-torch", "torch-fused", "torch-foreach")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [False, True], ids=["step", "clip+step"])
@pytest.mark.parametrize("shapes", LISTS)
def test_adam_step(benchmark, shapes, clip, kind):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in LISTS[shapes]]
    for p in params:
        p.grad = torch.randn_like(p)
    benchmark.group = f"{shapes} {'clip+step' if clip else 'step'}"
    if kind.startswith("bigkernel"):
        optimizer = AdamW(params, max_grad_norm=1.0 if clip else None)
        run = optimizer.step
    else:
        options = {"fused": True} if kind == "torch-fused" else {"foreach": True}
        optimizer = torch.optim.AdamW(params, **options)

        def run() -> None:
            if clip:
                torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
            optimizer.step()

    with bigkernel.use_backend("torch" if kind == "bigkernel-torch" else None):
        benchmark.pedantic(run, rounds=20, warmup_rounds=3)
