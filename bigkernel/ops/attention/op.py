"""Attention, forward and backward: schema, checks, fake, autograd, and the public functions.

What is computed is written down as a formula in ``reference.py``. The algorithm
of every backend is that of FlashAttention (Dao et al., 2022 and 2023): no score matrix, memory
linear in the sequence lengths, and a backward pass that recomputes the probabilities from the
log-sum-exp of each row.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from bigkernel import registry
from bigkernel._library import call, call_below, call_usual, is_usual
from bigkernel.backend import select
from bigkernel.expect import Expect
from bigkernel.ops.attention import blocks, contest, usual
from bigkernel.ops.attention.blocks import empty_like_layout, empty_results
from bigkernel.ops.attention.checks import (
    MAX_NATIVE_HEAD_DIM,
    Align,
    Window,
    autocast,
    check_cu_seqlens,
    check_mask,
    check_plain,
    check_qkv,
    check_rule,
    check_tensors,
    offsets,
)
from bigkernel.ops.attention.reference import TENSORS, Params, Rule
from bigkernel.ops.attention.tensors import understands_tensors

_DENSE, _PACKED = Expect("attention"), Expect("attention_varlen")


class _Options(TypedDict, total=False):
    """What `attention` and `attention_varlen` have in common; meaning and defaults are there."""

    causal: bool
    align: Align
    window: Window
    softcap: float | None
    alibi_slopes: Tensor | None
    dropout_p: float
    seed: Tensor | int | None
    scale: float | None


# `Params`, in its order.
_OPTIONS = (
    "Tensor? mask, Tensor? alibi_slopes, Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, bool causal, bool bottom_right, "
    "SymInt window_left, SymInt window_right, float softcap, float dropout_p"
)
# Dense: q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv]; mask [1|B, 1|Hq, 1|Sq, 1|Sk], bool
# or floating; lse [B, Hq, Sq, 2]. Packed, that is with cu_seqlens [B + 1] int32: q [Tq, Hq, D], k
# and v [Tk, Hkv, D|Dv]; mask [1, 1|Hq, 1|max_seqlen_q, 1|max_seqlen_k], one for all sequences;
# lse [Hq, Tq, 2]. Both: alibi_slopes [Hq] or [B, Hq] float32; seed [1] int64, needed if
# dropout_p > 0; window -1: no limit; last dimensions contiguous. Results
# are laid out as `empty_like_layout` says: out and dq like q, dk like k, dv like v. lse is float32,
# float64 for float64 inputs, in two summands, since the probabilities that backward gets from it
# have its error: where a mask puts a whole row near -1e9, one number alone would be -1e9, and they
# too large by the number of keys. Which two is the backend's choice: the highest score of the row
# and the logarithm of the sum of the exponentials of the distances from it, or lse as it is rounded
# and what that left. dlse, the gradient of the sum, has no last dimension. dmask has the mask's
# shape and dtype, or is an empty [0] of q's dtype.
_SCHEMA_FWD = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)"
_SCHEMA_BWD = (
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool needs_dmask) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask)"
)


# Among forward's arguments: the mask, the only option that may need a gradient, and the first that
# is no tensor.
_MASK = 3
_NUMBERS = _MASK + TENSORS
_MAX = TENSORS  # among the options: max_seqlen_q, before max_seqlen_k
_NO_GRADIENTS = (None,) * (len(Params._fields) + len(Rule._fields) - 2)  # of the other options


def _fake_fwd(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return empty_results(q, v, Params.of(options))


def _fake_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *given, needs_dmask = options
    dq, dk, dv = (empty_like_layout(x, x.shape[-1]) for x in (q, k, v))
    mask = Params.of(given).mask
    if mask is None or not needs_dmask:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, mask.new_empty(mask.shape)


def _autograd(ops: Any) -> tuple[Any, Any]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:_NUMBERS], *output)
        ctx.numbers = inputs[_NUMBERS:]
        # So that a gradient of lse that nobody asked for is None, and not zeros to be added.
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, *tensors, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        if dlse is not None:
            dlse = dlse[..., 0]  # the public functions return the sum: both have one gradient
        needs_dmask = ctx.needs_input_grad[_MASK]
        dout = _contiguous_rows(dout)
        saved = (dout, dlse, q, k, v, out, lse, *tensors, *ctx.numbers, needs_dmask)
        dq, dk, dv, dmask = call(ops, "attention_bwd", *saved)
        return dq, dk, dv, dmask if needs_dmask else None, *_NO_GRADIENTS

    return backward, setup_context


def _head_dims(tensors: Sequence[Tensor]) -> str | None:
    """Why the native kernels cannot take q, k and v of these head dims, None if they can."""
    # Without `default`, which torch.compile cannot trace before torch 2.14.
    widest = max([0, *(x.shape[-1] for x in tensors[:3] if x.dim() > 0)])
    if widest > MAX_NATIVE_HEAD_DIM:
        return f"head dim {widest} is above the native kernels' {MAX_NATIVE_HEAD_DIM}"
    return None


_OP = registry.register(
    registry.Op(
        noun="attention",
        title="attention, forward and backward",
        functions=(
            registry.Function(
                "attention_fwd", _SCHEMA_FWD, blocks.attention_fwd, _fake_fwd, _autograd
            ),
            registry.Function(
                "attention_bwd",
                _SCHEMA_BWD,
                blocks.attention_bwd,
                _fake_bwd,
                registry.no_second_derivative(
                    "attention",
                    "attention_reference in bigkernel.ops.attention.reference has one, with the "
                    "score matrix in memory.",
                ),
            ),
        ),
        limits=f"head dims to {MAX_NATIVE_HEAD_DIM}",
        limit=_head_dims,
        contests={contest.NAME: contest.contest(lambda *qkv, **rest: attention(*qkv, **rest))},
    )
)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = ...,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
@understands_tensors
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    align: Align = "top_left",
    window: Window = (None, None),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + ...) v, without ever holding the score matrix.

    Args:
        q: [B, Hq, Sq, D], float16, bfloat16, float32 or float64 (as are k and v). Any strides with
            a contiguous last dimension are read in place; [B, Sq, Hq, D] transposed, for example.
        k: [B, Hkv, Sk, D]. Hq must be a multiple of Hkv: query head h reads key head
            h // (Hq / Hkv) (grouped-query attention; Hkv = 1 is multi-query attention).
        v: [B, Hkv, Sk, Dv].
        mask: broadcastable to [B, Hq, Sq, Sk]. Boolean: True takes part. Floating (q's dtype or
            float32): added to the scores; it gets a gradient if it requires one.
        causal: query i sees the keys up to its own position, i + off.
        align: "top_left" (off = 0, as torch's `is_causal`) or "bottom_right" (off = Sk - Sq, as
            FlashAttention): where the diagonal of causal, window and ALiBi lies.
        window: (left, right): query i sees keys i + off - left to i + off + right. None or -1: no
            limit on that side; None in place of the pair: on neither.
        softcap: if positive, scores become softcap * tanh(score / softcap), before ALiBi and mask;
            from 1e-30 to 1e30. 0 or None: off.
        alibi_slopes: [Hq] or [B, Hq], finite; ``slope * |i + off - j|`` is subtracted. Gets no
            gradient. On a GPU the values are not checked, which would wait for the device: the
            heads of a slope that is not finite give NaN.
        dropout_p: probability with which an attention weight is zeroed; the others are divided by
            1 - dropout_p. Which ones is a documented function of (seed, batch, head, row, column),
            the same on every backend: `bigkernel.ops.attention.reference.dropout_keep`.
        seed: for dropout: an int or an int64 tensor of one element. None draws one from torch's
            default generator.
        scale: factor of q k^T; None: 1 / sqrt(D).
        return_lse: also return lse [B, Hq, Sq], the natural logarithm of the sum of the
            exponentiated scores (before dropout), float32, or float64 for float64 inputs. It is
            differentiable.

    Returns:
        out [B, Hq, Sq, Dv] in q's dtype and memory layout, or (out, lse).

    A row in which every key is masked gives 0, lse -inf and no gradient. Inside torch.autocast
    the inputs are cast as torch's own attention casts them. Sums are kept in float32. float64 and
    head dims above 256 run in plain PyTorch (`bigkernel.backend` says so, once). Results are the
    same bits at each run. On a GPU the backward pass of grouped heads takes up to 256 MiB more
    where k has too few tiles to fill it: dk and dv in float32 for each of the blocks among which
    a group is split. There is no second derivative. A row that sees a score of +inf or NaN has
    out and lse NaN. Values are summed before they are divided by the sum of the weights, as in
    torch's fused kernels: to stay finite they must be below 2e37 / Sk.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and how to fix it.
    """
    if alibi_slopes is None and seed is None:
        options = (causal, align, window, softcap, dropout_p, scale)
        known = usual.dense(q, k, v, mask, options)
        if known is not None:
            if not return_lse:
                return run_for_out(q, k, v, known)
            out, lse = run_known(q, k, v, known)
            return out, lse.sum(-1)
    expect = _DENSE
    check_plain(expect, q=q, k=k, v=v, mask=mask, alibi_slopes=alibi_slopes)
    q, k, v, mask = autocast(q, k, v, mask)
    check_qkv(expect, q, k, v, 4, "a tensor [B, H, S, D]")
    batch = q.shape[0]
    if k.shape[0] != batch:
        fix = "Expand the one whose batch size is 1"
        raise expect.error("k and v", f"of q's batch size, {batch}", k.shape[0], fix)
    if mask is not None:
        mask = check_mask(expect, mask, q, (*q.shape[:3], k.shape[2]))
    slopes, seed = check_tensors(expect, q, alibi_slopes, batch, dropout_p, seed)
    options = (causal, align, window, softcap, dropout_p, scale)
    rule = check_rule(expect, q.shape[-1], q.dtype, *options)
    params = Params(mask, slopes, seed, None, None, q.shape[2], k.shape[2], rule)
    if not return_lse and contest.runs(q, k, v, params):
        q, k, v = map(_contiguous_rows, (q, k, v))
        return contest.run(q, k, v, params)
    out, lse = _run(q, k, v, params)
    return (out, lse.sum(-1)) if return_lse else out


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    mask: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    mask: Tensor | None = ...,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
@understands_tensors
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    align: Align = "top_left",
    window: Window = (None, None),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of sequences of different lengths, packed one after the other without padding.

    Sequence b holds queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` and the keys that
    cu_seqlens_k says; no sequence sees another. The result is that of one `attention` call for
    each sequence; dropout draws with b as the batch index.

    Args:
        q: [Tq, Hq, D]; k: [Tk, Hkv, D]; v: [Tk, Hkv, Dv]. Contiguous last dimension, any strides.
        cu_seqlens_q: int32 [B + 1] on q's device, or on the CPU: 0, then the running total of the
            lengths, up to Tq. Lengths of 0 are fine. On a GPU its values are not checked, which
            would wait for the device: wrong ones reach no other memory, but rows outside them are
            not defined. On the CPU they are, and it is copied to the device without a wait.
        cu_seqlens_k: the same for k and v, up to Tk.
        max_seqlen_q: an upper bound of the lengths, if you know one, for kernels that size their
            launch by it. None: the longest, where q is on a GPU and cu_seqlens on the CPU; else Tq.
        max_seqlen_k: the same for k and v.
        mask: broadcastable to [Hq, max_seqlen_q, max_seqlen_k], and the same for every sequence,
            whose first row and key it begins with: a bias that depends on their distance (T5), say.
            Otherwise as in `attention`.

    The other arguments are those of `attention`, sequence by sequence; alibi_slopes is [Hq] or
    [B, Hq].

    Returns:
        out [Tq, Hq, Dv], or (out, lse) with lse [Hq, Tq].

    Raises:
        ValueError, TypeError: as `attention`, and if cu_seqlens do not fit the packed tensors.
    """
    if mask is None and alibi_slopes is None and seed is None:
        options = (causal, align, window, softcap, dropout_p, scale)
        known = usual.packed(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options
        )
        if known is not None:
            try:
                if not return_lse:
                    return run_for_out(q, k, v, known)
                out, lse = run_known(q, k, v, known)
            except RuntimeError:  # the kernel has read cu_seqlens: if they are wrong, say which
                check_cu_seqlens(_PACKED, "cu_seqlens_q", cu_seqlens_q, q, known[_MAX])
                check_cu_seqlens(_PACKED, "cu_seqlens_k", cu_seqlens_k, k, known[_MAX + 1])
                raise
            return out, lse.sum(-1)
    expect = _PACKED
    check_plain(expect, q=q, k=k, v=v, mask=mask, alibi_slopes=alibi_slopes)
    check_plain(expect, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    q, k, v, mask = autocast(q, k, v, mask)
    check_qkv(expect, q, k, v, 3, "a tensor [T, H, D]")
    lengths = (max_seqlen_q, max_seqlen_k)
    if None in lengths and torch.jit.is_tracing():  # type: ignore[attr-defined]
        expected = "given in torch.jit.trace, which would keep those of the example"
        fix = "Pass upper bounds of all lengths to come"
        raise expect.error("max_seqlen_q and max_seqlen_k", expected, lengths, fix)
    tight = mask is None  # whose shape is that of what was given
    cu_q, longest_q = offsets(expect, "cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q, tight)
    cu_k, longest_k = offsets(expect, "cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k, tight)
    size, size_k = cu_seqlens_q.shape[0], cu_seqlens_k.shape[0]
    if size != size_k:
        fix = "Both have one more element than there are sequences"
        raise expect.error("cu_seqlens_k", f"as long as cu_seqlens_q, {size}", size_k, fix)
    if mask is not None:
        mask = check_mask(expect, mask, q, (1, q.shape[1], longest_q, longest_k))
    slopes, seed = check_tensors(expect, q, alibi_slopes, size - 1, dropout_p, seed)
    options = (causal, align, window, softcap, dropout_p, scale)
    rule = check_rule(expect, q.shape[-1], q.dtype, *options)
    params = Params(mask, slopes, seed, cu_q, cu_k, longest_q, longest_k, rule)
    out, lse = _run(q, k, v, params)
    return (out, lse.sum(-1)) if return_lse else out


def _run(q: Tensor, k: Tensor, v: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """Pick the backend and call its op."""
    ops = select("attention_fwd", q.device, _OP.why_not_native((q, k, v)))
    qkv = map(_contiguous_rows, (q, k, v))
    out: tuple[Tensor, Tensor] = call(ops, "attention_fwd", *qkv, *params.arguments)
    return out


def run_known(q: Tensor, k: Tensor, v: Tensor, known: usual.Arguments) -> tuple[Tensor, Tensor]:
    """`_run` of a usual call."""
    ops = select("attention_fwd", q.device)
    out: tuple[Tensor, Tensor] = call_usual(ops, "attention_fwd", q, k, v, *known)
    return out


def run_for_out(q: Tensor, k: Tensor, v: Tensor, known: usual.Arguments) -> Tensor:
    """`run_known` without lse."""
    ops = select("attention_fwd", q.device)
    if torch.is_grad_enabled():
        if known[0] is not None:
            return call_usual(ops, "attention_fwd", q, k, v, *known)[0]  # type: ignore[no-any-return]
        if q.requires_grad or k.requires_grad or v.requires_grad:
            return _apply_for_out(ops, q, k, v, known)  # type: ignore[no-any-return]
    return call_below(ops, "attention_fwd", q, k, v, *known)[0]  # type: ignore[no-any-return]


class _ForOut(torch.autograd.Function):
    """`_autograd` of a usual call without mask of which out alone is wanted.

    Each argument, result and gradient of an autograd.Function takes its time, None as well.
    """

    @staticmethod
    def forward(
        ctx: Any, ops: Any, q: Tensor, k: Tensor, v: Tensor, known: usual.Arguments
    ) -> Tensor:
        out, lse = call_below(ops, "attention_fwd", q, k, v, *known)
        ctx.save_for_backward(q, k, v, out, lse, *known[:TENSORS])
        ctx.ops, ctx.numbers = ops, known[TENSORS:]
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        dout = _contiguous_rows(dout)
        saved = (dout, None, q, k, v, out, lse, *tensors, *ctx.numbers, False)
        # A second derivative, and what follows the gradient, are for the operator to see.
        follows = torch.is_grad_enabled() or not is_usual()
        dq, dk, dv, _ = (call if follows else call_below)(ctx.ops, "attention_bwd", *saved)
        return None, dq, dk, dv, None


# Past what Function.apply asks about torch.func, of which `is_usual` knows.
_apply_for_out = super(torch.autograd.Function, _ForOut).apply


def _contiguous_rows(x: Tensor) -> Tensor:
    """x, copied only if its last dimension has gaps (or stride 0, as gradients of a sum have)."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
