"""Attention weights, where a model is asked for them: from the eager function of its own layer.

The fused kernels never form the [Sq, Sk] weights. A layer that has to give them is computed as
``attn_implementation="eager"`` would, from the mask that bigkernel's attention would apply.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigkernel.integrations import contract
from bigkernel.integrations.subclass import original_class
from bigkernel.ops.attention.reference import Rule, allowed_keys

_collector = contract.get("attention", "_active_collector")


def asks_for_weights(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether this layer has to give its attention weights: asked for by call or by config."""
    # Some models (OPT, SigLIP) do not hand the argument on; what is being collected tells as well.
    collected = _collector.get()
    if collected is not None:
        return any(name.endswith("attentions") for name in collected)
    asked = arguments.get("output_attentions")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(asked)


def eager_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The function that transformers' model calls for eager attention in this layer, if any."""
    forward = inspect.unwrap(original_class(module).forward)
    names = [name for name in forward.__code__.co_names if "eager_attention_forward" in name]
    found = [forward.__globals__[name] for name in names if name in forward.__globals__]
    return found[0] if found else None


def eager_mask(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    offsets: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """The mask to add to the scores: broadcastable to [B, H, Sq, Sk] in query's dtype, or None.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Sk, D].
        mask: None; bool [B, Sk], False = padding; or a complete 4-D mask, bool or to add.
        causal: aligned bottom-right.
        window: keys to the left and to the right of the diagonal; None: no limit.
        offsets: of the packed documents in the rows laid end to end, for queries and for keys.
    """
    if mask is not None and mask.ndim == 4 and mask.dtype != torch.bool:
        return mask
    if offsets is not None:
        allowed: Tensor | None = _within_documents(query, key, causal, window, offsets)
    elif mask is not None and mask.ndim == 4:
        allowed = mask
    else:
        length, keys = query.shape[2], key.shape[2]
        left, right = (-1 if side is None else side for side in window)
        rule = Rule(1.0, causal, bottom_right=True, window_left=left, window_right=right)
        allowed = allowed_keys((0, length), (0, keys), keys - length, rule, query.device)
        if mask is not None:
            padding = mask[:, None, None, :].to(torch.bool)
            allowed = padding if allowed is None else padding & allowed
    if allowed is None:
        return None
    # The lowest number and not -inf, as transformers: a row without any key must not be NaN.
    zeros = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(allowed, zeros, torch.finfo(query.dtype).min)


def _within_documents(
    query: Tensor,
    key: Tensor,
    causal: bool,
    window: tuple[int | None, int | None],
    offsets: tuple[Tensor, Tensor],
) -> Tensor:
    """bool [B, 1, Sq, Sk] of the keys that packed queries see."""
    places, documents, lengths = [], [], []
    for states, bounds in zip((query, key), offsets, strict=True):
        batch, length = states.shape[0], states.shape[2]
        index = torch.arange(batch * length, device=bounds.device)
        document = torch.searchsorted(bounds.long(), index, right=True) - 1
        places.append((index - bounds[document]).view(batch, length))
        documents.append(document.view(batch, length))
        lengths.append(bounds.diff())
    behind = (lengths[1] - lengths[0])[documents[0]]
    diagonal, there = (places[0] + behind)[:, :, None], places[1][:, None]
    allowed = documents[0][:, :, None] == documents[1][:, None]
    if causal:
        allowed = allowed & (there <= diagonal)
    left, right = window
    if left is not None:
        allowed = allowed & (there >= diagonal - left)
    if right is not None:
        allowed = allowed & (there <= diagonal + right)
    return allowed[:, None]
