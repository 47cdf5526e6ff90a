"""What models run in place of the norms, for ``tuning.py`` and the benchmark."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkernel import registry, tuning

EPS = 1e-6
WIDTH = 512
SMALLEST_LAYER = 1 << 19  # as `registry.InModels` has it


def llama(x: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm.forward of transformers, operation by operation."""
    dtype = x.dtype
    wide = x.to(torch.promote_types(dtype, torch.float32))
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + EPS)).to(dtype)


def torch_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's layer norm."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _draw(count: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Two streams, weight, bias."""
    shapes = ((count // WIDTH, WIDTH), (count // WIDTH, WIDTH), (WIDTH,), (WIDTH,))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def contests(rms_norm: tuning.Function, layer_norm: tuning.Function) -> dict[str, registry.Contest]:
    """Of both functions, by their names; of layer norms after an addition, as models have them."""

    def added(norm: tuning.Function, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        x, residual, weight, bias = tensors
        total = x + residual
        return norm(total, weight, bias), total

    return {
        "rms_norm": tuning.sized(
            "LlamaRMSNorm",
            lambda *given: _draw(*given)[1:3],
            lambda x, weight: rms_norm(x, weight, EPS),
            llama,
        ),
        "layer_norm": tuning.sized(
            "an addition and F.layer_norm",
            _draw,
            lambda x, residual, weight, bias: layer_norm(x, weight, bias, EPS, residual=residual),
            lambda *tensors: added(torch_layer, *tensors),
            SMALLEST_LAYER,
        ),
    }
