"""Arrays with one entry a sample, and the records that are made of them."""

from __future__ import annotations

import copy
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def some(mask: Bools) -> bool:
    """``mask.any()``, which takes several times as long of a few samples."""
    return bool(np.count_nonzero(mask))


def every(mask: Bools) -> bool:
    """``mask.all()``, likewise."""
    return bool(np.count_nonzero(mask) == mask.size)


SamplesT = TypeVar("SamplesT", bound="Samples")


class Samples:
    """A record of samples: its NumPy arrays have an entry a sample, all else they share."""

    def take(self: SamplesT, index: Ints) -> SamplesT:
        """The record of some of the samples."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(part, name, value[index])
        return part
