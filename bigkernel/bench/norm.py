"""RMS norm and layer norm, alone and after the addition to the residual stream.

Peers: what transformers' LlamaRMSNorm runs, and torch's own functions; torch.compile is left to
the table of training steps.
"""

import itertools
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkernel.bench import fused
from bigkernel.bench.case import LIMIT, Bar, Case
from bigkernel.ops import layer_norm, rms_norm
from bigkernel.ops.norm.contest import EPS, llama, torch_layer

LLAMA, TORCH_RMS, TORCH_LAYER = "LlamaRMSNorm", "F.rms_norm", "F.layer_norm"
SIZES = ((2048, 384), (4096, 768), (2048, 4096))


def cases(small: bool = False) -> list[Case]:
    """The table; ``small`` has the same cases at sizes for a test."""
    sizes = [(12, d // 16) for _, d in SIZES] if small else SIZES
    table = []
    for (rows, dim), dtype, backward, residual in itertools.product(
        sizes, (torch.float32, torch.bfloat16), (False, True), (False, True)
    ):
        after = " after addition" if residual else ""
        words = f"{fused.NAMES[dtype]} {rows} x {dim}{after}"
        make = partial(_make, rows, dim, dtype, residual)
        add = partial(_after_addition, residual)
        table.append(
            fused.case(
                "norm",
                f"RMS norm {words}",
                partial(_rms, residual),
                {LLAMA: add(llama), TORCH_RMS: add(torch_rms)},
                partial(make, 1),
                backward,
                saved=1,
                bars=[Bar(1.0, LLAMA), Bar(1.0, TORCH_RMS), Bar(0.7, LIMIT)],
            )
        )
        table.append(
            fused.case(
                "norm",
                f"layer norm {words}",
                partial(_layer, residual),
                {TORCH_LAYER: add(torch_layer)},
                partial(make, 2),
                backward,
                saved=1,
                bars=[Bar(1.0, TORCH_LAYER), Bar(0.7, LIMIT)],
            )
        )
    return table


def _make(
    rows: int,
    dim: int,
    dtype: torch.dtype,
    residual: bool,
    vectors: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """x, residual if there is one, weight, bias if there is one."""
    streams = [fused.draw(generator, rows, dim, dtype=dtype) for _ in range(2 if residual else 1)]
    return [*streams, *(fused.draw(generator, dim, dtype=dtype) for _ in range(vectors))]


def torch_rms(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's RMS norm."""
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def _after_addition(residual: bool, norm: fused.Function) -> fused.Function:
    def both(x: Tensor, stream: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        total = x + stream
        y = norm(total, *vectors)
        assert isinstance(y, Tensor)
        return y, total

    return both if residual else norm


def _rms(residual: bool, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
    if residual:
        x, stream, weight = tensors
        return rms_norm(x, weight, EPS, residual=stream)
    return rms_norm(tensors[0], tensors[1], EPS)


def _layer(residual: bool, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
    if residual:
        x, stream, weight, bias = tensors
        return layer_norm(x, weight, bias, EPS, residual=stream)
    x, weight, bias = tensors
    return layer_norm(x, weight, bias, EPS)
