"""What rotary position embedding computes, in plain PyTorch: also the ``torch`` backend.

Of the first R dimensions, pairs (a, b) of elements are rotated::

    a' = a * cos_a - b * sin_a        b' = b * cos_b + a * sin_b

where a and b are elements i and i + R / 2 (LLaMA, GPT-NeoX), or 2 i and 2 i + 1 (interleaved:
GPT-J, Cohere), and cos and sin have an entry for each element. The others stay. Transposed, which
is the gradient::

    a' = a * cos_a + b * sin_b        b' = b * cos_b - a * sin_a

in float32 (float64 for float64 inputs), rounded once to the inputs' dtype.
"""

import torch
from torch import Tensor

from bigkernel.ops.attention.blocks import empty_like_layout


def rope_fwd(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """(q, k) rotated; an empty tensor for a k that is None."""
    out = [rotate(x, cos, sin, interleaved, transposed) for x in (q, k) if x is not None]
    return out[0], q.new_empty(0) if k is None else out[1]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    """x [B, H, S, D] rotated by cos and sin [B or 1, S, R], in memory as x."""
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    rotary = cos.shape[-1]
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    part = x[..., :rotary].to(wide)
    turn = _turn_neighbours if interleaved else _turn_halves
    turned = turn(part * sin, True) if transposed else turn(part, False) * sin
    out = part * cos + turned
    out = torch.cat([out.to(x.dtype), x[..., rotary:]], -1)
    if out.stride() != empty_like_layout(x, x.shape[-1]).stride():
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out


def _turn_halves(x: Tensor, back: bool) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([b, -a] if back else [-b, a], -1)


def _turn_neighbours(x: Tensor, back: bool) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([b, -a] if back else [-b, a], -1).flatten(-2)


def rope_inplace(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotate x where it lies."""
    x.copy_(rotate(x, cos, sin, interleaved, False))
