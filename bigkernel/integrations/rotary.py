"""Rotary position embedding: what a model's own function computes, and the op in its place.

The models of transformers call a function of their module, ``apply_rotary_pos_emb(q, k, cos,
sin)``. It is tried on random numbers: pairs of halves or of neighbours, all of a head or its first
dimensions. What agrees with neither stays.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigkernel.integrations import native
from bigkernel.ops.rope import reference, rope

# The name that a layer's forward looks up.
FUNCTION = "apply_rotary_pos_emb"


class Form(NamedTuple):
    """How a function rotates.

    interleaved: neighbours, not halves. partial: whether cos may be narrower than a head.
    keeps_dtype: whether results have the dtype of q where cos has a wider one.
    """

    interleaved: bool
    partial: bool
    keeps_dtype: bool


@functools.cache
def form_of(function: Callable[..., Any]) -> Form | None:
    """What ``function(q, k, cos, sin)`` computes, or None where it is nothing that the op does."""
    try:
        first = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    if [p.name for p in first[:4]] != ["q", "k", "cos", "sin"] or any(
        p.default is p.empty for p in first[4:] if p.kind is not p.VAR_KEYWORD
    ):
        return None
    for interleaved in (False, True):
        if _agrees(function, interleaved, 8):
            return Form(interleaved, _agrees(function, interleaved, 4), _keeps_dtype(function))
    return None


def _inputs(rotary: int, dtype: torch.dtype, angles: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 2, 5, 8), (2, 5, rotary), (2, 5, rotary))
    drawn = [torch.randn(shape, generator=draw, device="cpu") for shape in shapes]
    return [t.to(dtype if t.dim() == 4 else angles) for t in drawn]


def _agrees(function: Callable[..., Any], interleaved: bool, rotary: int) -> bool:
    q, k, cos, sin = _inputs(rotary, torch.float32, torch.float32)
    try:
        got = function(q, k, cos, sin)
    except RuntimeError:  # of shapes that do not fit each other
        return False
    wanted = reference.rope_fwd(q, k, cos, sin, interleaved, False)
    return all(
        isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, atol=1e-5)
        for a, b in zip(got, wanted, strict=True)
    )


def _keeps_dtype(function: Callable[..., Any]) -> bool:
    got = function(*_inputs(8, torch.bfloat16, torch.float32))
    return all(t.dtype == torch.bfloat16 for t in got)


@functools.cache
def in_place_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is called as ``function`` is, and runs the op where that is the same."""
    form = form_of(function)
    assert form is not None
    interleaved, partial, keeps_dtype = form

    @functools.wraps(function)
    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, *rest: Any, **named: Any) -> Any:
        if (
            not rest
            and (not named or named == {"unsqueeze_dim": 1})
            and native.takes("rope", q, k, cos, sin)
            and q.dim() == k.dim() == 4
            and cos.dim() == 3
            and cos.shape == sin.shape
            and q.shape[0] == k.shape[0]
            and q.shape[2:] == k.shape[2:]
            and cos.shape[0] in (1, q.shape[0])
            and cos.shape[1] == q.shape[2]
            and (cos.shape[2] == q.shape[3] or (partial and cos.shape[2] < q.shape[3]))
            and (cos.dtype == q.dtype or keeps_dtype or torch.is_autocast_enabled(q.device.type))
            and cos.dtype in (q.dtype, torch.float32)
            and not (cos.requires_grad or sin.requires_grad)
        ):
            return rope(q, k, cos, sin, interleaved=interleaved)
        return function(q, k, cos, sin, *rest, **named)

    return apply_rotary_pos_emb
