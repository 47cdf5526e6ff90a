"""The `torch` backend of attention: forward and backward in blocks of query rows.

Computes what `attention.py` defines, in float32 (float64 for float64 inputs), and never holds more
scores than a fixed budget: memory is linear in sequence length. A block sees only the keys that
causality and window leave to it. Rows are whole within a block, so softmax needs no running
maximum; the backward pass recomputes P from lse, as FlashAttention does (Dao et al., 2022).

Query heads of one key head are folded into the row dimension, [B, Hkv, G * rows, D], so that GQA
repeats no key. Every sum runs in one fixed order: results are the same at each run.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigkernel.expect import Expect
from bigkernel.ops.attention.reference import (
    Params,
    Rule,
    allowed_keys,
    distances,
    dropout_keep,
    mask_of,
)

# Scores held at once. On the CPU a block should stay in cache; a GPU wants fewer, larger launches.
SCORE_BUDGET = {"cpu": 1 << 21}
DEFAULT_SCORE_BUDGET = 1 << 25
# PyTorch's products of fewer rows may add up one by one what those of more rows add up in parts,
# which is more exact.
FEWEST_ROWS = 16
_EXPECT = Expect("attention_varlen")


def empty_like_layout(like: Tensor, last: int) -> Tensor:
    """The memory of a result that belongs to ``like``, with ``last`` as its last dimension.

    Dense [B, H, S, D]: stored as [B, S, H, D] if ``like``'s heads lie closer together than its
    rows, else as [B, H, S, D]; either way without gaps. Packed [T, H, D]: contiguous.
    """
    if like.dim() == 4 and like.stride(1) < like.stride(2):
        b, h, s, _ = like.shape
        return like.new_empty(b, s, h, last).transpose(1, 2)
    return like.new_empty(*like.shape[:-1], last)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of lse."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_results(q: Tensor, v: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """(out, lse) of forward, to be filled."""
    packed = params.cu_seqlens_q is not None
    lse_shape = (q.shape[1], q.shape[0], 2) if packed else (*q.shape[:3], 2)
    lse = q.new_empty(lse_shape, dtype=accumulate_dtype(q.dtype))
    return empty_like_layout(q, v.shape[-1]), lse


class Block(NamedTuple):
    """A tile of the scores: from and to which row, from and to which column."""

    rows: tuple[int, int]
    cols: tuple[int, int]


def _reach(seqlen_q: int, seqlen_k: int, rule: Rule) -> tuple[int, int]:
    """(rows worth taking at once, keys that so many rows see)."""
    right = rule.reach_right()
    if rule.window_left < 0 or right < 0:
        return seqlen_q, seqlen_k
    # A narrow window: about as many rows as one row has keys, so that little is computed in vain,
    # but enough of them to be worth a launch.
    height = max(rule.window_left + right + 1, 128)
    return min(seqlen_q, height), min(seqlen_k, 2 * height)


def row_blocks(
    batch_heads: int, seqlen_q: int, seqlen_k: int, rule: Rule, budget: int
) -> Iterator[Block]:
    """Cut the rows evenly: a block holds at most ``budget`` scores, or ``FEWEST_ROWS`` rows.

    Blocks whose rows see no key at all are left out.
    """
    off, right = rule.offset(seqlen_q, seqlen_k), rule.reach_right()
    height, width = _reach(seqlen_q, seqlen_k, rule)
    height = max(FEWEST_ROWS, min(height, budget // max(1, batch_heads * width)))
    count = -(-seqlen_q // height)
    for start, stop in pairwise(seqlen_q * i // count for i in range(count + 1)):
        lo = max(0, start + off - rule.window_left) if rule.window_left >= 0 else 0
        hi = min(seqlen_k, stop + off + right) if right >= 0 else seqlen_k
        if lo < hi:
            yield Block((start, stop), (lo, hi))


def _budget(device: torch.device) -> int:
    return SCORE_BUDGET.get(device.type, DEFAULT_SCORE_BUDGET)


def _fold(x: Tensor, rows: tuple[int, int], kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Rows of x [B, Hq, Sq, D] as [B, Hkv, G * rows, D]."""
    part = x[:, :, rows[0] : rows[1]].to(dtype)
    b, h, r, d = part.shape
    return part.reshape(b, kv_heads, (h // kv_heads) * r, d)


def _part(mask: Tensor, block: Block) -> Tensor:
    """The view of a broadcastable [.., .., 1 or Sq, 1 or Sk] tensor that belongs to a block."""
    if mask.shape[2] != 1:
        mask = mask[:, :, block.rows[0] : block.rows[1]]
    if mask.shape[3] != 1:
        mask = mask[..., block.cols[0] : block.cols[1]]
    return mask


def _scores(
    q: Tensor,  # [B, Hkv, G * rows, D]
    k: Tensor,  # [B, Hkv, Sk, D]
    block: Block,
    off: int,
    params: Params,
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, Hq, rows, cols] of a block, and tanh(s / softcap) for the backward pass."""
    rule = params.rule
    b, kv_heads, _, _ = k.shape
    r, c = block.rows[1] - block.rows[0], block.cols[1] - block.cols[0]
    s = q @ k[:, :, block.cols[0] : block.cols[1]].transpose(-1, -2)
    s = s.view(b, kv_heads * (q.shape[2] // r), r, c).mul_(rule.scale)
    tanh = None
    if rule.softcap > 0:
        tanh = s.div_(rule.softcap).tanh_()
        s = tanh * rule.softcap
    if params.alibi_slopes is not None:
        slopes = params.alibi_slopes.to(s.dtype)[..., None, None]
        s = s.sub_(slopes * distances(block.rows, block.cols, off, s))
    if params.mask is not None:
        part = _part(params.mask, block)
        s = s.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else s.add_(part)
    allowed = allowed_keys(block.rows, block.cols, off, rule, s.device)
    if allowed is not None:
        s = s.masked_fill_(~allowed, -torch.inf)
    return s, tanh


def _drop(x: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    """x where kept, scaled so that its expectation stays."""
    if keep is None:
        return x
    return x * keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)


def _keep(params: Params, batch: Tensor, heads: int, block: Block) -> Tensor | None:
    dropout_p = params.rule.dropout_p
    if dropout_p <= 0:
        return None
    assert params.seed is not None
    return dropout_keep(params.seed, batch, heads, block.rows, block.cols, dropout_p)


def dense_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: Params,
    numbers: Tensor,  # [B], of the sequences, for dropout
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill out [B, Hq, Sq, Dv] and lse [B, Hq, Sq, 2]."""
    out.zero_()
    lse[..., 0] = -torch.inf
    lse[..., 1] = 0.0
    batch, heads, seqlen_q, _ = q.shape
    kv_heads, seqlen_k = k.shape[1], k.shape[2]
    if out.numel() == 0 or seqlen_k == 0:
        return
    rule, dtype = params.rule, lse.dtype
    off = rule.offset(seqlen_q, seqlen_k)
    k, v = (x.to(dtype).contiguous() for x in (k, v))
    for block in row_blocks(batch * heads, seqlen_q, seqlen_k, rule, _budget(q.device)):
        rows, cols = block
        s, _ = _scores(_fold(q, rows, kv_heads, dtype), k, block, off, params)
        top = s.amax(-1, keepdim=True)
        p = s.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_()
        total = p.sum(-1, keepdim=True)
        total.masked_fill_(total == 0, 1.0)
        lse[:, :, rows[0] : rows[1]] = torch.cat((top, total.log()), -1)
        p = _drop(p, _keep(params, numbers, heads, block), rule.dropout_p)
        part = p.view(batch, kv_heads, -1, p.shape[-1]) @ v[:, :, cols[0] : cols[1]]
        part = part.view(batch, heads, -1, v.shape[-1])
        out[:, :, rows[0] : rows[1]] = part / total


def dense_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    params: Params,
    numbers: Tensor,  # as forward's
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dmask: Tensor | None,  # mask's shape, in the accumulation dtype
) -> None:
    """Fill dq, dk, dv (of q's, k's, v's shapes), add to dmask."""
    batch, heads, seqlen_q, _ = q.shape
    kv_heads, seqlen_k = k.shape[1], k.shape[2]
    for grad in (dq, dk, dv):
        grad.zero_()
    if q.numel() == 0 or k.numel() == 0:
        return
    rule, dtype = params.rule, lse.dtype
    off = rule.offset(seqlen_q, seqlen_k)
    k, v = (x.to(dtype).contiguous() for x in (k, v))
    dk_sum, dv_sum = torch.zeros_like(k), torch.zeros_like(v)
    for block in row_blocks(batch * heads, seqlen_q, seqlen_k, rule, _budget(q.device)):
        rows, cols = block
        part_q = _fold(q, rows, kv_heads, dtype)
        part_dout = _fold(dout, rows, kv_heads, dtype)
        part_k, part_v = (x[:, :, cols[0] : cols[1]] for x in (k, v))
        s, tanh = _scores(part_q, k, block, off, params)
        top, log_total = lse[:, :, rows[0] : rows[1]].split(1, -1)
        p = s.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_().mul_(log_total.neg().exp_())
        # A key that a row does not see has no part in it, also where the others make it NaN.
        seen = allowed_keys(rows, cols, off, rule, q.device)
        p = p if seen is None else p.masked_fill_(~seen, 0.0)
        keep = _keep(params, numbers, heads, block)
        dropped = _drop(p, keep, rule.dropout_p).view(batch, kv_heads, -1, p.shape[-1])
        dv_sum[:, :, cols[0] : cols[1]] += dropped.transpose(-1, -2) @ part_dout
        dp = (part_dout @ part_v.transpose(-1, -2)).view_as(p)
        dp = _drop(dp, keep, rule.dropout_p)
        # <dout, out> of each row, from numbers that were not rounded to the output's dtype.
        delta = (p * dp).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= dlse[:, :, rows[0] : rows[1], None].to(dtype)
        ds = dp.sub_(delta).mul_(p)
        ds = ds if seen is None else ds.masked_fill_(~seen, 0.0)
        if dmask is not None:
            part_mask = _part(dmask, block)
            part_mask += ds.sum_to_size(part_mask.shape)
        if tanh is not None:
            ds = ds.mul_(1 - tanh * tanh)
        ds = ds.mul_(rule.scale).view(batch, kv_heads, -1, ds.shape[-1])
        dq[:, :, rows[0] : rows[1]] = (ds @ part_k).view(batch, heads, rows[1] - rows[0], -1)
        dk_sum[:, :, cols[0] : cols[1]] += ds.transpose(-1, -2) @ part_q
    dk.copy_(dk_sum)
    dv.copy_(dv_sum)


def sequence_cuts(name: str, cu_seqlens: Tensor, total: int, longest: int) -> list[slice]:
    """Where each sequence lies, after checking that they cut ``total`` tokens into pieces."""
    bounds: list[int] = cu_seqlens.tolist()
    cuts = [slice(a, b) for a, b in pairwise(bounds)]
    lengths = [cut.stop - cut.start for cut in cuts]
    fits = bounds[0] == 0 and bounds[-1] == total and min(lengths, default=0) >= 0
    if not fits:
        expected = f"non-decreasing from 0 to the number of packed tokens, {total}"
        got = bounds if len(bounds) <= 16 else f"[{', '.join(map(str, bounds[:16]))}, ...]"
        fix = "It holds the running total of the sequence lengths, after a 0"
        raise _EXPECT.error(name, expected, got, fix)
    most = max(lengths, default=0)
    if most > longest:
        expected, fix = (
            f"at least the longest sequence, {most}",
            "Leave it out, or pass the real maximum",
        )
        raise _EXPECT.error(f"max_seqlen_{name[-1]}", expected, longest, fix)
    return cuts


class Piece(NamedTuple):
    """Some batch entries of a dense call, or one sequence of a packed one, seen as dense."""

    params: Params
    numbers: Tensor  # [B], of the sequences
    packed: bool
    queries: slice
    keys: slice

    def of_queries(self, x: Tensor) -> Tensor:
        return self._view(x, self.queries)

    def of_keys(self, x: Tensor) -> Tensor:
        return self._view(x, self.keys)

    def of_lse(self, x: Tensor) -> Tensor:
        return x[None, :, self.queries] if self.packed else x[self.queries]

    def of_mask(self, x: Tensor) -> Tensor:
        if self.packed:
            queries, keys = self.queries, self.keys
            return mask_of(x, queries.stop - queries.start, keys.stop - keys.start)
        return x if x.shape[0] == 1 else x[self.queries]

    def _view(self, x: Tensor, part: slice) -> Tensor:
        return x[part].transpose(0, 1)[None] if self.packed else x[part]


def _pieces(q: Tensor, k: Tensor, params: Params) -> Iterator[Piece]:
    mask, slopes = params.mask, params.alibi_slopes
    cu_q, cu_k = params.cu_seqlens_q, params.cu_seqlens_k

    def piece(first: int, last: int, queries: slice, keys: slice) -> Piece:
        own = params._replace(
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[first:last],
        )
        numbers = torch.arange(first, last, device=q.device)
        made = Piece(own, numbers, cu_q is not None, queries, keys)
        if mask is None:
            return made
        return made._replace(params=own._replace(mask=made.of_mask(mask)))

    if cu_q is not None and cu_k is not None:
        cuts_q = sequence_cuts("cu_seqlens_q", cu_q, q.shape[0], params.max_seqlen_q)
        cuts_k = sequence_cuts("cu_seqlens_k", cu_k, k.shape[0], params.max_seqlen_k)
        for b, (queries, keys) in enumerate(zip(cuts_q, cuts_k, strict=True)):
            yield piece(b, b + 1, queries, keys)
        return
    # So many batch entries at once that the budget still leaves room for 64 rows of each.
    height, width = _reach(q.shape[2], k.shape[2], params.rule)
    entry = q.shape[1] * width * min(height, 64)
    step = max(1, _budget(q.device) // max(1, entry))
    for first in range(0, q.shape[0], step):
        last = min(first + step, q.shape[0])
        yield piece(first, last, slice(first, last), slice(first, last))


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The op `attention_fwd`; ``options`` are those of `Params`."""
    params = Params.of(options)
    out, lse = empty_results(q, v, params)
    # Autocast would lower the float32 products inside.
    with torch.autocast(q.device.type, enabled=False):
        for piece in _pieces(q, k, params):
            dense_fwd(
                piece.of_queries(q),
                piece.of_keys(k),
                piece.of_keys(v),
                piece.params,
                piece.numbers,
                piece.of_queries(out),
                piece.of_lse(lse),
            )
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `attention_bwd`; ``options`` are those of `Params`, and needs_dmask."""
    *given, needs_dmask = options
    params = Params.of(given)
    dq, dk, dv = (empty_like_layout(x, x.shape[-1]) for x in (q, k, v))
    mask, dmask = params.mask, None
    if needs_dmask:
        assert mask is not None
        dmask = mask.new_zeros(mask.shape, dtype=lse.dtype)
    with torch.autocast(q.device.type, enabled=False):
        for piece in _pieces(q, k, params):
            dense_bwd(
                piece.of_queries(dout),
                piece.of_lse(dlse) if dlse is not None else None,
                piece.of_queries(q),
                piece.of_keys(k),
                piece.of_keys(v),
                piece.of_lse(lse),
                piece.params,
                piece.numbers,
                piece.of_queries(dq),
                piece.of_keys(dk),
                piece.of_keys(dv),
                piece.of_mask(dmask) if dmask is not None else None,
            )
    if mask is None or dmask is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, dmask.to(mask.dtype)
