"""What a transform, with its parameters drawn, does to each image of a batch.

A step holds one entry a sample ([N] or [N, k] NumPy arrays) and what the whole batch shares. All
coordinates are pixel edges: pixel (0, 0) covers [0, 1) x [0, 1). A transform returns steps from its
``draw`` (:class:`bigkernel.transforms.Transform`); the chain folds them.

A step fits into the call before it when

- flips: always;
- crops: unless contrast came before (its mean is taken over the output);
- padding and warps: no colour before, and no other fill in use (bilinear warps: no normalisation);
- a warp after a warp: the first one's frame must be a box of whole source pixels (a crop, a
  padded crop, and, within half a pixel, a crop of a resized image), because what was outside the
  frame is fill. After a rotation it is none, so the next warp needs another call;
- a resize: the image must have no padding yet, since resizing treats its edges in another way;
- colour: no normalisation before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from bigkernel.expect import Expect
from bigkernel.ops.augment.reference import OUT_DTYPES, bound
from bigkernel.ops.augment.table import (
    BRIGHTNESS,
    CLAMP,
    CONTRAST,
    FILL_BLEND,
    FILL_OVER,
    GREYSCALE,
    HUE,
    NEAREST_EVEN,
    NEAREST_FLOOR,
    NEAREST_RESIZE,
    NEAREST_WARP,
    SATURATION,
)
from bigkernel.transforms import arguments
from bigkernel.transforms.arguments import InterpolationMode
from bigkernel.transforms.engine.affine import (
    canvas_box,
    identity,
    intersect,
    invert,
    is_whole_pixel_move,
    map_box,
    scaling,
    snapped,
)
from bigkernel.transforms.engine.images import BYTE_MODES, INDEXED_MODES
from bigkernel.transforms.engine.samples import Bools, Floats, Ints, every, some
from bigkernel.transforms.engine.step import INT, Entry, Step
from bigkernel.transforms.engine.table import Table

__all__ = [
    "BRIGHTNESS",
    "CONTRAST",
    "GREYSCALE",
    "HUE",
    "SATURATION",
    "Affine",
    "Color",
    "Crop",
    "Flip",
    "Normalize",
    "Pad",
    "Resize",
    "Step",
    "ToDtype",
]

_AFFINE, _COLOR, _NORMALIZE = (
    Expect(f"transforms.steps.{name}") for name in ("Affine", "Color", "Normalize")
)
_STEP = 1 / 65536  # pixels; what nearest sampling rounds positions to, before it looks at ties


def _interpolation(step: Affine | Resize) -> InterpolationMode:
    given = step.interpolation
    if isinstance(given, InterpolationMode):
        return given
    return arguments.interpolation_mode(step._expect, given)


def _fill(step: Affine | Pad) -> tuple[float, ...] | None:
    given = step.fill
    if given is None or isinstance(given, tuple):
        return given
    return arguments.fill_values(step._expect, given)


@dataclass
class Flip(Step):
    """Mirrors the active samples, left to right if ``horizontal``, else top to bottom."""

    horizontal: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.horizontal
        fits = isinstance(given, (bool, np.bool_))
        fix = "Flips of some images each way are two steps"
        self._expect(fits, "horizontal", "True or False, for all images", f"{given!r:.80}", fix)

    def fits(self, table: Table) -> Bools:
        return np.ones(len(self.active), dtype=bool)

    def write(self, table: Table) -> None:
        low, high, size = (0, 2, table.width) if self.horizontal else (1, 3, table.height)
        mirror = identity(len(size))
        mirror[:, 0 if self.horizontal else 4] = -1.0
        mirror[:, 2 if self.horizontal else 5] = size
        table.precede(self.active, mirror, mirrors=True)
        flipped = table.output.copy()
        flipped[:, low] = size - table.output[:, high]
        flipped[:, high] = size - table.output[:, low]
        table.output = np.where(self.active[:, None], flipped, table.output)


@dataclass
class Crop(Step):
    """Keeps the box [N] of pixels, which must lie inside the image."""

    top: Ints
    left: Ints
    height: Ints
    width: Ints
    arrays: ClassVar[Mapping[str, Entry]] = {"top": INT, "left": INT, "height": INT, "width": INT}

    def check(self, height: Ints, width: Ints) -> None:
        bottom, right = self.top + self.height, self.left + self.width
        outside = (self.top < 0) | (self.left < 0) | (bottom > height) | (right > width)
        outside &= self.active
        if not some(outside):
            return
        i = int(np.flatnonzero(outside)[0])
        box = tuple(int(side[i]) for side in (self.top, self.left, self.height, self.width))
        which = "the box (top, left, height, width)"
        wanted = f"inside the image of {(int(height[i]), int(width[i]))} (height, width)"
        got, fix = f"{box} for image {i}", "Put a steps.Pad before it"
        raise Expect("transforms.steps.Crop").error(which, wanted, got, fix)

    def sizes(self, height: Ints, width: Ints) -> tuple[Ints, Ints]:
        return np.where(self.active, self.height, height), np.where(self.active, self.width, width)

    def begins(self, after: Step, table: Table) -> bool:
        """A random resized crop, with which many chains begin: half of what folding takes."""
        if type(self) is not Crop or type(after) is not Resize:
            return False  # a subclass may write something else
        if after.interpolation is not InterpolationMode.BILINEAR:
            return False
        resized = (after.height != self.height) | (after.width != self.width)
        if not every(self.active & after.active & resized):
            return False
        rows = np.zeros((len(self.top), 6))
        rows[:, 0], rows[:, 4] = self.width / after.width, self.height / after.height
        rows[:, 2], rows[:, 5] = self.left, self.top
        box = np.empty((len(rows), 4), np.int64)
        box[:, 0], box[:, 1], box[:, 2], box[:, 3] = (
            self.left,
            self.top,
            self.left + self.width,
            self.top + self.height,
        )
        table.map, table.source, table.output = rows, box, canvas_box(after.height, after.width)
        table.nearest = np.full(len(rows), NEAREST_FLOOR)
        table.bilinear, table.antialias = True, after.antialias
        table.height, table.width = after.height, after.width
        return True

    def fits(self, table: Table) -> Bools:
        whole = (self.height == table.height) & (self.width == table.width)
        return np.asarray(~table.contrasted | whole)

    def write(self, table: Table) -> None:
        corner = np.stack([self.left, self.top], axis=1)
        table.move(self.active, corner, self.height, self.width)


@dataclass
class Pad(Step):
    """Adds ``sides`` [N, 4] (left, top, right, bottom) pixels, from 0 on.

    They are of ``fill`` (a number, one a channel, or None: black), or, with ``edge``, copies of the
    outermost pixels.
    """

    sides: Ints
    fill: tuple[float, ...] | None
    edge: bool = False
    arrays: ClassVar[Mapping[str, Entry]] = {"sides": (np.dtype(np.int64), (4,))}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fill = _fill(self)

    def check(self, height: Ints, width: Ints) -> None:
        if (self.sides < 0).any():
            least, how = self.sides.min(), "Cut pixels off with steps.Crop"
            raise Expect("transforms.steps.Pad").error("sides", "0 or more", least, how)

    def sizes(self, height: Ints, width: Ints) -> tuple[Ints, Ints]:
        grown_height, grown_width = self._grown(height, width)
        return np.where(self.active, grown_height, height), np.where(
            self.active, grown_width, width
        )

    def _grown(self, height: Ints, width: Ints) -> tuple[Ints, Ints]:
        sides = self.sides
        return height + sides[:, 1] + sides[:, 3], width + sides[:, 0] + sides[:, 2]

    def fits(self, table: Table) -> Bools:
        pads = (self.sides > 0).any(axis=1)
        if self.edge:
            whole = is_whole_pixel_move(table.map)
            fits = ~table.colored & whole & table.is_all_source() & ~table.edge_padded
        else:
            fits = ~table.colored & table.same_fill(self.fill)
        return np.asarray(fits | ~pads)

    def write(self, table: Table) -> None:
        pads = self.active & (self.sides > 0).any(axis=1)
        if self.edge:
            table.source = np.where(pads[:, None], table.frame(), table.source)
        else:
            table.use_fill(pads, self.fill)
        height, width = self._grown(table.height, table.width)
        table.move(self.active, -self.sides[:, :2], height, width)
        if self.edge:
            table.output = np.where(pads[:, None], canvas_box(height, width), table.output)
            table.edge_padded = table.edge_padded | pads


@dataclass
class Affine(Step):
    """Output point (x, y) shows input point (m0 x + m1 y + m2, m3 x + m4 y + m5).

    ``matrix`` [N, 6] are those six numbers, ``height`` and ``width`` [N] the output's size. What
    comes from outside the image is ``fill`` (a number, one a channel, or None: black).
    ``interpolation`` is "nearest" or "bilinear".
    """

    matrix: Floats
    height: Ints
    width: Ints
    interpolation: InterpolationMode
    fill: tuple[float, ...] | None
    arrays: ClassVar[Mapping[str, Entry]] = {
        "matrix": (np.dtype(np.float64), (6,)),
        "height": INT,
        "width": INT,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.interpolation = _interpolation(self)
        self.fill = _fill(self)

    def check(self, height: Ints, width: Ints) -> None:
        a, b, _, d, e, _ = self.matrix.T
        with np.errstate(over="ignore", invalid="ignore"):
            det = a * e - b * d
        fits = np.isfinite(self.matrix).all() and np.isfinite(det).all() and (det != 0).all()
        _AFFINE(fits, "matrix", "finite and invertible", "one that is not")

    def sizes(self, height: Ints, width: Ints) -> tuple[Ints, Ints]:
        return np.where(self.active, self.height, height), np.where(self.active, self.width, width)

    def of_pictures(self, modes: frozenset[str]) -> Step:
        if modes & INDEXED_MODES:
            return replace(self, interpolation=InterpolationMode.NEAREST)
        return self

    def fits(self, table: Table) -> Bools:
        warps = table.straight & ~table.edge_padded & table.frame_is_whole() & (not table.rounded)
        if self.interpolation is InterpolationMode.BILINEAR:
            # torchvision's blend at the edge does not commute with subtracting a mean.
            warps &= self.fill is None or table.mean is None
        moves = is_whole_pixel_move(self.matrix)
        # The table knows torch's rule for nearest resizing along the axes alone.
        turns = moves & (np.abs(self.matrix[:, 0]) < 0.5) & (table.nearest == NEAREST_RESIZE)
        fits = (moves | warps) & ~turns & ~table.colored & table.same_fill(self.fill)
        return np.asarray(fits)

    def write(self, table: Table) -> None:
        canvas = canvas_box(self.height, self.width)
        # A move by whole pixels keeps the frame, like a crop; a warp makes it the source box.
        moves = is_whole_pixel_move(self.matrix)
        moved = intersect(np.rint(map_box(invert(self.matrix), table.output)), canvas)
        exposes = ~(moves & (moved == canvas).all(axis=1))
        warps = self.active & ~moves
        # torchvision weighs the image twice by its coverage at the edge when it is given a fill.
        # On an edge that a padding made, the pixels next to it are fill, and it does not.
        blend = FILL_BLEND if self.fill is not None else FILL_OVER
        border = np.where(table.is_all_source(), blend, FILL_OVER)
        table.use_fill(self.active & exposes, self.fill)
        nearest = np.where(table.is_box_of_source(), NEAREST_WARP, NEAREST_EVEN)
        # In nearest warps even the noise of a cosine decides ties, as in torchvision's.
        smooth = self.interpolation is InterpolationMode.BILINEAR
        table.bilinear |= smooth
        matrix = snapped(self.matrix) if smooth else self.matrix
        table.source = np.where(warps[:, None], table.frame(), table.source)
        after = np.where(moves[:, None], moved.astype(np.int64), canvas)
        table.output = np.where(self.active[:, None], after, table.output)
        table.border = np.where(warps, border, table.border)
        table.precede(self.active, np.where(moves[:, None], np.rint(self.matrix), matrix))
        table.nearest = np.where(warps, nearest, table.nearest)


@dataclass
class Resize(Step):
    """Scales the whole image to a size [N].

    ``interpolation`` is "nearest", "nearest-exact" or "bilinear", which, with ``antialias``, widens
    its filter where the image shrinks.
    """

    height: Ints
    width: Ints
    interpolation: InterpolationMode
    antialias: bool
    arrays: ClassVar[Mapping[str, Entry]] = {"height": INT, "width": INT}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.interpolation = _interpolation(self)

    def sizes(self, height: Ints, width: Ints) -> tuple[Ints, Ints]:
        return np.where(self.active, self.height, height), np.where(self.active, self.width, width)

    def of_pictures(self, modes: frozenset[str]) -> Step:
        if modes & INDEXED_MODES:
            return replace(self, interpolation=InterpolationMode.NEAREST_EXACT)
        return self

    def _changes(self, table: Table) -> Bools:
        same = (self.height == table.height) & (self.width == table.width)
        return np.asarray(self.active & ~same)

    def fits(self, table: Table) -> Bools:
        # A straight map goes on clamping at the source box, so that must be the image's frame.
        fits = table.is_whole_frame() & ~table.edge_padded & ~table.colored & (not table.rounded)
        fits &= ~table.straight | (table.is_all_source() & table.frame_is_whole())
        if self.interpolation is InterpolationMode.NEAREST:
            # torch's rule is lopsided: it has to run from the left and the top of the source.
            fits &= (table.map[:, 0] > 0) & (table.map[:, 4] > 0)
        return np.asarray(fits | ~self._changes(table))

    def write(self, table: Table) -> None:
        changes = self._changes(table)
        table.bilinear |= self.interpolation is InterpolationMode.BILINEAR
        table.antialias |= self.antialias and self.interpolation is InterpolationMode.BILINEAR
        straight = changes & table.straight
        table.source = np.where(straight[:, None], table.frame(), table.source)
        table.border = np.where(straight, CLAMP, table.border)
        lopsided = self.interpolation is InterpolationMode.NEAREST
        rule = NEAREST_RESIZE if lopsided else NEAREST_FLOOR
        table.nearest = np.where(changes, rule, table.nearest)
        if self.interpolation is InterpolationMode.NEAREST_EXACT:
            # A point on the edge of two pixels takes the right one of the image as it is now: of a
            # mirrored one, that is the left one in the source.
            mirrored = table.map[:, [0, 3]] + table.map[:, [1, 4]] < 0
            nudge = np.where(mirrored, -_STEP, 0.0)
            table.nudge = np.where(changes[:, None], nudge, table.nudge)
        table.precede(changes, scaling(table.width / self.width, table.height / self.height))
        canvas = canvas_box(self.height, self.width)
        table.output = np.where(changes[:, None], canvas, table.output)


@dataclass
class Color(Step):
    """Colour operations in order: ``codes`` [N, k] with ``factors`` [N, k].

    A code is ``BRIGHTNESS``, ``CONTRAST``, ``SATURATION``, ``HUE`` (the factor in turns) or
    ``GREYSCALE`` (without a factor) of this module, with the factors of torchvision's ``adjust_*``,
    or 0, which does nothing.
    """

    codes: Ints
    factors: Floats
    arrays: ClassVar[Mapping[str, Entry]] = {
        "codes": (np.dtype(np.int64), (-1,)),
        "factors": (np.dtype(np.float64), (-1,)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        codes, factors = list(self.codes.shape), list(self.factors.shape)
        _COLOR(codes == factors, "factors", f"of shape {codes}, as codes", f"shape {factors}")
        if ((self.codes < 0) | (self.codes > GREYSCALE)).any():
            wanted = "BRIGHTNESS, CONTRAST, SATURATION, HUE, GREYSCALE or 0"
            got = sorted(set(self.codes.ravel().tolist()))
            raise _COLOR.error("codes", wanted, got)
        # torchvision's bounds; also false of what is not a number.
        plain, hue = self.codes <= SATURATION, self.codes == HUE
        fits = (plain & (self.factors >= 0) & (self.factors < np.inf)) | (
            hue & (np.abs(self.factors) <= 0.5)
        )
        fits |= (self.codes == 0) | (self.codes == GREYSCALE) | ~self.active[:, None]
        if not fits.all():
            wanted = "finite and 0 or more, and of HUE between -0.5 and 0.5"
            raise _COLOR.error("factors", wanted, float(self.factors[~fits][0]))

    def of_pictures(self, modes: frozenset[str]) -> Step:
        if self.active.any() and not modes <= BYTE_MODES:
            wanted = f"PIL images of mode {', '.join(sorted(BYTE_MODES))} for colour transforms"
            got = f"mode {', '.join(sorted(modes - BYTE_MODES))}"
            fix = 'Convert with image.convert("RGB")'
            raise Expect("transforms").error("images", wanted, got, fix)
        return self

    def fits(self, table: Table) -> Bools:
        fits = table.mean is None and table.own_range and not table.rounded
        return np.full(len(self.active), fits)

    def write(self, table: Table) -> None:
        table.recolor(np.where(self.active[:, None], self.codes, 0), self.factors)


@dataclass
class Normalize(Step):
    """(value - mean) / std, a number or one a channel; a uint8 image is scaled to 0..1 before."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shared: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (type(self.mean) is tuple and type(self.std) is tuple):
            self.mean = arguments.channel_values(_NORMALIZE, "mean", self.mean)
            self.std = arguments.channel_values(_NORMALIZE, "std", self.std)
        _NORMALIZE(0.0 not in self.std, "std", "without a zero", self.std)
        for name, values in (("mean", self.mean), ("std", self.std)):
            _NORMALIZE(all(map(math.isfinite, values)), name, "finite", values)

    def fits(self, table: Table) -> Bools:
        return np.full(len(self.active), not table.rounded)

    def write(self, table: Table) -> None:
        table.normalize(self.mean, self.std)


@dataclass
class ToDtype(Step):
    """Converts, with ``scale`` between 0..255 and 0..1."""

    dtype: torch.dtype
    scale: bool
    shared: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = "a floating-point, whole-number or bool dtype of torch's"
        if self.dtype not in OUT_DTYPES:
            raise self._expect.error("dtype", wanted, f"{self.dtype!r:.80}", cls=TypeError)

    def fits(self, table: Table) -> Bools:
        return np.full(len(self.active), not table.rounded)

    def write(self, table: Table) -> None:
        before, after = table.dtype, self.dtype
        table.dtype = after
        if before == after or (before.is_floating_point and after.is_floating_point):
            return
        table.rounded = not after.is_floating_point
        if not self.scale:
            table.own_range = False
            return
        bits = _value_bits(after) - _value_bits(before)
        if before.is_floating_point or after.is_floating_point or torch.bool in (before, after):
            table.rescale(bound(after) / bound(before), 0.0)
        else:  # torchvision shifts bits: what is shifted out is cut off, not rounded
            table.rescale(2.0**bits, 0.5 - 2.0 ** (bits - 1) if bits < 0 else 0.0)


def _value_bits(dtype: torch.dtype) -> int:
    """Bits of a whole number's value: without the sign."""
    if dtype.is_floating_point or dtype == torch.bool:
        return 1
    return torch.iinfo(dtype).bits - (1 if dtype.is_signed else 0)
