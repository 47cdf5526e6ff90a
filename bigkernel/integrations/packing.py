"""Whether a model keeps packed documents apart: found out by trying, before anything is trained.

How documents are kept apart is up to each model: some read offsets, some look for them in the
positions, some do neither and let them see each other without a word. So one short document is put
between two others, and the loss of it alone is differentiated by what goes into the model:

- a token of another document with a gradient that is not exactly 0 is seen. That is no matter of
  rounding, as what a mask hides has the weight 0;
- the gradients of the document's own tokens are those that it has by itself, or its positions are
  not those that it has by itself. These differ by rounding, and the numbers that models count
  positions from are tried out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigkernel.data.collators import PackingCollator

# Tokens before the document, in it, and after it.
_LENGTHS = 33, 8, 5


class PackingError(ValueError):
    """A model that cannot be trained on packed documents; the message names it and says why."""


class Packing(NamedTuple):
    """How documents are packed for a model; as in :class:`bigkernel.data.PackingCollator`."""

    shifted: bool
    first_position: int


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
        raise _refused(model, "an encoder and a decoder read a sequence each, and packing lays one")
    embedding = _embedding(model)
    if embedding is None:
        raise _refused(model, "it has no embedding of tokens")
    probe = _Probe(embedding, loss)
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
        return probe({n: x.to(device) if isinstance(x, Tensor) else x for n, x in batch.items()})

    try:
        with _evaluated(model), _without_zeros(model):
            # A loss that is shifted compares the first label with what comes before.
            shifted = _seen(gradients(0, here), here)
            labelled = slice(here.start + 1, here.stop) if shifted else here
            labels = torch.full((1, length), 1)
            labels[0, : int(shifted)] = -100
            alone = {"input_ids": documents[1][None], "labels": labels}
            expected = probe({name: x.to(device) for name, x in alone.items()})
            found = {first: gradients(first, labelled) for first in starts}
    except Exception as error:  # of as many kinds as there are models
        reason = " ".join(str(error).split())[:300]
        what = "it cannot compute a loss of packed token ids with a label each"
        raise _refused(model, f"{what} ({type(error).__name__}: {reason})") from error
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


def _embedding(model: nn.Module) -> Any:
    try:
        found: Any = model.get_input_embeddings()  # type: ignore[operator]
        if isinstance(found.weight, Tensor):
            return found
    except (AttributeError, NotImplementedError):
        pass  # no model of transformers, or one that has no single embedding
    return next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)


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
    """Gradients of a loss by what goes into a model's first layer: [T, H] for [1, T] tokens."""

    def __init__(self, embedding: nn.Module, loss: Callable[[dict[str, Any]], Tensor]) -> None:
        self.embedding, self.loss = embedding, loss

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        made: list[Tensor] = []

        def note(module: nn.Module, arguments: Any, out: Tensor) -> Tensor:
            made.append(out.detach().requires_grad_())
            return made[-1]

        shape = batch["input_ids"].shape
        handle = self.embedding.register_forward_hook(note)
        try:
            with torch.enable_grad():
                value = self.loss(batch)
                (gradient,) = torch.autograd.grad(value, made)
        finally:
            handle.remove()
        if gradient.shape[:-1] != shape:
            raise ValueError(f"tokens {tuple(shape)} are embedded as {tuple(gradient.shape)}")
        if not bool(gradient.isfinite().all()) or not bool(gradient.any()):
            raise ValueError("the loss is not finite, or no token counts in it")
        return gradient[0]


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
