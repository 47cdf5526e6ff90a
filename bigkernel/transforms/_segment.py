"""One augment call in the making: steps are written into its table, as far as it can hold them.

The table (see ``bigkernel/ops/augment/op.py``) holds, in this order: one inverse affine map with a
source box and an output box; colour operations; one scale and normalisation; one conversion of
dtype. So a step fits when

- flips: always;
- crops: unless contrast came before (its mean is taken over the output);
- padding and warps: no colour before, and no other fill in use (bilinear warps: no normalisation);
- a warp after a warp: the first one's frame must be a box of whole source pixels (a crop, a
  padded crop, and, within half a pixel, a crop of a resized image), because what was outside the
  frame is fill. After a rotation it is none, so the next warp opens a segment;
- a resize: the image must have no padding yet, since resizing treats its edges in another way;
- colour: no normalisation before.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch

from bigkernel.errors import check
from bigkernel.ops.augment.reference import (
    CLAMP,
    CONTRAST,
    FILL_BLEND,
    FILL_OVER,
    NEAREST_EVEN,
    NEAREST_FLOOR,
    NEAREST_RESIZE,
    NEAREST_WARP,
    WHOLE_NUMBERS,
    bound,
)
from bigkernel.transforms import _steps as steps
from bigkernel.transforms._affine import (
    canvas_box,
    compose,
    identity,
    intersect,
    invert,
    is_whole_pixel_move,
    keeps_axes,
    map_box,
    scaling,
    snapped,
)
from bigkernel.transforms._arguments import InterpolationMode
from bigkernel.transforms._draws import Bools, Floats, Ints

_EPS = 1e-6  # pixels; far above float64 error at any image size, far below a visible shift
_STEP = 1 / 65536  # pixels; what nearest sampling rounds positions to, before it looks at ties
_PER_SAMPLE = (
    *("height", "width", "map", "source", "output", "straight", "border", "nearest", "nudge"),
    *("edge_padded", "fill", "filled", "colored", "contrasted"),
)


@dataclass
class Call:
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

    def take(self, index: Ints) -> Call:
        """The call for some of its samples."""
        part = copy.copy(self)
        for name in ("geometry", "color", "fill", "height", "width"):
            setattr(part, name, getattr(self, name)[index])
        return part


class Segment:
    """A call under construction for n samples: see the module's text."""

    def __init__(self, height: Ints, width: Ints, channels: int, dtype: torch.dtype) -> None:
        n = len(height)
        self.height, self.width = height, width
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
        self.codes: list[Ints] = []
        self.factors: list[Floats] = []
        self.colored = np.zeros(n, dtype=bool)
        self.contrasted = np.zeros(n, dtype=bool)
        self.scale = 1.0
        self.mean: Floats | None = None
        self.std: Floats | None = None
        self.own_range = True  # values run over the dtype's own range, 0..1 or 0..255
        self.rounded = False  # converted to uint8 from floats: clamped, too

    def fits(self, step: steps.Step) -> Bools:
        """[n]: the samples whose table can hold the step."""
        if isinstance(step, steps.Flip):
            ok = np.ones(len(self.height), dtype=bool)
        elif isinstance(step, steps.Crop):
            ok = ~self.contrasted | ((step.height == self.height) & (step.width == self.width))
        elif isinstance(step, steps.Pad):
            ok = self._pad_fits(step)
        elif isinstance(step, steps.Affine):
            ok = self._affine_fits(step)
        elif isinstance(step, steps.Resize):
            ok = self._resize_fits(step)
        elif isinstance(step, steps.Color):
            ok = np.full(
                len(self.height), self.mean is None and self.own_range and not self.rounded
            )
        else:
            ok = np.full(len(self.height), not self.rounded)
        return ok | ~step.active

    def add(self, step: steps.Step) -> None:
        """Writes a step that fits into the table."""
        if isinstance(step, steps.Flip):
            self._flip(step)
        elif isinstance(step, steps.Crop):
            self._move(step, np.stack([step.left, step.top], axis=1))
        elif isinstance(step, steps.Pad):
            self._pad(step)
        elif isinstance(step, steps.Affine):
            self._affine(step)
        elif isinstance(step, steps.Resize):
            self._resize(step)
        elif isinstance(step, steps.Color):
            self._color(step)
        elif isinstance(step, steps.Normalize):
            self._normalize(step)
        elif isinstance(step, steps.ToDtype):
            self._to_dtype(step)
        self.height, self.width = step.sizes(self.height, self.width)

    def close(self) -> Call:
        n = len(self.height)
        geometry = np.zeros((n, 16))
        geometry[:, 0:6] = self.map
        if not self.bilinear:
            geometry[:, [2, 5]] += self.nudge
        geometry[:, 6:10] = self.source
        geometry[:, 10:14] = self.output
        geometry[:, 14] = self.border
        geometry[:, 15] = self.nearest
        color = np.zeros((n, sum(c.shape[1] for c in self.codes), 2))
        if self.codes:
            color[:, :, 0] = np.concatenate(self.codes, axis=1)
            color[:, :, 1] = np.concatenate(self.factors, axis=1)
        return Call(
            geometry=geometry,
            color=color,
            fill=self.fill,
            height=self.height,
            width=self.width,
            mean=None if self.mean is None else tuple(self.mean.tolist()),
            std=None if self.std is None else tuple(self.std.tolist()),
            bilinear=self.bilinear,
            antialias=self.bilinear and self.antialias,
            in_scale=self.scale,
            dtype=self.dtype,
        )

    def successor(self) -> Segment:
        """The segment that takes this one's output as its images."""
        return Segment(self.height, self.width, self.channels, self.dtype)

    def take(self, index: Ints) -> Segment:
        """The segment for some of its samples."""
        part = copy.copy(self)
        for name in _PER_SAMPLE:
            setattr(part, name, getattr(self, name)[index])
        part.codes = [c[index] for c in self.codes]
        part.factors = [f[index] for f in self.factors]
        return part

    # Geometry

    def _flip(self, step: steps.Flip) -> None:
        low, high, size = (0, 2, self.width) if step.horizontal else (1, 3, self.height)
        mirror = identity(len(size))
        mirror[:, 0 if step.horizontal else 4] = -1.0
        mirror[:, 2 if step.horizontal else 5] = size
        self._precede(step.active, mirror, mirrors=True)
        flipped = self.output.copy()
        flipped[:, low], flipped[:, high] = size - self.output[:, high], size - self.output[:, low]
        self.output = np.where(step.active[:, None], flipped, self.output)

    def _pad_fits(self, step: steps.Pad) -> Bools:
        pads = (step.sides > 0).any(axis=1)
        if step.edge:
            whole = is_whole_pixel_move(self.map)
            fits = ~self.colored & whole & self._is_all_source() & ~self.edge_padded
        else:
            fits = ~self.colored & self._same_fill(step.fill)
        return np.asarray(fits | ~pads)

    def _pad(self, step: steps.Pad) -> None:
        pads = step.active & (step.sides > 0).any(axis=1)
        if step.edge:
            self.source = np.where(pads[:, None], self._frame(), self.source)
        else:
            self._use_fill(pads, step.fill)
        self._move(step, -step.sides[:, :2])
        if step.edge:
            canvas = canvas_box(*step.sizes(self.height, self.width))
            self.output = np.where(pads[:, None], canvas, self.output)
            self.edge_padded = self.edge_padded | pads

    def _affine_fits(self, step: steps.Affine) -> Bools:
        warps = self.straight & ~self.edge_padded & self._frame_is_whole() & (not self.rounded)
        if step.interpolation is InterpolationMode.BILINEAR:
            # torchvision's blend at the edge does not commute with subtracting a mean.
            warps &= step.fill is None or self.mean is None
        moves = is_whole_pixel_move(step.matrix)
        # The table knows torch's rule for nearest resizing along the axes alone.
        turns = moves & (np.abs(step.matrix[:, 0]) < 0.5) & (self.nearest == NEAREST_RESIZE)
        return np.asarray((moves | warps) & ~turns & ~self.colored & self._same_fill(step.fill))

    def _affine(self, step: steps.Affine) -> None:
        canvas = canvas_box(step.height, step.width)
        # A move by whole pixels keeps the frame, like a crop; a warp makes it the source box.
        moves = is_whole_pixel_move(step.matrix)
        moved = intersect(np.rint(map_box(invert(step.matrix), self.output)), canvas)
        exposes = ~(moves & (moved == canvas).all(axis=1))
        warps = step.active & ~moves
        # torchvision weighs the image twice by its coverage at the edge when it is given a fill.
        # On an edge that a padding made, the pixels next to it are fill, and it does not.
        blend = FILL_BLEND if step.fill is not None else FILL_OVER
        border = np.where(self._is_all_source(), blend, FILL_OVER)
        self._use_fill(step.active & exposes, step.fill)
        nearest = np.where(self._is_box_of_source(), NEAREST_WARP, NEAREST_EVEN)
        # In nearest warps even the noise of a cosine decides ties, as in torchvision's.
        smooth = step.interpolation is InterpolationMode.BILINEAR
        self.bilinear |= smooth
        matrix = snapped(step.matrix) if smooth else step.matrix
        self.source = np.where(warps[:, None], self._frame(), self.source)
        after = np.where(moves[:, None], moved.astype(np.int64), canvas)
        self.output = np.where(step.active[:, None], after, self.output)
        self.border = np.where(warps, border, self.border)
        self._precede(step.active, np.where(moves[:, None], np.rint(step.matrix), matrix))
        self.nearest = np.where(warps, nearest, self.nearest)

    def _resize_fits(self, step: steps.Resize) -> Bools:
        # A straight map goes on clamping at the source box, so that must be the image's frame.
        fits = self._is_whole_frame() & ~self.edge_padded & ~self.colored & (not self.rounded)
        fits &= ~self.straight | (self._is_all_source() & self._frame_is_whole())
        if step.interpolation is InterpolationMode.NEAREST:
            # torch's rule is lopsided: it has to run from the left and the top of the source.
            fits &= (self.map[:, 0] > 0) & (self.map[:, 4] > 0)
        return np.asarray(fits | ~self._changes(step))

    def _resize(self, step: steps.Resize) -> None:
        changes = self._changes(step)
        self.bilinear |= step.interpolation is InterpolationMode.BILINEAR
        self.antialias |= step.antialias and step.interpolation is InterpolationMode.BILINEAR
        straight = changes & self.straight
        self.source = np.where(straight[:, None], self._frame(), self.source)
        self.border = np.where(straight, CLAMP, self.border)
        lopsided = step.interpolation is InterpolationMode.NEAREST
        rule = NEAREST_RESIZE if lopsided else NEAREST_FLOOR
        self.nearest = np.where(changes, rule, self.nearest)
        if step.interpolation is InterpolationMode.NEAREST_EXACT:
            # A point on the edge of two pixels takes the right one of the image as it is now: of a
            # mirrored one, that is the left one in the source.
            mirrored = self.map[:, [0, 3]] + self.map[:, [1, 4]] < 0
            self.nudge = np.where(changes[:, None], np.where(mirrored, -_STEP, 0.0), self.nudge)
        self._precede(changes, scaling(self.width / step.width, self.height / step.height))
        canvas = canvas_box(step.height, step.width)
        self.output = np.where(changes[:, None], canvas, self.output)

    def _changes(self, step: steps.Resize) -> Bools:
        same = (step.height == self.height) & (step.width == self.width)
        return np.asarray(step.active & ~same)

    def _precede(self, active: Bools, matrix: Floats, mirrors: bool = False) -> None:
        """The map becomes: first ``matrix``, then what the map was."""
        if not mirrors:  # the rounding errors of a warp are tied to the middle of its own output
            moved = active & (matrix != identity(1)).any(axis=1) & (self.nearest == NEAREST_WARP)
            self.nearest = np.where(moved, NEAREST_EVEN, self.nearest)
        self.map = np.where(active[:, None], compose(self.map, matrix), self.map)
        self.straight = keeps_axes(self.map)

    def _move(self, step: steps.Crop | steps.Pad, corner: Ints) -> None:
        """The image becomes a window of the step's size whose corner was at ``corner`` (x, y)."""
        move = identity(len(corner))
        move[:, 2], move[:, 5] = corner[:, 0], corner[:, 1]
        self._precede(step.active, move)
        canvas = canvas_box(*step.sizes(self.height, self.width))
        kept = intersect(self.output - corner[:, [0, 1, 0, 1]], canvas).astype(np.int64)
        self.output = np.where(step.active[:, None], kept, self.output)

    def _shown(self) -> Floats:
        """[n, 4] the output box, in the source."""
        # Arrays are replaced, never changed: the same ones have the same box.
        known_map, known_output, box = self._known
        if known_map is not self.map or known_output is not self.output:
            box = map_box(self.map, self.output)
            self._known = self.map, self.output, box
        return box

    def _frame(self) -> Ints:
        """[n, 4] the source pixels that the image shows: the source box cut by the output box."""
        frame = intersect(np.rint(self._shown()), self.source)
        return frame.astype(np.int64)

    def _frame_is_whole(self) -> Bools:
        """[n] the frame's edges lie on whole source pixels, to half an image pixel at most."""
        exact = intersect(self._shown(), self.source)
        off = np.abs(exact - np.rint(exact)).reshape(-1, 2, 2).max(axis=1)  # [n, (x, y)]
        pixel = np.abs(self.map[:, [0, 3]]) + np.abs(self.map[:, [1, 4]])  # source per image pixel
        return np.asarray((off <= 0.5 * pixel + _EPS).all(axis=1))

    def _is_whole_frame(self) -> Bools:
        """[n] no padding or crop has cut the image's canvas."""
        return np.asarray((self.output == canvas_box(self.height, self.width)).all(axis=1))

    def _is_all_source(self) -> Bools:
        """[n] every pixel of the image shows source pixels: nothing of it is fill."""
        shown = self._shown()
        outside = np.abs(shown - intersect(shown, self.source)).max(axis=1)
        return np.asarray(self._is_whole_frame() & self.straight & (outside <= 0.5))

    def _is_box_of_source(self) -> Bools:
        """[n] the image is a box of source pixels, as they lie there."""
        upright = (self.map[:, 0] > 0) & (self.map[:, 4] > 0)
        return np.asarray(self._is_all_source() & upright & is_whole_pixel_move(self.map))

    # Fill, in the units of the call's input

    def _input_fill(self, fill: tuple[float, ...] | None) -> Floats:
        value = np.asarray((0.0,) if fill is None else fill, dtype=np.float64)
        _check_per_channel("fill", value.size, self.channels)
        value = np.broadcast_to(value, (self.channels,))
        if self.mean is not None and self.std is not None:
            value = value * self.std + self.mean
        return np.asarray(value / self.scale)

    def _same_fill(self, fill: tuple[float, ...] | None) -> Bools:
        return np.asarray(
            ~self.filled | (np.abs(self.fill - self._input_fill(fill)) < 1e-6).all(axis=1)
        )

    def _use_fill(self, active: Bools, fill: tuple[float, ...] | None) -> None:
        self.fill = np.where(active[:, None], self._input_fill(fill), self.fill)
        self.filled = self.filled | active

    # Values

    def _color(self, step: steps.Color) -> None:
        check(
            self.channels in (1, 3),
            "transforms",
            "images",
            "of 1 or 3 channels for colour transforms",
            f"{self.channels} channels",
        )
        codes = np.where(step.active[:, None], step.codes, 0)
        self.colored = self.colored | (codes != 0).any(axis=1)
        self.contrasted = self.contrasted | (codes == CONTRAST).any(axis=1)
        # torchvision rounds between the operations on whole numbers: so do these codes.
        whole = (codes != 0) & (not self.dtype.is_floating_point)
        self.codes.append(np.where(whole, codes + WHOLE_NUMBERS, codes))
        self.factors.append(step.factors)

    def _normalize(self, step: steps.Normalize) -> None:
        _check_per_channel("mean", len(step.mean), self.channels)
        _check_per_channel("std", len(step.std), self.channels)
        if not self.dtype.is_floating_point:
            self.scale /= bound(self.dtype)
            self.dtype = torch.float32
        mean = np.broadcast_to(np.asarray(step.mean, dtype=np.float64), (self.channels,))
        std = np.broadcast_to(np.asarray(step.std, dtype=np.float64), (self.channels,))
        if self.mean is not None and self.std is not None:
            mean, std = self.mean + self.std * mean, self.std * std
        self.mean, self.std = mean, std

    def _to_dtype(self, step: steps.ToDtype) -> None:
        before, after = self.dtype, step.dtype
        self.dtype = after
        if before == after or (before.is_floating_point and after.is_floating_point):
            return
        self.rounded = not after.is_floating_point
        if not step.scale:
            self.own_range = False
            return
        bits = _value_bits(after) - _value_bits(before)
        if before.is_floating_point or after.is_floating_point or torch.bool in (before, after):
            self._rescale(bound(after) / bound(before), 0.0)
        else:  # torchvision shifts bits: what is shifted out is cut off, not rounded
            self._rescale(2.0**bits, 0.5 - 2.0 ** (bits - 1) if bits < 0 else 0.0)

    def _rescale(self, factor: float, offset: float) -> None:
        """Values become factor x value - offset."""
        if self.std is None and offset == 0:
            self.scale *= factor
            return
        std = np.ones(self.channels) if self.std is None else self.std
        mean = np.zeros(self.channels) if self.mean is None else self.mean
        self.std = std / factor
        self.mean = mean + offset * self.std


def _value_bits(dtype: torch.dtype) -> int:
    """Bits of a whole number's value: without the sign."""
    if dtype.is_floating_point or dtype == torch.bool:
        return 1
    return torch.iinfo(dtype).bits - (1 if dtype.is_signed else 0)


def _check_per_channel(name: str, count: int, channels: int) -> None:
    wanted = f"one number or {channels}, one for each channel"
    check(count in (1, channels), "transforms", name, wanted, f"{count} numbers")
