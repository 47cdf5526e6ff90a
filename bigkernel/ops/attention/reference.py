"""Attention in plain PyTorch: the definition of what is right, in any dtype.

For query i and key j of one head, with off = Sk - Sq when aligned bottom-right, else 0::

    s = scale * <q_i, k_j>
    s = softcap * tanh(s / softcap)              if softcap > 0
    s = s - slope * |i + off - j|                ALiBi (Press et al., 2022)
    s = s + mask[i, j]                           or -inf where a boolean mask is False
    s = -inf unless  j <= i + off                if causal
                and  i + off - left <= j <= i + off + right
    lse_i = log sum_j exp(s)
    P = exp(s - lse_i)
    out_i = sum_j P * keep / (1 - p) * v_j       keep: see `dropout_keep`

A row in which every key is masked has out 0 and lse -inf, and sends no gradient anywhere. One that
sees a score of +inf or NaN has out and lse NaN.

`attention_reference` writes this down with the whole score matrix and leaves the gradient to
autograd. What users get without native code works in blocks of rows: `blocks.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigkernel.random import philox4x32


class Rule(NamedTuple):
    """What turns <q, k> into a score, apart from tensors; the scalar arguments of the ops."""

    scale: float
    causal: bool = False
    bottom_right: bool = False
    window_left: int = -1  # -1: no limit
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0

    def offset(self, seqlen_q: int, seqlen_k: int) -> int:
        return seqlen_k - seqlen_q if self.bottom_right else 0

    def reach_right(self) -> int:
        """How far to the right of the diagonal a row sees; -1: without limit."""
        return 0 if self.causal else self.window_right


class Params(NamedTuple):
    """What the ops take besides q, k and v (and what backward is given), in the schema's order."""

    mask: Tensor | None  # [1 or B, 1 or Hq, 1 or Sq, 1 or Sk]; packed: of the longest, `mask_of`
    alibi_slopes: Tensor | None  # [Hq] or [B, Hq]
    seed: Tensor | None
    cu_seqlens_q: Tensor | None  # [B + 1]; None: a dense batch
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    rule: Rule

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> "Params":
        """From an op's arguments, where the numbers of the rule come last."""
        numbers = len(cls._fields) - 1
        return cls._make((*arguments[:numbers], Rule(*arguments[numbers:])))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those of the op."""
        return (*self[:-1], *self.rule)


TENSORS = list(Params.__annotations__.values()).count(Tensor | None)  # they come first


def mask_of(mask: Tensor, rows: int, keys: int) -> Tensor:
    """The part [1, 1 or Hq, 1 or rows, 1 or keys] of a packed batch's mask that a sequence has."""
    mask = mask if mask.shape[2] == 1 else mask[:, :, :rows]
    return mask if mask.shape[3] == 1 else mask[..., :keys]


def dropout_keep(
    seed: Tensor,
    batch: Tensor,
    heads: int,
    rows: tuple[int, int],
    cols: tuple[int, int],
    dropout_p: float,
) -> Tensor:
    """Which probabilities survive dropout: bool [len(batch), heads, rows, cols].

    Element (b, h, i, j) is word ``j % 4`` of Philox4x32-10 with the seed as key and
    (j // 4, i, h, b) as counter, and is kept if that word >= floor(p * 2^32). It depends on nothing
    else: not on block sizes, backend, or what else is in the batch. In packed batches b is the
    number of the sequence and i, j count within it.
    """
    device = seed.device
    first, last = cols[0] // 4, -(-cols[1] // 4)
    words = philox4x32(
        seed.reshape(()),
        torch.arange(first, last, device=device),
        torch.arange(*rows, device=device)[:, None],
        torch.arange(heads, device=device)[:, None, None],
        batch[:, None, None, None],
    )
    keep = torch.stack(words, -1) >= int(dropout_p * 2**32)
    return keep.flatten(-2)[..., cols[0] - 4 * first : cols[1] - 4 * first]


def allowed_keys(
    rows: tuple[int, int], cols: tuple[int, int], off: int, rule: Rule, device: torch.device
) -> Tensor | None:
    """Bool [rows, cols] of the keys that causality and window leave; None if all of them."""
    if not rule.causal and rule.window_left < 0 and rule.window_right < 0:
        return None
    diagonal = torch.arange(*rows, device=device)[:, None] + off
    j = torch.arange(*cols, device=device)
    allowed = torch.ones(rows[1] - rows[0], cols[1] - cols[0], dtype=torch.bool, device=device)
    if rule.causal:
        allowed &= j <= diagonal
    if rule.window_left >= 0:
        allowed &= j >= diagonal - rule.window_left
    if rule.window_right >= 0:
        allowed &= j <= diagonal + rule.window_right
    return allowed


def distances(rows: tuple[int, int], cols: tuple[int, int], off: int, like: Tensor) -> Tensor:
    """|i + off - j| as [rows, cols], in the dtype and on the device of ``like``."""
    i = torch.arange(*rows, device=like.device)[:, None] + off
    return (i - torch.arange(*cols, device=like.device)).abs().to(like.dtype)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    *,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seed: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse), computed and differentiable in q's dtype, with the score matrix in memory.

    Dense: q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv]; out [B, Hq, Sq, Dv], lse
    [B, Hq, Sq]. Packed (with cu_seqlens [B + 1]): q [Tq, Hq, D], k and v [Tk, Hkv, D or Dv]; mask
    as `Params` says; out [Tq, Hq, Dv], lse [Hq, Tq].
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        batch = torch.arange(q.shape[0], device=q.device)
        return _dense(q, k, v, rule, mask, alibi_slopes, seed, batch)
    outs, lses = [], []
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(bounds_q) - 1):
        one_q = q[bounds_q[b] : bounds_q[b + 1]].transpose(0, 1)[None]
        one_k, one_v = (x[bounds_k[b] : bounds_k[b + 1]].transpose(0, 1)[None] for x in (k, v))
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        batch = torch.tensor([b], dtype=torch.int64, device=q.device)
        own = None if mask is None else mask_of(mask, one_q.shape[2], one_k.shape[2])
        out, lse = _dense(one_q, one_k, one_v, rule, own, slopes, seed, batch)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    if not outs:
        return q.new_zeros(0, q.shape[1], v.shape[2]), q.new_zeros(q.shape[1], 0)
    return torch.cat(outs), torch.cat(lses, 1)


def reference_scores(
    q: Tensor,  # [B, Hq, Sq, D]
    k: Tensor,  # [B, Hkv, Sk, D]
    rule: Rule,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """The scores [B, Hq, Sq, Sk] before softmax, -inf where masked."""
    rows, cols = (0, q.shape[2]), (0, k.shape[2])
    off = rule.offset(q.shape[2], k.shape[2])
    scores = q @ _for_all_heads(k, q).transpose(-1, -2) * rule.scale
    if rule.softcap > 0:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(q.dtype)[..., None, None]  # [Hq, 1, 1] or [B, Hq, 1, 1]
        scores = scores - slopes * distances(rows, cols, off, scores)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.to(q.dtype)
    allowed = allowed_keys(rows, cols, off, rule, q.device)
    return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)


def _for_all_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [B, Hkv, Sk, D], repeated for every query head."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1) if x.shape[1] else x


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    batch: Tensor,  # [B], the number of each sequence, for dropout
) -> tuple[Tensor, Tensor]:
    scores = reference_scores(q, k, rule, mask, alibi_slopes)
    # The softmax of a row of -inf is NaN, in its gradient too: keep such rows out of it.
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    lse = lse.masked_fill((scores == torch.inf).any(-1, keepdim=True), torch.nan)
    lse = lse.masked_fill(dead, -torch.inf).squeeze(-1)
    weights = torch.softmax(scores, -1).masked_fill(dead, 0.0)
    if rule.dropout_p > 0:
        assert seed is not None
        keep = dropout_keep(
            seed, batch, q.shape[1], (0, q.shape[2]), (0, k.shape[2]), rule.dropout_p
        )
        weights = weights * keep
        if rule.dropout_p < 1:
            weights = weights / (1 - rule.dropout_p)
    return weights @ _for_all_heads(v, q), lse
