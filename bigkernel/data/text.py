"""Token datasets: one text an item, or documents packed into rows without leaks between them."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from bigkernel.data.errors import DataError
from bigkernel.documents import document_starts, offsets_of_documents

IGNORED = -100  # the label that torch's cross entropy and transformers leave out


class TextDataset(Dataset[dict[str, Tensor]]):
    """One text an item, cut and padded to one length, for any DataLoader.

    Item: ``input_ids`` and ``attention_mask``, int64 [max_length]. Texts are tokenized when asked
    for, with the tokenizer's special tokens, and padded on the tokenizer's padding side.

    Args:
        texts: the texts.
        tokenizer: any transformers tokenizer; one without a padding token is padded with its
            end-of-text token, or 0, which the attention mask hides.
        max_length: tokens an item, special tokens included.

    Raises:
        TypeError, ValueError: texts are no list of strings, or max_length is no whole number that
            leaves room for the tokenizer's special tokens.
    """

    def __init__(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int = 512
    ) -> None:
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, got one string; wrap it in a list.")
        if not hasattr(texts, "__len__") or not hasattr(texts, "__getitem__"):
            raise TypeError(f"texts must be a list of strings, got {type(texts).__name__}.")
        least = max(1, tokenizer.num_special_tokens_to_add())
        try:
            max_length = operator.index(max_length)
        except TypeError:
            raise TypeError(f"max_length must be a whole number, got {max_length!r}.") from None
        if max_length < least:
            why = " for the tokenizer's special tokens" if least > 1 else ""
            raise ValueError(f"max_length must be at least {least}{why}, got {max_length}.")
        self.texts = texts
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text = self.texts[index]
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] must be a string, got {type(text).__name__}.")
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"texts[{index}] holds half of a surrogate pair, no character.")
        ids = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        padding = self.max_length - len(ids)
        pad_id = _first_id(self.tokenizer, "pad", "eos")
        fill, zeros, ones = [pad_id or 0] * padding, [0] * padding, [1] * len(ids)
        left = self.tokenizer.padding_side == "left"
        return {
            "input_ids": _int64(fill + ids if left else ids + fill),
            "attention_mask": _int64(zeros + ones if left else ones + zeros),
        }


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Documents laid end to end and cut into rows, each document its own sequence.

    Item: ``input_ids``, ``position_ids`` and ``labels``, int64 [max_length]. Positions restart at
    every document and at every row, and the first token of each such piece has the label -100:
    nothing comes before it to predict it from. Labels are not shifted; causal models do that.

    Args:
        documents: the texts.
        tokenizer: any transformers tokenizer; its special tokens are not added.
        max_length: tokens a row.
        add_eos: end each document with the tokenizer's end-of-text (or separator) token.
        drop_last: leave out the last row where it is shorter than the others.

    Attributes:
        num_tokens: tokens in all rows.
        num_bytes: bytes of text that the labels stand for, to turn a loss into bits per byte. Where
            a token is not a byte, the unlabelled tokens count as tokens of average length.

    Raises:
        DataError: the documents are shorter than one row.
    """

    def __init__(
        self,
        documents: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512,
        add_eos: bool = True,
        drop_last: bool = False,
    ) -> None:
        if isinstance(documents, str):
            raise TypeError("documents must be a list of strings, got one string.")
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}.")
        eos = _first_id(tokenizer, "eos", "sep") if add_eos else None
        pieces = [
            piece for document in documents if len(piece := _encode(tokenizer, document, eos))
        ]
        ids = torch.cat(pieces) if pieces else _int64([])
        if len(ids) < max_length:
            raise DataError(
                f"the text has {len(ids)} tokens, shorter than one sequence of {max_length}; "
                "use more text or a smaller max_length."
            )
        positions = torch.cat([torch.arange(len(piece), device=piece.device) for piece in pieces])
        text_tokens = len(ids) - (0 if eos is None else len(pieces))
        if drop_last:
            whole = len(ids) // max_length * max_length
            ids, positions = ids[:whole], positions[:whole]

        # Within a row, a document that began earlier is counted from the start of the row.
        place = torch.arange(len(ids), device=ids.device)
        positions = torch.minimum(positions, place % max_length)
        labels = ids.masked_fill(positions == 0, IGNORED)
        self.max_length = max_length
        self.num_tokens = len(ids)
        labelled = labels != IGNORED
        if eos is not None:
            labelled &= ids != eos
        size = sum(len(document.encode()) for document in documents)
        self.num_bytes = round(size * int(labelled.sum()) / max(text_tokens, 1))
        self._rows = [
            dict(zip(("input_ids", "position_ids", "labels"), row, strict=True))
            for row in zip(
                ids.split(max_length),
                positions.split(max_length),
                labels.split(max_length),
                strict=True,
            )
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._rows[index]


def cu_seqlens(position_ids: Tensor) -> Tensor:
    """Offsets of the documents in packed rows: int32 [documents + 1], from 0 to the token count.

    A document starts at every row and wherever :func:`document_starts` says.

    Args:
        position_ids: integers [B, S]; the B rows count as laid end to end.
    """
    return offsets_of_documents(document_starts(position_ids).cumsum(-1))


def unpack(tokens: Tensor, offsets: Tensor) -> list[Tensor]:
    """The documents of a packed row: views of ``tokens`` [T, ...] between consecutive offsets."""
    return [tokens[start:end] for start, end in pairwise(offsets.tolist())]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, eos: int | None) -> Tensor:
    """int64 [n] tokens of a text, end mark included; of a text without tokens, none."""
    # Not an input to a model yet: verbose=False silences the warning about its longest input.
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids = encoded["input_ids"]
    return _int64([*ids, eos] if ids and eos is not None else ids)


def _int64(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _first_id(tokenizer: PreTrainedTokenizerBase, *names: str) -> int | None:
    ids = (getattr(tokenizer, f"{name}_token_id", None) for name in names)
    return next((int(id) for id in ids if id is not None), None)
