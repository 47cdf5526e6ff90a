"""The Newton-Schulz iteration of Muon, of all matrices of a model's layers at once.

The peer is the function of torch.optim.Muon, which takes one matrix after the other in bfloat16;
our PyTorch backend multiplies those of one shape in batches. The work is that of the products with
each symmetric one counted as the half that has to be computed.
"""

import itertools
from functools import partial

import torch
from torch import Tensor

from bigkernel.backend import use_backend
from bigkernel.bench import limits
from bigkernel.bench.case import LIMIT, OURS, REFERENCE, Bar, Case, Ready
from bigkernel.measure import Run
from bigkernel.ops.newton_schulz.op import COEFFICIENTS, orthogonalize
from bigkernel.ops.newton_schulz.reference import iterate
from bigkernel.testing import assert_as_accurate

TORCH = "torch.optim.Muon's"
STEPS, EPS = 5, 1e-7
# Layers, width, width of the MLP: the demo's model, the LLaMA of the table of training, two layers
# of a model of 100M parameters.
MODELS = ((4, 128, 344), (6, 384, 1024), (2, 768, 2048))
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def cases(small: bool = False) -> list[Case]:
    """The table; ``small`` has the same cases at sizes for a test."""
    table = []
    for (layers, width, inner), dtype in itertools.product(MODELS, NAMES):
        sizes = (1, width // 8, inner // 8) if small else (layers, width, inner)
        narrow = dtype == torch.bfloat16
        table.append(
            Case(
                "newton_schulz",
                f"{NAMES[dtype]} {layers} layers of {width} and {inner}",
                (OURS, REFERENCE, *([TORCH] if narrow else [])),
                partial(_build, sizes, dtype),
                (Bar(1.2, REFERENCE), *([Bar(1.2, TORCH)] if narrow else []), Bar(0.7, LIMIT)),
            )
        )
    return table


def _build(sizes: tuple[int, int, int], dtype: torch.dtype) -> Ready:
    layers, width, inner = sizes
    shapes = [*[(width, width)] * 4, *[(inner, width)] * 2, (width, inner)] * layers
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(shape, generator=generator) for shape in shapes]

    def ours() -> list[Tensor]:
        return orthogonalize(xs, COEFFICIENTS, STEPS, EPS, dtype)

    def batches() -> list[Tensor]:
        with use_backend("torch"):
            return ours()

    runs: dict[str, Run] = {OURS: ours, REFERENCE: batches}
    if dtype == torch.bfloat16:
        runs[TORCH] = partial(_one_by_one, xs)

    def check(runs: dict[str, Run]) -> str:
        mine, theirs = ours(), batches()
        for x, a, b in zip(xs, mine, theirs, strict=True):
            wide = x.to(dtype).double().unsqueeze(0)
            assert_as_accurate(a, iterate(wide, *COEFFICIENTS, STEPS, EPS)[0], b)
        return "at most twice the error of torch's, from float64"

    work = float(sum(map(_work, shapes)))
    limit, limit_work, name = limits.matrix_product(dtype)
    return Ready(runs, check, "newton_schulz", xs, limit, work, limit_work, name)


def _work(shape: tuple[int, int]) -> int:
    n, m = sorted(shape)
    return STEPS * (n * n * m + n**3 + 2 * n * n * m)


def _one_by_one(xs: list[Tensor]) -> list[Tensor]:
    from torch.optim import _muon

    return [_muon._zeropower_via_newtonschulz(x, COEFFICIENTS, STEPS, EPS) for x in xs]
