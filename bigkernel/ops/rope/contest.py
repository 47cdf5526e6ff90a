"""What models run in place of the rotation, for ``tuning.py`` and the benchmark."""

import torch
from torch import Tensor

from bigkernel import registry, tuning

_HEADS, _DIM = 8, 64


def tables(length: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [1, S, D]."""
    inverse = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(length)[None, :, None] * inverse
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def llama(cos: Tensor, sin: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """What models.llama of transformers runs, in q's dtype."""
    cos, sin = (t.to(q.dtype).unsqueeze(1) for t in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def _draw(count: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    shape = (1, count // (_HEADS * _DIM), _HEADS, _DIM)
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(2)]


def contests(rope: tuning.Function) -> dict[str, registry.Contest]:
    """Of halves, as LLaMA has them."""
    kept: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def angles(q: Tensor) -> tuple[Tensor, Tensor]:
        key = q.shape[2], q.dtype, q.device
        if key not in kept:
            kept.clear()  # one problem at a time
            cos, sin = tables(q.shape[2], _DIM, q.dtype)
            kept[key] = cos.to(q.device), sin.to(q.device)
        return kept[key]

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q, k, *angles(q))

    def theirs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return llama(*angles(q), q, k)

    return {"rope": tuning.sized("apply_rotary_pos_emb", _draw, ours, theirs)}
