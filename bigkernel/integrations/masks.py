"""Attention masks for models of transformers, in the smallest form that says everything.

A model of transformers makes its mask once per forward through a registered function and hands the
result to every attention layer. What these functions return:

===============  =============  ===============================================================
mask             form           what the attention layer still applies itself
===============  =============  ===============================================================
nothing to hide  ``None``       causal (aligned bottom-right) and window, as its module says
padding          bool [B, Sk]   the same; False = padding
packed           int32 [1, n]   the same, within each document; the n offsets of the documents
anything else    bool 4-D       nothing: the mask is complete
===============  =============  ===============================================================

``compact_mask`` uses all four; it needs a model whose attention layers pass ``sliding_window`` on
and which leaves the mask alone on its way to them. ``dense_mask`` uses the first and the last only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from bigkernel.documents import document_starts, offsets_of_documents
from bigkernel.integrations import contract

contract.check("attention")
_PLAIN = (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)


@dataclass(frozen=True)
class _Pattern:
    """What a mask function of transformers means, where it is one of the known ones."""

    document: Tensor | None = None  # [B, S], a number for each document of a packed row


def dense_mask(**arguments: Any) -> Tensor | None:
    """Mask for any model: None where causal and window say it all, else bool [B, 1, Sq, Sk]."""
    arguments = _with_our_documents(arguments)
    # transformers also returns None for queries at the start of a longer static cache and counts on
    # a top-left diagonal; here None always means bottom-right.
    aligned = _ends_together(arguments)
    arguments["allow_is_causal_skip"] = arguments.get("allow_is_causal_skip", True) and aligned
    if not aligned and arguments["mask_function"] is not masking_utils.bidirectional_mask_function:
        arguments["allow_is_bidirectional_skip"] = False
    mask: Tensor | None = masking_utils.sdpa_mask(**arguments)
    if mask is not None and not is_tracing(mask) and _packing_unseen(arguments):
        mask._bigkernel_arguments = arguments  # type: ignore[attr-defined]
    return mask


def _packing_unseen(arguments: dict[str, Any]) -> bool:
    """Whether a whole batch may be packed without transformers having looked at its positions."""
    padding: Tensor | None = arguments.get("attention_mask")
    return (
        _packed_positions(arguments["mask_function"]) is None
        and _ends_together(arguments)
        and arguments["q_length"] == arguments["kv_length"]
        and (padding is None or bool(padding.all()))
    )


def with_documents(mask: Tensor, position_ids: Tensor) -> Tensor:
    """A mask of :func:`dense_mask`, with what the positions say about documents added.

    transformers passes them over where a cache or an attention mask of ones is there. A mask of the
    user's own is left as it is. Kept on the mask, for the other layers.
    """
    arguments = getattr(mask, "_bigkernel_arguments", None)
    if arguments is None or packed_offsets(position_ids, 1) is None:
        return mask
    known: Tensor | None = getattr(mask, "_bigkernel_with_documents", None)
    if known is None:
        starts = document_starts(position_ids.expand(mask.shape[0], -1))
        within, document = _places_in_documents(starts)
        function = masking_utils.and_masks(
            masking_utils.remap_positions_for_packed_sequence(arguments["mask_function"], within),
            masking_utils.packed_sequence_mask_function(document),
        )
        known = masking_utils.sdpa_mask(**{**arguments, "mask_function": function})
        assert known is not None
        mask._bigkernel_with_documents = known  # type: ignore[attr-defined]
    return known


def compact_mask(**arguments: Any) -> Tensor | None:
    """Mask for a model that treats masks as FlashAttention asks for; forms: see the module."""
    arguments = _with_our_documents(arguments)
    pattern = _recognise(arguments["mask_function"])
    if pattern is None or not _ends_together(arguments):
        return dense_mask(**arguments)
    if pattern.document is not None:
        return offsets_of_documents(pattern.document)[None]
    padding: Tensor | None = arguments.get("attention_mask")
    if padding is None:
        return None
    # With a sliding cache the mask covers more than the keys that are left.
    start, length = arguments.get("kv_offset", 0), arguments["kv_length"]
    padding = padding[:, start : start + length]
    if padding.shape[1] != length:
        return dense_mask(**arguments)
    # Looking at the values would break a graph; an all-true mask changes nothing but speed.
    return None if not is_tracing(padding) and bool(padding.all()) else padding


def _ends_together(arguments: dict[str, Any]) -> bool:
    """Whether the last query stands at the last key, which is where the diagonal is put."""
    q_offset, kv_offset = arguments.get("q_offset", 0), arguments.get("kv_offset", 0)
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor):
        return False  # a static cache: keys behind the last query exist and are empty
    return bool(q_offset + arguments["q_length"] == kv_offset + arguments["kv_length"])


def _with_our_documents(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the documents that :func:`document_starts` finds in the positions.

    transformers takes every step that is not 1 for a new document, so positions with gaps would be
    cut at each of them, and counts a window or a chunk in positions.
    """
    function = arguments["mask_function"]
    positions = _packed_positions(function)
    if positions is None:
        return arguments
    starts = document_starts(positions)
    if is_tracing(positions) or bool(starts[:, 1:].any()):
        function = _replace_documents(function, *_places_in_documents(starts))
        return {**arguments, "mask_function": function}
    function = _replace_documents(function, None, None)
    # What transformers turned off because of the packing.
    skip = arguments.get("allow_is_causal_skip", True) or _recognise(function) is not None
    return {**arguments, "mask_function": function, "allow_is_causal_skip": skip}


def _places_in_documents(starts: Tensor) -> tuple[Tensor, Tensor]:
    """(places of the tokens within their documents, numbers of the documents): [B, S] each."""
    places = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return places - torch.where(starts, places, 0).cummax(-1).values, starts.cumsum(-1)


def _packed_positions(function: Callable[..., Any]) -> Tensor | None:
    """The positions [B, S] off which transformers read that a row is packed, else None."""
    kind, held = _taken_apart(function)
    if kind == "remap_positions_for_packed_sequence":
        positions: Tensor = held["position_ids"]
        return positions
    found = (_packed_positions(part) for part in held.get("mask_functions", ()))
    return next((positions for positions in found if positions is not None), None)


def _replace_documents(
    function: Callable[..., Any], within: Tensor | None, document: Tensor | None
) -> Callable[..., Any]:
    """A mask function with other documents: [B, S] places within them, and their numbers.

    None: no documents at all. What stands inside the remapping was there before the packing was
    found, and stays.
    """
    kind, held = _taken_apart(function)
    if kind == "remap_positions_for_packed_sequence":
        inner: Callable[..., Any] = held["mask_function"]
        if within is None:
            return inner
        return masking_utils.remap_positions_for_packed_sequence(inner, within)
    if kind not in ("and_masks", "or_masks"):
        return function
    parts = []
    for part in held["mask_functions"]:
        if _taken_apart(part)[0] != "packed_sequence_mask_function":
            parts.append(_replace_documents(part, within, document))
        elif document is not None:
            parts.append(masking_utils.packed_sequence_mask_function(document))
    if len(parts) == 1:
        return parts[0]
    return getattr(masking_utils, kind)(*parts)


def _taken_apart(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """The name and the variables of a mask function that transformers made; else nothing."""
    if function in _PLAIN:
        return "", {}
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return "", {}
    code, cells = function.__code__, function.__closure__ or ()
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    return function.__qualname__.split(".", 1)[0], held


def _recognise(function: Callable[..., Any]) -> _Pattern | None:
    """The pattern of a mask function built from transformers' own pieces, else None.

    The functions are closures, told apart by name and module; whatever is not known exactly is left
    to the dense mask, which is always right.
    """
    if function in _PLAIN:
        return _Pattern()
    kind, held = _taken_apart(function)
    if kind in ("sliding_window_overlay", "sliding_window_bidirectional_overlay"):
        return _Pattern()
    if kind == "packed_sequence_mask_function":
        return _Pattern(document=held["packed_sequence_mask"])
    if kind == "remap_positions_for_packed_sequence":
        return _recognise(held["mask_function"])
    if kind == "and_masks":
        parts = [_recognise(part) for part in held["mask_functions"]]
        documents = [part.document for part in parts if part and part.document is not None]
        if None in parts or len(documents) > 1:
            return None
        return _Pattern(document=documents[0] if documents else None)
    return None


def packed_offsets(position_ids: Tensor, batch: int) -> Tensor | None:
    """int32 [n] offsets of the documents, or None where each row is a single one.

    Kept on the tensor: every layer of a model asks for the same one, and the answer is read from
    the device.

    Args:
        position_ids: [batch or 1, S].
        batch: rows that the offsets are for.
    """
    key = (position_ids._version, batch)
    known = getattr(position_ids, "_bigkernel_offsets", None)
    if known is not None and known[0] == key:
        return known[1]
    starts = document_starts(position_ids)
    offsets = None
    if bool(starts[:, 1:].any()):
        offsets = offsets_of_documents(starts.cumsum(-1).expand(batch, -1))
    position_ids._bigkernel_offsets = (key, offsets)  # type: ignore[attr-defined]
    return offsets
