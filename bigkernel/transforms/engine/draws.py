"""Random numbers keyed by (seed, sample id, transform): see :class:`Draws` and :class:`Key`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bigkernel.expect import Expect
from bigkernel.transforms.engine.samples import Floats, Ints

_EXPECT = Expect("transforms")
_Words = NDArray[np.uint64]
_MASK = 0xFFFFFFFF


class Key:
    """What the numbers of a call are keyed by: a seed, and an id for each of its samples.

    With ``ids`` the seed is the one that the generator (torch's default one if None) was made with;
    it is not advanced, so that the number of calls that a data set is cut into changes nothing.
    Without, samples are numbered from 0 and the seed is drawn from the generator, when it is first
    asked for: a call that draws nothing leaves the generator alone.
    """

    def __init__(self, generator: torch.Generator | None, ids: Any, count: int) -> None:
        if not (generator is None or isinstance(generator, torch.Generator)):
            wanted, got = "a torch.Generator or None", f"{generator!r:.80}"
            fix = "A call takes images alone: no label or target beside them"
            raise _EXPECT.error("generator", wanted, got, fix, TypeError)
        self.ids = np.arange(count) if ids is None else sample_ids(ids, count)
        self._given = ids is not None
        self._generator = generator

    @functools.cached_property
    def seed(self) -> int:
        if self._given:
            made_with = self._generator
            return torch.initial_seed() if made_with is None else int(made_with.initial_seed())
        device = "cpu" if self._generator is None else self._generator.device
        drawn = torch.empty((), dtype=torch.int64, device=device)
        return int(drawn.random_(generator=self._generator).item())


class Draws:
    """The uniform numbers of one call, for all transforms of a chain and all samples at once.

    Transform number t of the chain (depth first) owns ``counts[t]`` blocks of four numbers a
    sample. Block d of sample ``id`` is Philox4x32-10 (``bigkernel.random``) with the seed as key
    and the counter (d, t, id mod 2^32, id div 2^32); a word becomes a number in [0, 1) by its
    upper 24 bits. So a draw depends on nothing but seed, id, transform and d.
    """

    def __init__(self, key: Key, counts: Sequence[int]) -> None:
        self.key = key
        block, owner, self._starts = _layout(tuple(counts))
        words = self._words(block, owner, key.seed if len(block) else 0)
        self._numbers: Floats = (words >> np.uint64(8)).astype(np.float64) * 2.0**-24

    def _words(self, block: Ints, owner: Ints, seed: int) -> _Words:
        """[len(block), N, 4]."""
        ids = self.key.ids
        return _philox4x32(
            seed,
            block.astype(np.uint64)[:, None],
            owner.astype(np.uint64)[:, None],
            (ids & _MASK).astype(np.uint64)[None, :],
            ((ids >> 32) & _MASK).astype(np.uint64)[None, :],
        )

    def of(self, transform: int) -> Floats:
        """[blocks, N, 4] numbers in [0, 1) of one transform of the chain."""
        return self._numbers[self._starts[transform] : self._starts[transform + 1]]

    def seeds(self, transform: int) -> list[int]:
        """A seed for each sample, 64 bits: the first block of a transform that has none.

        For what draws from generators of its own, which are seeded with it.
        """
        words = self._words(np.asarray([0]), np.asarray([transform]), self.key.seed)[0]
        return [int(word) for word in (words[:, 0] << np.uint64(32)) | words[:, 1]]

    def seed(self, transform: int) -> int:
        """One for all samples, whatever their ids: for what is itself keyed by them."""
        counter = [np.full((1, 1), word, np.uint64) for word in (0, transform, _MASK, _MASK)]
        first, second = _philox4x32(self.key.seed, *counter)[0, 0, :2]
        return int((first << np.uint64(32)) | second)


@functools.lru_cache(maxsize=256)
def _layout(counts: tuple[int, ...]) -> tuple[Ints, Ints, Ints]:
    """Of all blocks of a chain: number within the transform, transform; where each one's begin."""
    blocks = np.concatenate([np.arange(c) for c in counts] or [np.arange(0)])
    numbers = np.asarray(counts, dtype=np.int64)
    found = blocks, np.repeat(np.arange(len(counts)), numbers), np.cumsum([0, *numbers])
    for array in found:
        array.flags.writeable = False
    return found


# What is added to the two halves of the seed before each of ten rounds.
_STEPS = np.arange(10, dtype=np.uint64)[:, None] * np.asarray([0x9E3779B9, 0xBB67AE85], np.uint64)
_STEPS_OF_ONE = [(int(first), int(second)) for first, second in _STEPS]
_MULTIPLIERS = np.asarray([0xD2511F53, 0xCD9E8D57], dtype=np.uint64).reshape(2, 1, 1)
_HIGH = 1 if sys.byteorder == "little" else 0


def _philox4x32(seed: int, c0: _Words, c1: _Words, c2: _Words, c3: _Words) -> _Words:
    """[..., 4] as ``bigkernel.random.philox4x32``, in NumPy, which is three times faster.

    A call's draws are a thousand words or so: the time is that of the number of operations. So the
    two halves of a round are computed as one array, and a product's own halves are read in place.
    """
    shape = (2, *np.broadcast(c0, c1, c2, c3).shape)
    even, odd = np.empty(shape, dtype=np.uint32), np.empty(shape, dtype=np.uint32)
    even[0], even[1], odd[0], odd[1] = c0, c2, c1, c3
    start = np.asarray([seed & _MASK, (seed >> 32) & _MASK], dtype=np.uint64)
    product = np.empty(shape, dtype=np.uint64)
    halves = product.view(np.uint32).reshape(*shape, 2)[::-1]
    low, high = halves[..., 1 - _HIGH], halves[..., _HIGH]
    for key in (start + _STEPS).astype(np.uint32)[:, :, None, None]:
        np.multiply(even, _MULTIPLIERS, out=product)
        even = high ^ odd
        even ^= key
        odd = low.copy()
    words = np.empty((*shape[1:], 4), dtype=np.uint64)
    words[..., 0], words[..., 1], words[..., 2], words[..., 3] = even[0], odd[0], even[1], odd[1]
    return words


def round_keys(seed: int) -> list[tuple[int, int]]:
    """What the ten rounds of `philox4x32_of_one` take of a seed."""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    return [((low + first) & _MASK, (high + second) & _MASK) for first, second in _STEPS_OF_ONE]


def philox4x32_of_one(
    rounds: list[tuple[int, int]], c0: int, c1: int, c2: int, c3: int
) -> tuple[int, int, int, int]:
    """`_philox4x32` of one counter, in plain numbers."""
    for first, second in rounds:
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ first, b & _MASK, (a >> 32) ^ c3 ^ second, a & _MASK
    return c0, c1, c2, c3


def integer(u: float, count: int) -> int:
    """`integers` of one number."""
    return min(int(u * count), count - 1)


def uniform(u: Floats, low: float | Floats, high: float | Floats) -> Floats:
    """Numbers in [low, high) from those in [0, 1)."""
    return low + (high - low) * u


def integers(u: Floats, count: Ints) -> Ints:
    """Whole numbers in [0, count), each as likely as the next to 2^-24 x count."""
    return np.minimum(np.floor(u * count).astype(np.int64), count - 1)


def sample_ids(ids: Any, count: int) -> Ints:
    """int64 [count] from a tensor, an array, a range, a list of ints, or one int."""
    if isinstance(ids, torch.Tensor):
        array = ids.detach().cpu().numpy()
    elif isinstance(ids, (set, frozenset)):
        wanted = "one whole number for each image, in the order of the images"
        raise _EXPECT.error("ids", wanted, "a set, which has none")
    elif isinstance(ids, Iterable):
        array = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids)
        if array.size == 0:
            array = array.astype(np.int64)
    else:
        array = np.asarray(ids)
    array = np.atleast_1d(array)
    _EXPECT(np.issubdtype(array.dtype, np.integer), "ids", "whole numbers", array.dtype)
    wanted = f"one number for each of the {count} images"
    _EXPECT(array.shape == (count,), "ids", wanted, f"shape {array.shape}")
    return np.ascontiguousarray(array.astype(np.int64))
