"""What a transform, with its parameters drawn, does to each image of a batch.

A step holds one entry a sample ([N] or [N, k] NumPy arrays) and what the whole batch shares. All
coordinates are pixel edges: pixel (0, 0) covers [0, 1) x [0, 1).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch

from bigkernel.transforms._arguments import InterpolationMode
from bigkernel.transforms._draws import Bools, Floats, Ints

StepT = TypeVar("StepT", bound="Step")


@dataclass
class Step:
    """``active`` [N]: the samples that the step touches."""

    active: Bools

    def take(self: StepT, index: Ints) -> StepT:
        """The step for some of the samples."""
        picked: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            picked[field.name] = value[index] if isinstance(value, np.ndarray) else value
        return type(self)(**picked)

    def sizes(self, height: Ints, width: Ints) -> tuple[Ints, Ints]:
        """The images' sizes after the step, from those before it."""
        return height, width


@dataclass
class Flip(Step):
    """Mirrors the active samples."""

    horizontal: bool


@dataclass
class Crop(Step):
    """Keeps a box that lies inside the image."""

    top: Ints
    left: Ints
    height: Ints
    width: Ints

    def sizes(self, height: Ints, width: Ints) -> tuple[Ints, Ints]:
        return np.where(self.active, self.height, height), np.where(self.active, self.width, width)


@dataclass
class Pad(Step):
    """Adds ``sides`` [N, 4] (left, top, right, bottom) pixels of ``fill`` or of the edge."""

    sides: Ints
    fill: tuple[float, ...] | None
    edge: bool

    def sizes(self, height: Ints, width: Ints) -> tuple[Ints, Ints]:
        grown_height = height + self.sides[:, 1] + self.sides[:, 3]
        grown_width = width + self.sides[:, 0] + self.sides[:, 2]
        return np.where(self.active, grown_height, height), np.where(
            self.active, grown_width, width
        )


@dataclass
class Affine(Step):
    """Output point (x, y) shows input point (m0 x + m1 y + m2, m3 x + m4 y + m5)."""

    matrix: Floats
    height: Ints
    width: Ints
    interpolation: InterpolationMode
    fill: tuple[float, ...] | None

    def sizes(self, height: Ints, width: Ints) -> tuple[Ints, Ints]:
        return np.where(self.active, self.height, height), np.where(self.active, self.width, width)


@dataclass
class Resize(Step):
    """Scales the whole image to a size."""

    height: Ints
    width: Ints
    interpolation: InterpolationMode
    antialias: bool

    def sizes(self, height: Ints, width: Ints) -> tuple[Ints, Ints]:
        return np.where(self.active, self.height, height), np.where(self.active, self.width, width)


@dataclass
class Color(Step):
    """``codes`` [N, k] (0 = nothing) with ``factors`` [N, k], in order."""

    codes: Ints
    factors: Floats


@dataclass
class Normalize(Step):
    """(value - mean) / std; a uint8 image is scaled to 0..1 before."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class ToDtype(Step):
    """Converts, with ``scale`` between 0..255 and 0..1."""

    dtype: torch.dtype
    scale: bool
