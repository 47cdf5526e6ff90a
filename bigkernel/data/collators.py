"""Batches of documents of different lengths: laid end to end without padding, or padded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bigkernel.data.text import IGNORED
from bigkernel.documents import document_starts, offsets_of_documents

_DECODER = "decoder_"  # begins the names of what a decoder reads, beside the labels
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

    For a model with an encoder and a decoder, that is with ``decoder_start_token_id``, an example
    is one document of two sequences, each of any length: ``input_ids`` [n] and what has one value
    for each of them, and ``labels`` [m], with ``decoder_input_ids`` and other columns of that name
    if there are some. ``cu_seq_lens_k``/``max_length_k`` are of the encoder's sequence then,
    ``cu_seq_lens_q``/``max_length_q`` of the decoder's, and there are no positions. Labels of -100
    at the end are left out, and examples without others passed over: nothing is learned from them.

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
        decoder_start_token_id: what a decoder reads before its first label. Without
            ``decoder_input_ids`` it reads the labels of its document, one token later.
        pad_token_id: what a decoder reads in the place of a label of -100.

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
        decoder_start_token_id: int | None = None,
        pad_token_id: int = 0,
    ) -> None:
        _check_multiple("PackingCollator", pad_to_multiple_of)
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.collator = collator
        self.shifted = shifted
        self.first_position = first_position
        self.decoder_start_token_id = decoder_start_token_id
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not rows:
            raise ValueError("cannot pack a batch of no rows.")
        two = self.decoder_start_token_id is not None
        if self.collator is not None:
            rows = _rows_of(self.collator(list(rows)), two)
        if two:
            return self._of_two_sequences(rows)
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
        longest = self._longest(offsets)
        if self.pad_to_multiple_of is not None:
            offsets = self._padded(batch, offsets, longest)
        batch = {name: values[None] for name, values in batch.items()}
        for side in ("q", "k"):
            batch[f"cu_seq_lens_{side}"] = offsets
            batch[f"max_length_{side}"] = longest
        return batch

    def _of_two_sequences(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        assert self.decoder_start_token_id is not None
        examples = _examples_of_two(rows, self.decoder_start_token_id, self.pad_token_id)
        kept = [columns for _, columns in examples if len(columns["labels"])]
        if not kept:
            raise ValueError(f"none of the {len(rows)} examples of the batch has a label.")
        batch: dict[str, Any] = {}
        for side, of_side in (("q", "labels"), ("k", "input_ids")):
            names = [name for name in kept[0] if _is_decoders(name) == (side == "q")]
            tokens = {name: torch.cat([columns[name] for columns in kept]) for name in names}
            lengths = torch.tensor([0, *(len(columns[of_side]) for columns in kept)], device="cpu")
            offsets = lengths.cumsum(0).to(torch.int32)
            longest = max(1, self._longest(offsets))
            if self.pad_to_multiple_of is not None:
                offsets = self._padded(tokens, offsets, longest)
            batch |= {name: values[None] for name, values in tokens.items()}
            batch |= {f"cu_seq_lens_{side}": offsets, f"max_length_{side}": longest}
        # What fills one sequence up may be more documents than what fills up the other.
        count = max(len(batch["cu_seq_lens_q"]), len(batch["cu_seq_lens_k"]))
        for side in ("q", "k"):
            offsets = batch[f"cu_seq_lens_{side}"]
            none = offsets[-1:].expand(count - len(offsets))
            batch[f"cu_seq_lens_{side}"] = torch.cat([offsets, none])
        return batch

    def _longest(self, offsets: Tensor) -> int:
        """The length of the longest document, or ``max_length``."""
        longest = int(offsets.diff().max())
        if self.max_length is None:
            return longest
        if longest > self.max_length:
            raise ValueError(
                f"a document of {longest} tokens is longer than max_length={self.max_length}."
            )
        return self.max_length

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
        decoder_start_token_id: as in :class:`PackingCollator`, with the columns that it gives for
            a model with an encoder and a decoder; those of the decoder are padded to a length of
            their own, ``decoder_input_ids`` with ``pad_token_id``. There is no mask of them, as no
            token sees those behind it.

    Raises:
        ValueError: an example that does not fit, by its number in the batch.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        *,
        pad_to_multiple_of: int | None = None,
        shifted: bool = True,
        decoder_start_token_id: int | None = None,
    ) -> None:
        _check_multiple("PaddingCollator", pad_to_multiple_of)
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.shifted = shifted
        self.decoder_start_token_id = decoder_start_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("cannot pad a batch of no rows.")
        start = self.decoder_start_token_id
        if start is None:
            examples = _examples(rows, self.shifted, keep_empty=True)
        else:
            examples = _examples_of_two(rows, start, self.pad_token_id)
        for number, columns in examples:
            if "position_ids" in columns:
                raise ValueError(
                    f"example {number} has position_ids, which may hold several documents, and "
                    "padding is for one an example: leave them out, or use PackingCollator."
                )
            columns["attention_mask"] = torch.ones_like(columns["input_ids"])
        fill = {"labels": IGNORED}
        fill |= dict.fromkeys(("input_ids", "decoder_input_ids"), self.pad_token_id)
        batch = {}
        for name in examples[0][1]:
            found = [columns[name] for _, columns in examples]
            length = max(map(len, found))
            length += -length % (self.pad_to_multiple_of or 1)
            value = fill.get(name, 0)
            batch[name] = torch.stack(
                [torch.nn.functional.pad(x, (0, length - len(x)), value=value) for x in found]
            )
        return batch


def _check_multiple(collator: str, multiple: int | None) -> None:
    if multiple is not None and multiple < 1:
        raise ValueError(f"{collator}: pad_to_multiple_of must be 1 or more, got {multiple}.")


def _is_decoders(name: str) -> bool:
    """Whether a column of an example of two sequences belongs to the second."""
    return name == "labels" or name.startswith(_DECODER)


def _rows_of(batch: Any, two: bool) -> list[dict[str, Any]]:
    """The rows of a batch [B, L] that another collator made; with labels [B, M] if ``two``."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError("the collator must give input_ids as a tensor [batch, tokens] to pack.")
    if "cu_seq_lens_q" in batch and batch.get("position_ids") is None:
        raise ValueError(
            "the collator's batch is packed (cu_seq_lens_q) without position_ids: use it without "
            "packing, or let it return position_ids."
        )
    columns = {n: x for n, x in batch.items() if x is not None and n not in _PLACES}
    labels = columns.get("labels")
    for name, values in columns.items():
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        expected = tuple(ids.shape)
        if two and _is_decoders(name) and isinstance(labels, Tensor) and labels.ndim == 2:
            expected = (len(ids), labels.shape[1])
        if shape != expected:
            raise ValueError(
                f"{name} of the collator's batch must be one value a token, {expected}, to "
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
    _check_same_columns(examples)
    return examples


def _check_same_columns(examples: list[tuple[int, dict[str, Tensor]]]) -> None:
    for number, columns in examples[1:]:
        first, names = examples[0]
        if columns.keys() != names.keys():
            raise ValueError(
                f"example {number} has {', '.join(columns)}, and example {first} has "
                f"{', '.join(names)}: a batch needs the same columns."
            )


def _examples_of_two(
    rows: Sequence[Mapping[str, Any]], start: int, pad: int
) -> list[tuple[int, dict[str, Tensor]]]:
    """(number in the batch, columns) of the examples of an encoder [n] and a decoder [m].

    Without padding, and without labels of -100 at the end; with ``decoder_input_ids``.
    """
    examples = []
    for number, row in enumerate(rows):
        given = _given(number, row)
        if "labels" not in given:
            raise ValueError(
                f"example {number} has no labels, which the decoder is to predict, got "
                f"{', '.join(given)}."
            )
        if "position_ids" in given:
            raise ValueError(
                f"example {number} has position_ids, which may hold several documents, and an "
                "example of a model with an encoder and a decoder is one: leave them out."
            )
        encoders = {name: x for name, x in given.items() if not _is_decoders(name)}
        decoders = {name: x for name, x in given.items() if _is_decoders(name)}
        columns = _without_padding(number, encoders, "input_ids", "attention_mask")
        if f"{_DECODER}input_ids" not in decoders:
            labels = decoders["labels"]
            before = labels.new_full((1,), start)
            read = torch.cat([before, labels.masked_fill(labels == IGNORED, pad)])
            decoders[f"{_DECODER}input_ids"] = read[:-1]
        decoders = _without_padding(number, decoders, "labels", f"{_DECODER}attention_mask")
        counted = (decoders["labels"] != IGNORED).nonzero()[:, 0].tolist()
        end = counted[-1] + 1 if counted else 0
        columns |= {name: x[:end] for name, x in decoders.items()}
        examples.append((number, columns))
    _check_same_columns(examples)
    return examples


def _columns(number: int, row: Mapping[str, Any]) -> dict[str, Tensor]:
    return _without_padding(number, _given(number, row), "input_ids", "attention_mask")


def _given(number: int, row: Mapping[str, Any]) -> dict[str, Tensor]:
    if not isinstance(row, Mapping) or "input_ids" not in row:
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"example {number} has no input_ids, got {has}.")
    columns = {
        name: _column(number, name, values) for name, values in row.items() if values is not None
    }
    ids = columns["input_ids"]
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids of example {number} must be whole numbers, got {ids.dtype}.")
    return columns


def _without_padding(
    number: int, columns: dict[str, Tensor], of: str, masked_by: str
) -> dict[str, Tensor]:
    """Columns of one value for each of those in ``of``, cut to where ``masked_by`` is not 0."""
    tokens = columns[of]
    for name, values in columns.items():
        if values.shape != tokens.shape:
            raise ValueError(
                f"{name} of example {number} must be one value a token, {len(tokens)}, got "
                f"{tuple(values.shape)}."
            )
    mask = columns.pop(masked_by, None)
    if mask is None or bool((mask != 0).all()):
        return columns
    real = (mask != 0).nonzero()[:, 0]
    kept = slice(int(real[0]), int(real[-1]) + 1) if len(real) else slice(0, 0)
    if len(real) != len(tokens[kept]):
        raise ValueError(
            f"{masked_by} of example {number} hides tokens between others, and packing has no "
            "mask: it may be 0 at the ends of an example only, which is padding."
        )
    labels = columns.get("labels")
    if labels is not None and bool(((labels != IGNORED) & (mask == 0)).any()):
        raise ValueError(
            f"example {number} has labels where its {masked_by} is 0, which would count in a "
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
