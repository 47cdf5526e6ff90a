"""Augmentation of whole batches, with random numbers that a resumed run repeats."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Augmentation(Protocol):
    """What :mod:`bigkernel.transforms` are: images to images, drawn by (seed, sample id)."""

    def __call__(
        self,
        images: Any,
        generator: torch.Generator | None = None,
        ids: Any = None,
    ) -> Any: ...


class BatchAugmentation:
    """Calls an augmentation with the seed of the epoch and the ids of the samples.

    The seed of an epoch is a hash of the run's seed and the epoch's number, so a sample is
    augmented differently in every epoch and equally in every batch size, order and resumed run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.seen = 0

    def __call__(
        self,
        augmentation: Augmentation,
        images: Tensor | Sequence[Tensor],
        ids: Tensor | None,
        epoch: int | None,
    ) -> Tensor:
        """Augment a batch.

        Args:
            augmentation: what to apply.
            images: [N, C, H, W] or N images [C, H, W].
            ids: int64 [N]; without them, samples are numbered in the order they come.
            epoch: the epoch's number; None in evaluation, which has one seed for all time.

        Returns:
            float [N, C, H, W].

        Raises:
            TypeError: the augmentation cannot be called with those arguments.
            ValueError: the augmentation gives something else.
        """
        _check_arguments(augmentation)
        if ids is None:
            start = 0 if epoch is None else self.seen
            ids = torch.arange(start, start + len(images), dtype=torch.int64, device="cpu")
            # Numbers that go on from epoch to epoch are different draws already.
            epoch = None if epoch is None else 0
        if epoch is not None:
            self.seen += len(images)
        generator = torch.Generator().manual_seed(self.seed_of_epoch(epoch))
        out = augmentation(images, generator=generator, ids=ids)
        if not isinstance(out, Tensor):
            raise ValueError(
                "the augmentation must give one [N, C, H, W] tensor, got "
                f"{type(out).__name__}; end it with a crop or resize to one size."
            )
        if not out.is_floating_point():
            raise ValueError(
                f"the augmentation must give float images, got {out.dtype}; end it with "
                "Normalize, or ToDtype(torch.float32, scale=True)."
            )
        return out

    def seed_of_epoch(self, epoch: int | None) -> int:
        """The seed in [0, 2**63) that all batches of an epoch share."""
        name = f"{self.seed}:{'evaluation' if epoch is None else epoch}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs."""
        return {"seed": self.seed, "seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a :meth:`state_dict`."""
        self.seed, self.seen = int(state["seed"]), int(state["seen"])


def _check_arguments(augmentation: Any) -> None:
    """Raises if it cannot be called as ``augmentation(images, generator=..., ids=...)``."""
    is_module = isinstance(augmentation, torch.nn.Module)
    try:
        signature = inspect.signature(augmentation.forward if is_module else augmentation)
    except (TypeError, ValueError):  # some of those written in C
        return
    try:
        signature.bind(None, generator=None, ids=None)
    except TypeError as error:
        name = getattr(augmentation, "__name__", type(augmentation).__name__)
        raise TypeError(
            "the augmentation must take (images, generator=..., ids=...), got "
            f"{name} ({error}); put it into a chain: bigkernel.transforms.Compose([{name}, ...])."
        ) from None
