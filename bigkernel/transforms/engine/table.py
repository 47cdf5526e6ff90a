"""One augment call in the making: steps write themselves into its table, as far as it holds them.

The table (see ``bigkernel/ops/augment/table.py``) holds, in this order: one inverse affine map with
a source box and an output box; colour operations; one scale and normalisation; one conversion of
dtype. A step (``bigkernel/transforms/steps.py``) says for which samples it fits, and writes itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bigkernel.expect import Expect
from bigkernel.ops.augment import table as columns
from bigkernel.ops.augment.reference import bound
from bigkernel.ops.augment.table import (
    CLAMP,
    CONTRAST,
    NEAREST_EVEN,
    NEAREST_FLOOR,
    NEAREST_WARP,
    WHOLE_NUMBERS,
)
from bigkernel.transforms.engine.affine import (
    canvas_box,
    compose,
    identity,
    intersect,
    is_whole_pixel_move,
    keeps_axes,
    map_box,
)
from bigkernel.transforms.engine.samples import Bools, Floats, Ints, Samples, some

_EXPECT = Expect("transforms")
_EPS = 1e-6  # pixels; far above float64 error at any image size, far below a visible shift
Fill = tuple[float, ...] | None


@dataclass
class Call(Samples):
    """The arguments of one augment call for a group of samples, but for the images."""

    geometry: Floats  # [n, 16]
    color: Floats  # [n, K, 2]
    fill: Floats  # [n, C], in the units of the call's input
    height: Ints  # [n]
    width: Ints  # [n]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    bilinear: bool
    antialias: bool
    in_scale: float
    dtype: torch.dtype


class Table(Samples):
    """A call under construction for n samples: see the module's text."""

    def __init__(self, height: Ints, width: Ints, channels: int, dtype: torch.dtype) -> None:
        n = len(height)
        self.height, self.width = height, width  # of the images so far
        self.channels, self.dtype = channels, dtype
        self.map = identity(n)
        self.source = canvas_box(height, width)
        self.output = canvas_box(height, width)
        self._known = self.map, self.output, self.output.astype(np.float64)  # see _shown
        self.straight = np.ones(n, dtype=bool)  # the map keeps the axes (or swaps them)
        self.border = np.full(n, CLAMP)
        self.nearest = np.full(n, NEAREST_FLOOR)
        self.nudge = np.zeros((n, 2))  # what decides between two pixels that are equally near
        self.edge_padded = np.zeros(n, dtype=bool)
        self.fill = np.zeros((n, channels))
        self.filled = np.zeros(n, dtype=bool)
        self.bilinear = self.antialias = False
        self.color = np.zeros((n, 0, 2))
        self.colored = np.zeros(n, dtype=bool)
        self.contrasted = np.zeros(n, dtype=bool)
        self.scale = 1.0
        self.mean: tuple[float, ...] | None = None
        self.std: tuple[float, ...] | None = None
        self.own_range = True  # values run over the dtype's own range, 0..1 or 0..255
        self.rounded = False  # converted to uint8 from floats: clamped, too

    def close(self) -> Call:
        geometry = np.zeros((len(self.height), columns.COLUMNS))
        geometry[:, columns.MAP] = self.map
        if not self.bilinear:
            geometry[:, [2, 5]] += self.nudge
        geometry[:, columns.SOURCE] = self.source
        geometry[:, columns.OUTPUT] = self.output
        geometry[:, columns.BORDER] = self.border
        geometry[:, columns.NEAREST] = self.nearest
        return Call(
            geometry=geometry,
            color=self.color,
            fill=self.fill,
            height=self.height,
            width=self.width,
            mean=self.mean,
            std=self.std,
            bilinear=self.bilinear,
            antialias=self.bilinear and self.antialias,
            in_scale=self.scale,
            dtype=self.dtype,
        )

    def successor(self) -> Table:
        """The table that takes this one's output as its images."""
        return Table(self.height, self.width, self.channels, self.dtype)

    # Geometry

    def precede(self, active: Bools, matrix: Floats, mirrors: bool = False) -> None:
        """The map becomes: first ``matrix``, then what the map was."""
        warped = self.nearest == NEAREST_WARP
        # The rounding errors of a warp are tied to the middle of its own output.
        if not mirrors and some(warped):
            moved = active & (matrix != identity(1)).any(axis=1) & warped
            self.nearest = np.where(moved, NEAREST_EVEN, self.nearest)
        self.map = np.where(active[:, None], compose(self.map, matrix), self.map)
        self.straight = keeps_axes(self.map)

    def move(self, active: Bools, corner: Ints, height: Ints, width: Ints) -> None:
        """The image becomes a window of this size whose corner was at ``corner`` (x, y)."""
        move = identity(len(corner))
        move[:, 2], move[:, 5] = corner[:, 0], corner[:, 1]
        self.precede(active, move)
        kept = intersect(self.output - corner[:, [0, 1, 0, 1]], canvas_box(height, width))
        self.output = np.where(active[:, None], kept.astype(np.int64), self.output)

    def _shown(self) -> Floats:
        """[n, 4] the output box, in the source."""
        # Arrays are replaced, never changed: the same ones have the same box.
        known_map, known_output, box = self._known
        if known_map is not self.map or known_output is not self.output:
            box = map_box(self.map, self.output)
            self._known = self.map, self.output, box
        return box

    def frame(self) -> Ints:
        """[n, 4] the source pixels that the image shows: the source box cut by the output box."""
        frame = intersect(np.rint(self._shown()), self.source)
        return frame.astype(np.int64)

    def frame_is_whole(self) -> Bools:
        """[n] the frame's edges lie on whole source pixels, to half an image pixel at most."""
        exact = intersect(self._shown(), self.source)
        off = np.abs(exact - np.rint(exact)).reshape(-1, 2, 2).max(axis=1)  # [n, (x, y)]
        pixel = np.abs(self.map[:, [0, 3]]) + np.abs(self.map[:, [1, 4]])  # source per image pixel
        return np.asarray((off <= 0.5 * pixel + _EPS).all(axis=1))

    def is_whole_frame(self) -> Bools:
        """[n] no padding or crop has cut the image's canvas."""
        return np.asarray((self.output == canvas_box(self.height, self.width)).all(axis=1))

    def is_all_source(self) -> Bools:
        """[n] every pixel of the image shows source pixels: nothing of it is fill."""
        shown = self._shown()
        outside = np.abs(shown - intersect(shown, self.source)).max(axis=1)
        return np.asarray(self.is_whole_frame() & self.straight & (outside <= 0.5))

    def is_box_of_source(self) -> Bools:
        """[n] the image is a box of source pixels, as they lie there."""
        upright = (self.map[:, 0] > 0) & (self.map[:, 4] > 0)
        return np.asarray(self.is_all_source() & upright & is_whole_pixel_move(self.map))

    # Fill, in the units of the call's input

    def _input_fill(self, fill: Fill) -> Floats:
        value = np.asarray((0.0,) if fill is None else fill, dtype=np.float64)
        self.check_per_channel("fill", value.size)
        value = np.broadcast_to(value, (self.channels,))
        if self.mean is not None and self.std is not None:
            value = value * np.asarray(self.std) + np.asarray(self.mean)
        return np.asarray(value / self.scale)

    def same_fill(self, fill: Fill) -> Bools:
        """[n] the call holds no other fill than this one."""
        return np.asarray(
            ~self.filled | (np.abs(self.fill - self._input_fill(fill)) < 1e-6).all(axis=1)
        )

    def use_fill(self, active: Bools, fill: Fill) -> None:
        self.fill = np.where(active[:, None], self._input_fill(fill), self.fill)
        self.filled = self.filled | active

    # Values

    def recolor(self, codes: Ints, factors: Floats) -> None:
        """Appends colour operations, [n, k] codes (0: none) with their factors."""
        wanted = "of 1 or 3 channels for colour transforms"
        _EXPECT(self.channels in (1, 3), "images", wanted, f"{self.channels} channels")
        self.colored = self.colored | (codes != 0).any(axis=1)
        self.contrasted = self.contrasted | (codes == CONTRAST).any(axis=1)
        # torchvision rounds between the operations on whole numbers: so do these codes.
        whole = (codes != 0) & (not self.dtype.is_floating_point)
        added = np.empty((*codes.shape, 2))
        added[:, :, 0] = np.where(whole, codes + WHOLE_NUMBERS, codes)
        added[:, :, 1] = factors
        self.color = np.concatenate([self.color, added], axis=1)

    def normalize(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Values become (value - mean) / std."""
        self.check_per_channel("mean", len(mean))
        self.check_per_channel("std", len(std))
        if not self.dtype.is_floating_point:
            self.scale /= bound(self.dtype)
            self.dtype = torch.float32
        shift = np.broadcast_to(np.asarray(mean, dtype=np.float64), (self.channels,))
        factor = np.broadcast_to(np.asarray(std, dtype=np.float64), (self.channels,))
        if self.mean is not None and self.std is not None:
            before = np.asarray(self.std)
            shift, factor = np.asarray(self.mean) + before * shift, before * factor
        self.mean, self.std = tuple(shift.tolist()), tuple(factor.tolist())

    def rescale(self, factor: float, offset: float) -> None:
        """Values become factor x value - offset."""
        if self.std is None and offset == 0:
            self.scale *= factor
            return
        std = np.ones(self.channels) if self.std is None else np.asarray(self.std)
        mean = np.zeros(self.channels) if self.mean is None else np.asarray(self.mean)
        std, mean = std / factor, mean + offset * (std / factor)
        self.mean, self.std = tuple(mean.tolist()), tuple(std.tolist())

    def check_per_channel(self, name: str, count: int) -> None:
        wanted = f"one number or {self.channels}, one for each channel"
        _EXPECT(count in (1, self.channels), name, wanted, f"{count} numbers")
