"""`scaled_dot_product_attention` with the signature and the semantics of torch's."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bigkernel.expect import Expect, shape_of
from bigkernel.ops.attention import usual
from bigkernel.ops.attention.checks import Align, autocast, check_plain
from bigkernel.ops.attention.op import attention, run_for_out
from bigkernel.ops.attention.tensors import is_causal_bias, understands_tensors

_EXPECT = Expect("scaled_dot_product_attention")


@understands_tensors
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: [..., Hq, L, E]; [N, L, E] and [L, E] work too. Leading dimensions, and heads unless
            enable_gqa, broadcast against those of key and value, without copies up to 4-D.
        key: [..., H, S, E].
        value: [..., H, S, Ev].
        attn_mask: broadcastable to [..., Hq, L, S]; boolean (True takes part) or floating (added).
            A floating one gets a gradient if it requires one. A `torch.nn.attention.bias` of the
            sizes L and S is taken for what it means.
        dropout_p: applied whenever it is positive, as torch does: pass 0 in evaluation. The seed
            comes from torch's default generator; which weights are dropped differs from torch.
        is_causal: query i sees keys 0 to i (top-left alignment). Not together with attn_mask.
        scale: factor of the scores; None: 1 / sqrt(E).
        enable_gqa: Hq may be a multiple of key's and value's number of heads.

    Returns:
        [..., Hq, L, Ev] in the query's dtype.

    A row in which every key is masked gives 0 (torch gave NaN or 0, depending on its version and
    on the backend it picked). Memory is linear in L and S. Nested tensors are not taken: pack the
    sequences and call `bigkernel.ops.attention_varlen`.

    Raises:
        RuntimeError: attn_mask and is_causal are both given (as in torch).
        ValueError, TypeError: an argument does not fit; the message says which and how to fix it.
    """
    if attn_mask is None or not is_causal:
        options: usual.Options = (is_causal, "top_left", None, None, dropout_p, scale)
        known = usual.dense(query, key, value, attn_mask, options, grouped=enable_gqa is True)
        if known is not None:
            return run_for_out(query, key, value, known)
    align: Align = "top_left"
    if is_causal_bias(type(attn_mask)):
        _EXPECT(not is_causal, "is_causal", "False with a causal attn_mask", True)
        align, is_causal, attn_mask = _causal(attn_mask, query, key), True, None
    check_plain(_EXPECT, query=query, key=key, value=value, attn_mask=attn_mask)
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise _EXPECT.error(name, "at least 2-dimensional", shape_of(x))
    if is_causal and attn_mask is not None:
        fix = "Put the causal part into the mask"
        raise _EXPECT.error("attn_mask", "None when is_causal=True", "both", fix, RuntimeError)
    rank = max(query.dim(), key.dim(), value.dim())
    q, k, v = (_lift(x, max(rank, 4)) for x in (query, key, value))
    q, k, v = _heads(q, k, v, enable_gqa)
    lead = _common_batch(q, k, v, (query, key, value))
    mask = attn_mask
    if mask is not None:
        full = (*lead, *q.shape[-3:-1], k.shape[-2])
        _EXPECT.broadcastable("attn_mask", mask, full[-rank:])
        mask = _lift(mask, max(rank, 4))
        mask = mask.flatten(0, -4) if mask.shape[:-3].numel() == 1 else _one_batch(mask, lead)
    q, k, v = (_one_batch(x, lead) for x in (q, k, v))
    width = v.shape[-1]
    # torch takes head dims of 0: a column of zeros leaves scores and sums what they are.
    if q.shape[-1] == k.shape[-1] == 0:
        q, k = (functional.pad(x, (0, 1)) for x in (q, k))
    if width == 0:
        v = functional.pad(v, (0, 1))
    out = attention(
        q, k, v, mask=mask, causal=is_causal, align=align, dropout_p=dropout_p, scale=scale
    )
    out = out.reshape((*lead, *out.shape[1:])[-rank:])
    return out if width else out[..., :0]


def _causal(bias: Any, query: Tensor, key: Tensor) -> Align:
    """Where the diagonal of a causal bias lies."""
    sizes, lengths = (bias.seq_len_q, bias.seq_len_kv), (query.shape[-2], key.shape[-2])
    _EXPECT(sizes == lengths, "a causal attn_mask", f"of the lengths {lengths}", sizes)
    return "top_left" if bias.variant.name == "UPPER_LEFT" else "bottom_right"


def _common_batch(q: Tensor, k: Tensor, v: Tensor, given: tuple[Tensor, ...]) -> torch.Size:
    """The leading dimensions [...] of q, k, v [..., H, S, D], broadcast."""
    shapes = [x.shape[:-3] for x in (q, k, v)]
    if shapes[0] == shapes[1] == shapes[2]:
        return shapes[0]  # broadcast_shapes takes as long as a small kernel
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        got = "{}, {} and {}".format(*(tuple(x.shape) for x in given))
        raise _EXPECT.error("batch dimensions", "the same or 1", got) from error


def _lift(x: Tensor, rank: int) -> Tensor:
    """x with dimensions of size 1 put in front; x itself if it has them.

    What torch.compile keeps for backward then still is x: so it can tell that a second derivative
    is asked for.
    """
    return x if x.dim() >= rank else x[(None,) * (rank - x.dim())]


def _one_batch(x: Tensor, lead: torch.Size) -> Tensor:
    """x [..., H, S, D] with its leading dimensions expanded and made one: [B, H, S, D]."""
    x = x if x.shape[:-3] == lead else x.expand(*lead, *x.shape[-3:])
    return x if len(lead) == 1 else x.reshape(lead.numel(), *x.shape[-3:])


def _heads(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with the head counts that `attention` takes."""
    hq, hk, hv = (x.shape[-3] for x in (q, k, v))
    if enable_gqa:
        for name, heads in (("key", hk), ("value", hv)):
            fits = hq % heads == 0 if heads else hq == 0
            _EXPECT(fits, "query's number of heads", f"a multiple of {name}'s, {heads}", hq)
        if hk != hv:
            k, v = k.repeat_interleave(hq // hk, -3), v.repeat_interleave(hq // hv, -3)
        return q, k, v
    if hk == hv and hk in (1, hq):
        return q, k, v  # one head of keys for all is multi-query attention: nothing to expand
    counts, heads = (hq, hk, hv), max(hq, hk, hv)
    if any(h not in (1, heads) for h in counts):
        what = "the numbers of heads of query, key and value"
        fix = "enable_gqa=True lets several query heads share one of key and value"
        raise _EXPECT.error(what, "the same or 1", counts, fix)
    q, k, v = (x.expand(*x.shape[:-3], heads, *x.shape[-2:]) for x in (q, k, v))
    return q, k, v
