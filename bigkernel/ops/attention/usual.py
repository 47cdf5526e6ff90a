"""Calls that need no words: what `checks.py` and `select` ask of them, in as few steps as it takes.

Nearly every call is of plain tensors that fit. `dense` and `packed` find that out in a few
microseconds, and hand out the op's arguments after q, k and v. Of a call that they are not sure of
they say None, whatever the reason: the public function then goes through its checks, each of which
has its sentence. What they say yes to, those checks pass with the same arguments.

Kept from call to call is what numbers alone decide; nothing of a tensor but its dtype and head dim.
"""

from functools import lru_cache
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from bigkernel import _library, backend, registry, tuning
from bigkernel.expect import Expect
from bigkernel.ops.attention import contest
from bigkernel.ops.attention.checks import MAX_NATIVE_HEAD_DIM, Align, Window, check_rule

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
# Values that do not change, and that are equal only where they mean the same (with their types).
_NUMBERS = frozenset((bool, int, float, str, NoneType))
_SIDES = frozenset((int, NoneType))
_EVERYWHERE = (None, None)
# What a look at something else raises, which is no tensor, has no shape, or is of another rank.
_NOT_USUAL = (AttributeError, RuntimeError, TypeError, ValueError)

Arguments = tuple[Any, ...]
# causal, align, window, softcap, dropout_p and scale, as the public functions take them.
Options = tuple[bool, Align, Window, float | None, float, float | None]


@lru_cache(maxsize=512, typed=True)
def _rule(
    dtype: torch.dtype,
    dim: int,
    causal: bool,
    align: Align,
    left: int | None,
    right: int | None,
    softcap: float | None,
    dropout_p: float,
    scale: float | None,
) -> Arguments:
    """`check_rule`'s; raises what it does, which is not kept."""
    expect = Expect("attention")
    return tuple(
        check_rule(expect, dim, dtype, causal, align, (left, right), softcap, dropout_p, scale)
    )


def _numbers(dtype: torch.dtype, dim: int, options: Options) -> Arguments | None:
    """The numbers of the rule, if they are plain ones and fit."""
    causal, align, window, softcap, dropout_p, scale = options
    left, right = _EVERYWHERE if window is None else window
    if not (
        type(causal) in _NUMBERS  # another may change, as a tensor does
        and type(align) in _NUMBERS
        and type(softcap) in _NUMBERS
        and type(dropout_p) in _NUMBERS
        and type(scale) in _NUMBERS
        and type(left) in _SIDES
        and type(right) in _SIDES
        and 0 <= dropout_p <= 1
    ):
        return None
    return _rule(dtype, dim, causal, align, left, right, softcap, dropout_p, scale)


def _is_dense(x: Tensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Of a call's dtype and device, its rows without gaps; a nested one raises RuntimeError."""
    return (
        type(x) in _PLAIN
        and x.dtype is dtype
        and x.device == device
        and x.stride(-1) == 1
        and not is_functorch_wrapped_tensor(x)
    )


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """All that is asked of q, k and v but how many dimensions of which size they have."""
    dtype, device = q.dtype, q.device
    # `_is_dense` of each, without the time of calling it.
    if not (
        dtype in registry.SHORT
        and type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(v) in _PLAIN
        and k.dtype is dtype
        and v.dtype is dtype
        and k.device == device
        and v.device == device
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and not is_functorch_wrapped_tensor(q)
        and not is_functorch_wrapped_tensor(k)
        and not is_functorch_wrapped_tensor(v)
    ):
        return False
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type) is dtype
    return True


def _mask_fits(mask: Tensor, q: Tensor, full: tuple[int, ...]) -> bool:
    """A mask of four dimensions, which autocast leaves alone."""
    return (
        type(mask) in _PLAIN
        and (
            mask.dtype is torch.bool
            or mask.dtype is q.dtype
            or (mask.dtype is torch.float32 and not torch._C._is_any_autocast_enabled())
        )
        and mask.device == q.device
        and mask.layout is torch.strided
        and not is_functorch_wrapped_tensor(mask)
        and len(mask.shape) == 4
        and all(size in (1, whole) for size, whole in zip(mask.shape, full, strict=True))
    )


def _drawn(q: Tensor, options: Options) -> Tensor | None:
    """The seed of a call that was not given one."""
    dropout_p = options[4]
    if dropout_p <= 0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: Options,
    grouped: bool = True,
) -> Arguments | None:
    """`Params.arguments` of a usual call of `attention` without alibi_slopes and seed.

    grouped: a head of k and v may belong to some heads of q, and not only to one or to all.
    """
    if not _library.is_usual():
        return None
    try:
        if not _fits(q, k, v):
            return None
        batch, heads, seqlen_q, dim = q.shape
        *lead_k, dim_k = k.shape
        *lead_v, dim_v = v.shape
        batch_k, kv_heads, seqlen_k = lead_k
        fits = (
            lead_k == lead_v
            and batch == batch_k
            and 0 < dim == dim_k <= MAX_NATIVE_HEAD_DIM
            and 0 < dim_v <= MAX_NATIVE_HEAD_DIM
            and kv_heads > 0
            and heads % kv_heads == 0
            and (grouped or kv_heads in (1, heads))
            and (mask is None or _mask_fits(mask, q, (batch, heads, seqlen_q, seqlen_k)))
        )
        if not fits:
            return None
        numbers = _numbers(q.dtype, dim, options)
    except _NOT_USUAL:
        return None
    if numbers is None:
        return None
    if not backend.is_forced() and tuning.contested(contest.NAME, q.device.type):
        return None
    seed = _drawn(q, options)
    return (mask, None, seed, None, None, seqlen_q, seqlen_k, *numbers)


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    options: Options,
) -> Arguments | None:
    """The same of `attention_varlen` without mask; the values of cu_seqlens are not looked at."""
    if not _library.is_usual():
        return None
    try:
        if not _fits(q, k, v):
            return None
        total_q, heads, dim = q.shape
        total_k, kv_heads, dim_k = k.shape
        total_v, heads_v, dim_v = v.shape
        max_seqlen_q = total_q if max_seqlen_q is None else max_seqlen_q
        max_seqlen_k = total_k if max_seqlen_k is None else max_seqlen_k
        fits = (
            (total_v, heads_v) == (total_k, kv_heads)
            and 0 < dim == dim_k <= MAX_NATIVE_HEAD_DIM
            and 0 < dim_v <= MAX_NATIVE_HEAD_DIM
            and kv_heads > 0
            and heads % kv_heads == 0
            and type(max_seqlen_q) is int
            and type(max_seqlen_k) is int
            and len(cu_seqlens_q.shape) == 1
            and cu_seqlens_q.shape == cu_seqlens_k.shape
            and cu_seqlens_q.shape[0] > 0
            and _is_dense(cu_seqlens_q, q.device, torch.int32)
            and (cu_seqlens_k is cu_seqlens_q or _is_dense(cu_seqlens_k, q.device, torch.int32))
        )
        if not fits:
            return None
        numbers = _numbers(q.dtype, dim, options)
    except _NOT_USUAL:
        return None
    if numbers is None:
        return None
    seed = _drawn(q, options)
    return (None, None, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *numbers)
