"""Rotary position embedding: schema, checks, fake, autograd, and the public functions.

What is computed is written down as a formula in ``reference.py``.
"""

from typing import Any

import torch
from torch import Tensor

from bigkernel import _library, registry
from bigkernel.backend import select
from bigkernel.expect import Expect, shape_of
from bigkernel.ops.attention.blocks import empty_like_layout
from bigkernel.ops.rope import contest, reference

_ROPE, _IN_PLACE = Expect("rope"), Expect("rope_")
# q [B, Hq, S, D] and k [B, Hkv, S, D], any strides; cos and sin [B or 1, S, R], R even, at most D.
# Results are in memory as `empty_like_layout` says; that of a k that is None is empty [0].
_SCHEMA_FWD = (
    "(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved, bool transposed) "
    "-> (Tensor q_out, Tensor k_out)"
)
_SCHEMA_INPLACE = "(Tensor(a!) x, Tensor cos, Tensor sin, bool interleaved) -> ()"


def _fake_fwd(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    k_out = q.new_empty(0) if k is None else empty_like_layout(k, k.shape[-1])
    return empty_like_layout(q, q.shape[-1]), k_out


def _fake_inplace(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    return None


def _autograd(ops: Any) -> tuple[Any, Any]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, k, cos, sin, ctx.interleaved, ctx.transposed = inputs
        ctx.save_for_backward(cos, sin)
        ctx.has_k = k is not None
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        dk = dk if ctx.has_k else None
        given = [d for d in (dq, dk) if d is not None]
        turned: list[Any] = [None, None]
        if given:
            turned = list(
                _library.run(
                    ops,
                    "rope_fwd",
                    given[0],
                    given[1] if len(given) > 1 else None,
                    cos,
                    sin,
                    ctx.interleaved,
                    not ctx.transposed,
                )
            )
        if dq is None:
            turned = [None, turned[0]]
        return turned[0], turned[1] if dk is not None else None, None, None, None, None

    return backward, setup_context


_OP = registry.register(
    registry.Op(
        noun="rope",
        title="rotary position embedding, forward, backward and in place",
        functions=(
            registry.Function("rope_fwd", _SCHEMA_FWD, reference.rope_fwd, _fake_fwd, _autograd),
            registry.Function("rope_", _SCHEMA_INPLACE, reference.rope_inplace, _fake_inplace),
        ),
        absent={"cuda": "only the CPU kernels are written so far"},
        in_models={"rope": registry.InModels(0, compiled=True)},
        contests=contest.contests(lambda *tensors: rope(*tensors)),
    )
)


class _InPlace(torch.autograd.Function):
    """One tensor at a time: autograd lets a function that changes a view have one result only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, ops: Any
    ) -> Tensor:
        ops.rope_(x, cos, sin, interleaved)
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.ops = interleaved, ops
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        dx, _ = _library.run(ctx.ops, "rope_fwd", grads[0], None, cos, sin, ctx.interleaved, True)
        return dx, None, None, None, None


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q: [B, Hq, S, D], float16, bfloat16, float32 or float64. Any strides with a contiguous last
            dimension are read in place; [B, S, Hq, D] transposed, for example.
        k: [B, Hkv, S, D], of q's dtype.
        cos: [B, S, R], [1, S, R] or [S, R], with an entry for each rotated element, as the models
            of transformers make it; R even and at most D (partial rotary: elements from R on stay
            as they are). Of q's dtype or float32. Gets no gradient.
        sin: of cos's shape and dtype.
        interleaved: pairs are elements 2 i and 2 i + 1 (GPT-J, Cohere) instead of i and i + R / 2
            (LLaMA, GPT-NeoX).

    Returns:
        q and k, rotated, in their dtype and memory layout. Computed in float32 (float64 for float64
        inputs) and rounded once, where transformers rounds both products and their sum. Kept for
        backward: cos and sin.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and how to fix it.
    """
    cos, sin = _check(_ROPE, q, k, cos, sin)
    ops = select("rope_fwd", q.device, _OP.why_not_native((q, cos)))
    q, k = _library.run(ops, "rope_fwd", q, k, cos, sin, interleaved, False)
    return q, k


def rope_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """`rope` in the memory of q and k, which it changes and returns.

    Where a gradient is needed, autograd's rules for changes in place hold: q and k are no leaves,
    and nobody else has kept them for backward. Of views (a projection's result, transposed) it
    then copies the gradients, so that `rope` is the faster one in training.

    Raises:
        ValueError, TypeError: as `rope`, and where q or k is expanded, or k is q.
        RuntimeError: autograd forbids the change.
    """
    cos, sin = _check(_IN_PLACE, q, k, cos, sin)
    for name, x in (("q", q), ("k", k)):
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            fix = "Make it contiguous first, or use rope"
            expected = "without expanded dimensions"
            raise _IN_PLACE.error(name, expected, "an expanded one", fix)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        q_out, k_out = rope(q, k, cos, sin, interleaved=interleaved)
        return q.copy_(q_out), k.copy_(k_out)
    if q.data_ptr() == k.data_ptr() and q.numel() > 0 and k.numel() > 0:
        raise _IN_PLACE.error("k", "in other memory than q", "the same")
    ops = select("rope_", q.device, _OP.why_not_native((q, cos)))
    return _in_place(q, cos, sin, interleaved, ops), _in_place(k, cos, sin, interleaved, ops)


def _in_place(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, ops: Any) -> Tensor:
    if x.shape[-1] > 1 and x.stride(-1) != 1:  # no kernel reads these in place
        return x.copy_(rope(x, x[:, :0], cos, sin, interleaved=interleaved)[0])
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _InPlace.apply(x, cos, sin, interleaved, ops)
        return out
    ops.rope_(x, cos, sin, interleaved)
    torch.autograd.graph.increment_version(x)  # so that who kept it for backward is told
    return x


def _check(expect: Expect, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin as [B or 1, S, R]."""
    expect.floating({"q": q, "k": k, "cos": cos, "sin": sin})
    expect.rank("q", q, 4, "[B, H, S, D]")
    b, _, s, d = q.shape
    if k.dim() != 4 or k.shape[0] != b or k.shape[2] != s or k.shape[3] != d:
        raise expect.error("k", f"[{b}, H, {s}, {d}], as q", tuple(k.shape))
    expect.like("k", k, "q", q)
    if cos.dim() == 2:
        cos = cos.unsqueeze(0)
    if sin.dim() == 2:
        sin = sin.unsqueeze(0)
    for name, x in (("cos", cos), ("sin", sin)):
        rotary = x.shape[-1] if x.dim() == 3 else 0
        if (
            x.dim() != 3
            or not (x.shape[0] == 1 or x.shape[0] == b)
            or x.shape[1] != s
            or not 0 < rotary <= d
            or rotary % 2 != 0
        ):
            expected = f"[{b} or 1, {s}, R] with R even and at most {d}"
            raise expect.error(name, expected, shape_of(x))
        if x.dtype not in (q.dtype, torch.float32):
            expected, fix = f"of q's dtype, {q.dtype}, or float32", "Convert it with .to(q.dtype)"
            raise expect.error(name, expected, x.dtype, fix, TypeError)
        if x.requires_grad and torch.is_grad_enabled():
            fix = "Detach it: angles are not learned here"
            raise expect.error(name, "without requires_grad", "a tensor that requires one", fix)
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        expected = f"of cos's shape and dtype, {tuple(cos.shape)}, {cos.dtype}"
        raise expect.error("sin", expected, f"{tuple(sin.shape)}, {sin.dtype}")
    return cos, sin
