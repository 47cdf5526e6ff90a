"""Whether a model keeps packed documents apart: found out by trying, before anything is trained.

How documents are kept apart is up to each model: some read offsets, some look for them in the
positions, some do neither and let them see each other without a word. So one short document is put
between two others, and the loss of it alone is differentiated by what goes into the model:

- a token of another document with a gradient that is not exactly 0 is seen. That is no matter of
  rounding, as what a mask hides has the weight 0;
- the gradients of the document's own tokens are those that it has by itself, or its positions are
  not those that it has by itself. These differ by rounding, and the numbers that models count
  positions from are tried out.

A model with an encoder and a decoder is tried out with documents of two sequences, and what goes
into either counts.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigkernel.data.collators import PackingCollator

# Tokens before the document, in it, and after it.
_LENGTHS = 33, 8, 5
_DECODER_LENGTHS = 3, 9, 17


class PackingError(ValueError):
    """A model that cannot be trained on packed documents; the message names it and says why."""


class Packing(NamedTuple):
    """How documents are packed for a model; as in :class:`bigkernel.data.PackingCollator`."""

    shifted: bool
    first_position: int
    decoder_start_token_id: int | None = None
    pad_token_id: int = 0  # counts with the former


def packing_of(model: nn.Module, loss: Callable[[dict[str, Any]], Tensor]) -> Packing:
    """Try a model out, in evaluation mode, on three short documents of random tokens.

    Args:
        model: any module; without transformers' ``get_input_embeddings``, its first
            `torch.nn.Embedding` counts.
        loss: the loss of a batch, as a training step computes it; called with the model in
            evaluation mode.

    Raises:
        PackingError: documents see each other, have other positions, or cannot be given to it.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return _packing_of_two(model, loss)
    # What transformers' models call it that learn to tell which text belongs to which image.
    if "return_loss" in inspect.signature(model.forward).parameters:
        why = "its loss compares whole texts with whole images, one of each a row, and packed texts"
        raise _refused(model, f"{why} are one row")
    embedding = _embedding(model)
    if embedding is None:
        raise _refused(model, "it has no embedding of tokens")
    probe = _Probe(_that_share(model, embedding), loss)
    device, vocabulary = embedding.weight.device, int(embedding.weight.shape[0])
    starts, room = _starts(config)
    before, length, after = (min(n, room) for n in _LENGTHS)
    here = slice(before, before + length)
    tokens = _tokens(config, vocabulary, before + length + after)
    documents = tokens.split([before, length, after])

    def gradients(first: int, labelled: slice) -> Tensor:
        labels = torch.full_like(tokens, -100)
        labels[labelled] = 1  # of a vocabulary, and of classes
        rows = [
            {"input_ids": ids, "labels": own}
            for ids, own in zip(documents, labels.split([before, length, after]), strict=True)
        ]
        batch = PackingCollator(shifted=False, first_position=first)(rows)
        return probe(_moved(batch, device))[0]

    try:
        with _evaluated(model), _without_zeros(model):
            # A loss that is shifted compares the first label with what comes before.
            shifted = _seen(gradients(0, here), here)
            labelled = slice(here.start + 1, here.stop) if shifted else here
            labels = torch.full((1, length), 1)
            labels[0, : int(shifted)] = -100
            alone = {"input_ids": documents[1][None], "labels": labels}
            expected = probe(_moved(alone, device))[0]
            found = {first: gradients(first, labelled) for first in starts}
    except Exception as error:  # of as many kinds as there are models
        what = "it cannot compute a loss of packed token ids with a label each"
        raise _refused(model, f"{what} ({_told(error)})") from error
    errors = {
        first: _error(gradient[here], expected)
        for first, gradient in found.items()
        if not _seen(gradient, here)
    }
    if not errors:
        raise _refused(model, "packed documents would see each other", _attention(config))
    first = min(errors, key=lambda first: errors[first])
    # Where only distances count, each start is as good.
    if errors.get(0, 1.0) <= 4 * errors[first] + torch.finfo(expected.dtype).eps:
        first = 0
    if not errors[first] <= torch.finfo(expected.dtype).eps ** 0.5:
        raise _refused(model, "the positions of packed documents would not be those of each alone")
    return Packing(shifted, first)


def _packing_of_two(model: nn.Module, loss: Callable[[dict[str, Any]], Tensor]) -> Packing:
    """`packing_of` of a model with an encoder and a decoder."""
    config: Any = model.config
    start, pad = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "pad"))
    if not isinstance(start, int) or not isinstance(pad, int):
        raise _refused(model, "its config has no decoder_start_token_id and pad_token_id")
    try:
        parts: Any = model.get_encoder(), model.get_decoder()  # type: ignore[operator]
        embeddings = list(dict.fromkeys(part.get_input_embeddings() for part in parts))
        probe = _Probe(embeddings, loss, ("input_ids", "labels"))
        vocabulary, device = len(embeddings[0].weight), embeddings[0].weight.device
        documents = [
            {"input_ids": ids, "labels": labels}
            for ids, labels in zip(
                *(
                    _tokens(config, vocabulary, sum(lengths)).split(list(lengths))
                    for lengths in (_LENGTHS, _DECODER_LENGTHS)
                ),
                strict=True,
            )
        ]
        documents[1]["labels"][3] = -100  # in the place of which the decoder reads padding
        batch = PackingCollator(decoder_start_token_id=start, pad_token_id=pad)(documents)
        here, there = (slice(n[0], n[0] + n[1]) for n in (_LENGTHS, _DECODER_LENGTHS))
        labels = torch.full_like(batch["labels"], -100)
        labels[:, there] = documents[1]["labels"]
        batch["labels"] = labels
        with _evaluated(model), _without_zeros(model):
            alone = {name: values[None] for name, values in documents[1].items()}
            expected = probe(_moved(alone, device))
            found = probe(_moved(batch, device))
    except Exception as error:
        what = "it cannot compute a loss of packed documents, each with a sequence of labels"
        raise _refused(model, f"{what} ({_told(error)})") from error
    if any(map(_seen, found, (here, there))):
        raise _refused(model, "packed documents would see each other", _attention(config))
    own = torch.cat([found[0][here], found[1][there]])
    if not _error(own, torch.cat(expected)) <= torch.finfo(own.dtype).eps ** 0.5:
        raise _refused(model, "packed documents would not be computed as each alone")
    return Packing(False, 0, start, pad)


def _moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {n: x.to(device) if isinstance(x, Tensor) else x for n, x in batch.items()}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _embedding(model: nn.Module) -> Any:
    try:
        found: Any = model.get_input_embeddings()  # type: ignore[operator]
        if isinstance(found.weight, Tensor):
            return found
    except (AttributeError, NotImplementedError):
        pass  # no model of transformers, or one that has no single embedding
    return next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)


def _that_share(model: nn.Module, embedding: nn.Module) -> list[nn.Module]:
    """The embeddings with the weight of ``embedding``; of T5's, not the first one is called."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [x for x in embeddings if x.weight is embedding.weight] or [embedding]


def _refused(model: nn.Module, why: str, hint: str = "") -> PackingError:
    return PackingError(
        f"{type(model).__name__} cannot be trained on packed documents: {why}.{hint} Train it on "
        "padded ones: packing=False, with train_sampling_strategy='group_by_length' for less "
        "padding."
    )


def _attention(config: Any) -> str:
    name = str(getattr(config, "_attn_implementation", None))
    if "bigkernel" in name:
        return ""
    return f" Its attention is {name!r}, not bigkernel's (use_bigkernel_attention)."


class _Probe:
    """Gradients of a loss by what embeddings make: [T, H] for [1, T] tokens of each call."""

    def __init__(
        self,
        embeddings: list[nn.Module],
        loss: Callable[[dict[str, Any]], Tensor],
        sequences: tuple[str, ...] = ("input_ids",),  # each embedded once, in this order
    ) -> None:
        self.embeddings, self.loss, self.sequences = embeddings, loss, sequences

    def __call__(self, batch: dict[str, Any]) -> list[Tensor]:
        made: list[Tensor] = []

        def note(module: nn.Module, arguments: Any, out: Tensor) -> Tensor:
            made.append(out.detach().requires_grad_())
            return made[-1]

        shapes = [batch[name].shape for name in self.sequences]
        handles = [module.register_forward_hook(note) for module in self.embeddings]
        try:
            with torch.enable_grad():
                gradients = torch.autograd.grad(self.loss(batch), made)
        finally:
            for handle in handles:
                handle.remove()
        if len(made) != len(shapes):
            raise ValueError(f"tokens are embedded {len(made)} times, not {len(shapes)}")
        for shape, gradient in zip(shapes, gradients, strict=True):
            if gradient.shape[:-1] != shape:
                raise ValueError(f"tokens {tuple(shape)} are embedded as {tuple(gradient.shape)}")
            if not bool(gradient.isfinite().all()) or not bool(gradient.any()):
                raise ValueError("the loss is not finite, or no token counts in it")
        return [gradient[0] for gradient in gradients]


def _seen(gradient: Tensor, here: slice) -> bool:
    """Whether a token outside the document has a gradient."""
    return bool(gradient[: here.start].any()) or bool(gradient[here.stop :].any())


def _error(actual: Tensor, expected: Tensor) -> float:
    """How far a token's gradient is off, relative to its size: the median over the tokens.

    Not the largest: an expert that rounding chooses otherwise changes all of a token.
    """
    difference = (actual.double() - expected.double()).norm(dim=-1)
    return float((difference / expected.double().norm(dim=-1).clamp_min(1e-300)).median())


def _starts(config: Any) -> tuple[list[int], int]:
    """Positions that a document may begin with, and how many tokens have one then.

    0, or what RoBERTa begins with where it fits into a table of positions.
    """
    room = getattr(config, "max_position_embeddings", None)
    padding = getattr(config, "pad_token_id", None)
    if not isinstance(room, int):
        return [0], max(_LENGTHS)
    if not isinstance(padding, int) or padding < 0 or padding + 1 + min(_LENGTHS) > room:
        return [0], room
    return [0, padding + 1], room - padding - 1


def _tokens(config: Any, vocabulary: int, count: int) -> Tensor:
    """Random tokens without those that mean something to a model, such as padding or an image."""
    special: set[int] = set()
    for name, value in vars(config).items() if config is not None else ():
        if name.endswith(("_token_id", "_token_index")):
            values = value if isinstance(value, (list, tuple)) else [value]
            special.update(n for n in values if isinstance(n, int))
    size = getattr(config, "vocab_size", None)
    plain = [n for n in range(size if isinstance(size, int) else vocabulary) if n not in special]
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(plain) or 1, (count,), generator=draw, device="cpu")
    return torch.tensor(plain or [0], device="cpu")[drawn]


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _without_zeros(model: nn.Module) -> Iterator[None]:
    """Inside, parameters that are all 0 are not: a branch that starts at 0 would hide a leak."""
    zeros = [p for p in model.parameters() if p.is_floating_point() and not bool(p.any())]
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in zeros:
                noise = torch.randn(p.shape, generator=draw, dtype=torch.float32, device="cpu")
                p.copy_(0.02 * noise)
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()
