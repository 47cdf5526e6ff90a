"""What cross-entropy computes, in plain PyTorch: also the ``torch`` backend.

For a row of logits, with z = softcap * tanh(logits / softcap) or the logits themselves, label y,
class weights w, smoothing s, V classes and lse = log(sum(exp(z)))::

    loss = (1 - s) w_y (lse - z_y) + s / V * sum_c(w_c (lse - z_c)) + z_loss * lse^2

or, for soft labels q, with m_c = w_c ((1 - s) q_c + s / V)::

    loss = sum_c(m_c (lse - z_c)) + z_loss * lse^2

in float32 (float64 for float64 logits). A row whose label is ignore_index has loss 0 and no
gradient. lse is kept in two summands, the largest z and the rest, since rounding their sum would
cost the probabilities the digits that the first has before its point.
"""

import torch
from torch import Tensor


def cross_entropy_fwd(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [N], their sum, [peak, spread] of the rows)."""
    z = _capped(logits, softcap)
    if z.shape[0] == 0:
        return z.new_zeros(0), z.new_zeros(()), z.new_zeros(2, 0)
    peak = z.amax(-1)
    spread = (z - peak.unsqueeze(-1)).exp().sum(-1).log()
    distance = (peak.unsqueeze(-1) - z) + spread.unsqueeze(-1)  # lse - z
    if labels.dim() == 2:
        ignored = None
        losses = (_mass(labels, weight, smoothing, z.dtype) * distance).sum(-1)
    else:
        ignored = labels == ignore_index
        y = labels.masked_fill(ignored, 0).unsqueeze(1)
        losses = (1 - smoothing) * distance.gather(1, y).squeeze(1)
        if weight is not None:
            weight = weight.to(z.dtype)
            losses = losses * weight[y.squeeze(1)]
        if smoothing != 0:
            all_classes = distance if weight is None else distance * weight
            losses = losses + smoothing * all_classes.mean(-1)
    if z_loss != 0:
        losses = losses + z_loss * (peak + spread).square()
    if ignored is not None:
        losses = losses.masked_fill(ignored, 0.0)
    total = losses.sum(dtype=torch.float64).to(z.dtype)
    return losses, total, torch.stack([peak, spread])


def cross_entropy_bwd(
    scale: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """The gradient of logits, given that of each row's loss."""
    z = _capped(logits, softcap)
    classes = z.shape[-1]
    peak, spread = stats.unsqueeze(-1).unbind(0)
    p = ((z - peak) - spread).exp()
    if labels.dim() == 2:
        ignored = None
        m = _mass(labels, weight, smoothing, z.dtype)
        dz = p * (m.sum(-1, keepdim=True) + 2 * z_loss * (peak + spread)) - m
    else:
        ignored = (labels == ignore_index).unsqueeze(1)
        y = labels.unsqueeze(1).masked_fill(ignored, 0)
        weight = z.new_ones(classes) if weight is None else weight.to(z.dtype)
        hit, each = (1 - smoothing) * weight[y], smoothing / classes * weight
        dz = p * (hit + each.sum() + 2 * z_loss * (peak + spread)) - each
        dz = dz.scatter_add(1, y, -hit)
    dz = dz * scale.to(z.dtype).unsqueeze(1)
    if softcap != 0:
        dz = dz * (1 - (z / softcap).square())
    if ignored is not None:
        dz = dz.masked_fill(ignored, 0.0)
    return dz.to(logits.dtype)


def cross_entropy_bwd_inplace(
    scale: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """The gradient of the logits, written over them."""
    options = (ignore_index, smoothing, z_loss, softcap)
    logits.copy_(cross_entropy_bwd(scale, logits, labels, weight, stats, *options))


def _mass(soft: Tensor, weight: Tensor | None, smoothing: float, dtype: torch.dtype) -> Tensor:
    m = (1 - smoothing) * soft.to(dtype) + smoothing / soft.shape[-1]
    return m if weight is None else m * weight.to(dtype)


def _capped(logits: Tensor, softcap: float) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return z if softcap == 0 else softcap * torch.tanh(z / softcap)
