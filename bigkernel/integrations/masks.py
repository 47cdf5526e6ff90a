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

from torch import Tensor
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from bigkernel.data.text import cu_seqlens, offsets_of_documents


@dataclass(frozen=True)
class _Pattern:
    """What a mask function of transformers means, where it is one of the known ones."""

    document: Tensor | None = None  # [B, S], a number for each document of a packed row


def dense_mask(**arguments: Any) -> Tensor | None:
    """Mask for any model: None where causal and window say it all, else bool [B, 1, Sq, Sk]."""
    # transformers also returns None for queries at the start of a longer static cache and counts on
    # a top-left diagonal; here None always means bottom-right.
    aligned = _ends_together(arguments)
    arguments["allow_is_causal_skip"] = arguments.get("allow_is_causal_skip", True) and aligned
    if not aligned:
        arguments["allow_is_bidirectional_skip"] = False
    return masking_utils.sdpa_mask(**arguments)


def compact_mask(**arguments: Any) -> Tensor | None:
    """Mask for a model that treats masks as FlashAttention asks for; forms: see the module."""
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


def _recognise(function: Callable[..., Any]) -> _Pattern | None:
    """The pattern of a mask function built from transformers' own pieces, else None.

    The functions are closures, told apart by name and module; whatever is not known exactly is left
    to the dense mask, which is always right.
    """
    if function in (
        masking_utils.causal_mask_function,
        masking_utils.bidirectional_mask_function,
    ):
        return _Pattern()
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    code, cells = function.__code__, function.__closure__ or ()
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    kind = function.__qualname__.split(".", 1)[0]
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


def packed_offsets(position_ids: Tensor) -> Tensor | None:
    """int32 [n] offsets of the documents, or None where each row is a single one.

    Kept on the tensor: every layer of a model asks for the same one, and the answer is read from
    the device.
    """
    known = getattr(position_ids, "_bigkernel_offsets", None)
    if known is not None and known[0] == position_ids._version:
        return known[1]
    packed = bool((position_ids.diff(dim=-1) != 1).any())
    offsets = cu_seqlens(position_ids) if packed else None
    position_ids._bigkernel_offsets = (position_ids._version, offsets)  # type: ignore[attr-defined]
    return offsets
