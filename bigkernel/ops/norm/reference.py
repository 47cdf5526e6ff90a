"""What RMS norm and layer norm compute, in plain PyTorch: also the ``torch`` backend.

For each row of D elements, with h = x + residual (rounded to the dtype of the sum, as a model that
adds first would have it)::

    n = (h - mean) / sqrt(mean((h - mean)^2) + eps)       mean: of the row; 0 for RMS norm
    y = n * (offset + weight) + bias

in float32 (float64 where an input is). With ``round_first`` n is rounded to the dtype of h before
it is multiplied, and y has the dtype that torch promotes h and weight to: LLaMA's norm. Without it
y alone is rounded, to the dtype of h: Gemma's, torch's.
"""

import torch
from torch import Tensor


def norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    round_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h or an empty tensor where that is x, [rstd, mean] or [rstd] of the rows)."""
    h = x if residual is None else x + residual
    wide = h.to(accumulate_dtype(h, weight))
    mean = wide.mean(-1, keepdim=True) if center else None
    centred = wide if mean is None else wide - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd
    dtype = h.dtype
    if round_first and weight is not None:
        y = y.to(h.dtype)
        dtype = torch.promote_types(dtype, weight.dtype)
    if weight is not None:
        y = y * (offset + weight.to(wide.dtype))
    if bias is not None:
        y = y + bias.to(wide.dtype)
    stats = torch.stack([s.squeeze(-1) for s in (rstd, mean) if s is not None])
    return y.to(dtype), x.new_empty(0) if residual is None else h, stats


def norm_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    offset: float,
    center: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of h, of weight, of bias), the last two float32 or wider, empty if not needed."""
    wide = h.to(stats.dtype)
    rstd = stats[0].unsqueeze(-1)
    normal = (wide - stats[1].unsqueeze(-1) if center else wide) * rstd
    dy = dy.to(stats.dtype)
    g = dy if weight is None else dy * (offset + weight.to(stats.dtype))
    dh = g - normal * (g * normal).mean(-1, keepdim=True)
    if center:
        dh = dh - g.mean(-1, keepdim=True)
    dh = dh * rstd
    if dsum is not None:
        dh = dh + dsum
    empty = stats.new_empty(0)
    rows = h.shape[-1]
    return (
        dh.to(h.dtype),
        (dy * normal).reshape(-1, rows).sum(0) if needs_dweight else empty,
        dy.reshape(-1, rows).sum(0) if needs_dbias else empty,
    )


def accumulate_dtype(h: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype that a row is normalised in."""
    double = torch.float64 in (h.dtype, None if weight is None else weight.dtype)
    return torch.float64 if double else torch.float32
