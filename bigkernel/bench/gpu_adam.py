"""Adam on a GPU, against torch and Apex."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigkernel.bench import adam
from bigkernel.bench.case import LIMIT, OURS, REFERENCE, Bar, on_torch, strict
from bigkernel.bench.gpu import Cases, Clock, Row, copy_of, installed, measure
from bigkernel.optim import AdamW


def cases(device: str, clock: Clock, small: bool = False) -> Cases:
    """GPT-2's parameters; the limit is a copy of as many bytes."""
    shapes = adam.gpt2(16, 1, 50, 10) if small else adam.gpt2()
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def params(dtype: torch.dtype) -> list[Any]:
        generator = torch.Generator(device).manual_seed(0)
        draw = partial(torch.randn, generator=generator, device=device, dtype=dtype)
        made = [torch.nn.Parameter(draw(shape)) for shape in shapes]
        for p in made:
            p.grad = draw(p.shape)
        return made

    def row(name: str, dtype: torch.dtype, width: int) -> Row:
        ours, skipped = AdamW(params(dtype), **options), dict[str, str]()
        runs: dict[str, Callable[[], object]] = {
            REFERENCE: on_torch(AdamW(params(dtype), **options).step),
            OURS: ours.step,
            adam.FUSED: torch.optim.AdamW(params(dtype), fused=True, **options).step,
            adam.FOREACH: torch.optim.AdamW(params(dtype), foreach=True, **options).step,
        }
        apex = installed("apex.optimizers", skipped, "Apex")
        if apex is not None:
            runs["Apex"] = apex.FusedAdam(params(dtype), adam_w_mode=True, **options).step
        work = width * sum(math.prod(shape) for shape in shapes)
        runs[LIMIT], moved = copy_of(work, device)
        with strict():
            bars = (Bar(1.0, adam.FUSED), Bar(0.8, LIMIT))
            # torch keeps moments in the parameters' dtype: in bf16 it moves less, and rounds more.
            return measure(name, runs, skipped, clock, ("B", work, moved), bars)

    for dtype, width in ((torch.float32, 28), (torch.bfloat16, 22)):  # bytes an element
        name = f"{'fp32' if dtype == torch.float32 else 'bf16, fp32 moments'}, GPT-2, 124M"
        yield name, partial(row, name, dtype, width)


def repeated(device: str) -> Callable[[], list[Tensor]]:
    """What has to give the same bits each time."""

    def stepped() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(5000, generator=generator).to(device, torch.bfloat16))
        optimizer = AdamW([p], max_grad_norm=1.0, stochastic_rounding=True)
        for _ in range(3):
            p.grad = torch.randn(5000, generator=generator).to(device, torch.bfloat16)
            optimizer.step()
        return [p.detach(), *optimizer.state[p].values()]

    return stepped
