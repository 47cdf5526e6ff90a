"""Batches of documents of different lengths: laid end to end without padding, or padded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bigkernel.data.text import IGNORED, document_starts, offsets_of_documents

# What says where the documents are; it is made anew.
_PLACES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class PackingCollator:
    """Lays the examples of a batch end to end as one sequence that knows where its documents are.

    Takes examples with ``input_ids`` and whatever else has one value a token (``labels``,
    ``token_type_ids``, ..), as lists, arrays or tensors [n] of any lengths. Gives them as int64
    [1, T], with ``position_ids`` that restart at every document and, for attention that reads them,
    ``cu_seq_lens_q``/``cu_seq_lens_k`` (int32 [documents + 1], the offsets of the documents) and
    ``max_length_q``/``max_length_k``. There is no attention mask: with one, transformers would not
    see the packing.

    An example is one document, or several if it has ``position_ids`` (:func:`cu_seqlens` says where
    they start). Where it has an ``attention_mask``, the padding at its ends is left out. Without
    ``labels`` they are the tokens. Examples without tokens are passed over.

    A model computes of this what it computes of each document by itself if its attention reads the
    offsets, or finds documents by their positions: `bigkernel.Trainer` makes sure of it.

    Args:
        max_length: the constant that ``max_length_q`` is set to, an upper bound of the length of
            any document. Without it, the longest of each batch.
        pad_to_multiple_of: T is rounded up to a multiple of this many tokens by documents of zeros
            behind the others, with the label -100.
        collator: called on the examples first, such as transformers'
            ``DataCollatorForLanguageModeling``; its batch [B, L] is packed in their place, padding
            left out.
        shifted: whether the model's loss compares each label with what is predicted a token
            before, as causal language models do. Then the first label of every document is -100:
            it would be predicted from another document. Where not, labels are left as they are,
            and there are none unless the examples have some.
        first_position: the position of the first token of a document; RoBERTa counts from
            ``pad_token_id + 1``.

    Raises:
        ValueError: an example that does not fit, by its number in the batch: an attention mask with
            a gap, a label where the mask is 0, values that are not one a token, other columns than
            its neighbours have, a document longer than max_length.
    """

    def __init__(
        self,
        max_length: int | None = None,
        *,
        pad_to_multiple_of: int | None = None,
        collator: Callable[[list[Any]], Any] | None = None,
        shifted: bool = True,
        first_position: int = 0,
    ) -> None:
        _check_multiple("PackingCollator", pad_to_multiple_of)
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.collator = collator
        self.shifted = shifted
        self.first_position = first_position

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not rows:
            raise ValueError("cannot pack a batch of no rows.")
        if self.collator is not None:
            rows = _rows_of(self.collator(list(rows)))
        examples = _examples(rows, self.shifted)
        if not examples:
            raise ValueError(f"none of the {len(rows)} examples of the batch has a token.")
        starts = [self._starts(number, columns) for number, columns in examples]
        for (_, columns), first in zip(examples, starts, strict=True):
            if self.shifted:
                columns["labels"] = columns["labels"].masked_fill(first, IGNORED)
        names = ["input_ids", *(n for n in examples[0][1] if n != "input_ids")]
        batch: dict[str, Any] = {
            name: torch.cat([columns[name] for _, columns in examples]) for name in names
        }
        # Row by row: what one row's positions look like says nothing about another's.
        offsets = offsets_of_documents(torch.cat(starts).cumsum(0)[None])
        longest = int(offsets.diff().max())
        if self.max_length is not None:
            if longest > self.max_length:
                raise ValueError(
                    f"a document of {longest} tokens is longer than max_length={self.max_length}."
                )
            longest = self.max_length
        if self.pad_to_multiple_of is not None:
            offsets = self._padded(batch, offsets, longest)
        batch = {name: values[None] for name, values in batch.items()}
        for side in ("q", "k"):
            batch[f"cu_seq_lens_{side}"] = offsets
            batch[f"max_length_{side}"] = longest
        return batch

    def _starts(self, number: int, columns: dict[str, Tensor]) -> Tensor:
        """bool [n]: where the documents of an example begin; it has ``position_ids`` afterwards."""
        given = columns.get("position_ids")
        if given is None:
            places = torch.arange(len(columns["input_ids"]), device="cpu")
            columns["position_ids"] = places + self.first_position
            return places == 0
        if int(given.min()) < self.first_position:
            raise ValueError(
                f"example {number} has the position {int(given.min())}, and positions of this "
                f"model start at {self.first_position}."
            )
        return document_starts((given - self.first_position)[None])[0]

    def _padded(self, batch: dict[str, Any], offsets: Tensor, longest: int) -> Tensor:
        """The offsets with those of the documents that fill ``batch`` up."""
        total = int(offsets[-1])
        assert self.pad_to_multiple_of is not None
        missing = -total % self.pad_to_multiple_of
        # None longer than the others: for so many positions the model has a place.
        places = torch.arange(missing, device="cpu") % longest
        for name, values in batch.items():
            fill = values.new_full((missing,), IGNORED if name == "labels" else 0)
            if name == "position_ids":
                fill = places + self.first_position
            batch[name] = torch.cat([values, fill])
        begun = (places == 0).nonzero()[1:, 0] + total
        end = [total + missing] if missing else []
        return torch.cat([offsets, begun.to(torch.int32), offsets.new_tensor(end)])


class PaddingCollator:
    """Pads the examples of a batch on the right, to the longest of them.

    Takes what :class:`PackingCollator` takes, one document an example. Gives int64 [B, L] for each
    column and ``attention_mask``; labels are -100 in the padding, other columns 0.

    Args:
        pad_token_id: what ``input_ids`` are filled up with.
        pad_to_multiple_of: L is rounded up to a multiple of this.
        shifted: as in :class:`PackingCollator`: whether examples without labels are their own.

    Raises:
        ValueError: an example that does not fit, by its number in the batch.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        *,
        pad_to_multiple_of: int | None = None,
        shifted: bool = True,
    ) -> None:
        _check_multiple("PaddingCollator", pad_to_multiple_of)
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.shifted = shifted

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("cannot pad a batch of no rows.")
        examples = _examples(rows, self.shifted, keep_empty=True)
        for number, columns in examples:
            if "position_ids" in columns:
                raise ValueError(
                    f"example {number} has position_ids, which may hold several documents, and "
                    "padding is for one an example: leave them out, or use PackingCollator."
                )
            columns["attention_mask"] = torch.ones_like(columns["input_ids"])
        fill = {"labels": IGNORED, "input_ids": self.pad_token_id}
        length = max(len(columns["input_ids"]) for _, columns in examples)
        length += -length % (self.pad_to_multiple_of or 1)
        return {
            name: torch.stack(
                [
                    torch.nn.functional.pad(x, (0, length - len(x)), value=fill.get(name, 0))
                    for x in (columns[name] for _, columns in examples)
                ]
            )
            for name in examples[0][1]
        }


def _check_multiple(collator: str, multiple: int | None) -> None:
    if multiple is not None and multiple < 1:
        raise ValueError(f"{collator}: pad_to_multiple_of must be 1 or more, got {multiple}.")


def _rows_of(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch [B, L] that another collator made."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError("the collator must give input_ids as a tensor [batch, tokens] to pack.")
    if "cu_seq_lens_q" in batch and batch.get("position_ids") is None:
        raise ValueError(
            "the collator's batch is packed (cu_seq_lens_q) without position_ids: use it without "
            "packing, or let it return position_ids."
        )
    columns = {n: x for n, x in batch.items() if x is not None and n not in _PLACES}
    for name, values in columns.items():
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if shape != tuple(ids.shape):
            raise ValueError(
                f"{name} of the collator's batch must be one value a token, {tuple(ids.shape)}, to "
                f"pack, got {shape}."
            )
    return [{name: x[row] for name, x in columns.items()} for row in range(len(ids))]


def _examples(
    rows: Sequence[Mapping[str, Any]], shifted: bool, keep_empty: bool = False
) -> list[tuple[int, dict[str, Tensor]]]:
    """(number in the batch, columns [n] without padding) of the examples that have tokens."""
    examples = []
    for number, row in enumerate(rows):
        columns = _columns(number, row)
        if "labels" not in columns and shifted:
            columns["labels"] = columns["input_ids"]
        if len(columns["input_ids"]) or keep_empty:
            examples.append((number, columns))
    for number, columns in examples[1:]:
        first, names = examples[0]
        if columns.keys() != names.keys():
            raise ValueError(
                f"example {number} has {', '.join(columns)}, and example {first} has "
                f"{', '.join(names)}: a batch needs the same columns."
            )
    return examples


def _columns(number: int, row: Mapping[str, Any]) -> dict[str, Tensor]:
    if not isinstance(row, Mapping) or "input_ids" not in row:
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"example {number} has no input_ids, got {has}.")
    columns = {
        name: _column(number, name, values) for name, values in row.items() if values is not None
    }
    ids = columns["input_ids"]
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids of example {number} must be whole numbers, got {ids.dtype}.")
    for name, values in columns.items():
        if values.shape != ids.shape:
            raise ValueError(
                f"{name} of example {number} must be one value a token, {len(ids)}, got "
                f"{tuple(values.shape)}."
            )
    mask = columns.pop("attention_mask", None)
    if mask is None or bool((mask != 0).all()):
        return columns
    real = (mask != 0).nonzero()[:, 0]
    kept = slice(int(real[0]), int(real[-1]) + 1) if len(real) else slice(0, 0)
    if len(real) != len(ids[kept]):
        raise ValueError(
            f"attention_mask of example {number} hides tokens between others, and packing has no "
            "mask: it may be 0 at the ends of an example only, which is padding."
        )
    labels = columns.get("labels")
    if labels is not None and bool(((labels != IGNORED) & (mask == 0)).any()):
        raise ValueError(
            f"example {number} has labels where its attention_mask is 0, which would count in a "
            "padded batch and are left out here: give them the label -100."
        )
    return {name: values[kept] for name, values in columns.items()}


def _column(number: int, name: str, values: Any) -> Tensor:
    """A tensor [n] on the CPU."""
    try:
        column = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        column = None
    if column is None or column.ndim != 1:
        got = type(values).__name__ if column is None else f"a shape of {tuple(column.shape)}"
        raise ValueError(
            f"{name} of example {number} must be numbers, one a token, got {got}; leave out what "
            "the model does not take."
        )
    # torch reads [] as floating point.
    return column if column.is_floating_point() and len(column) else column.to(torch.int64)
