"""Flips, crops, padding and resizing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from bigkernel.errors import BadArgument
from bigkernel.expect import Expect
from bigkernel.transforms import arguments, steps
from bigkernel.transforms.arguments import Fill, InterpolationMode
from bigkernel.transforms.engine.draws import integer, integers
from bigkernel.transforms.engine.samples import Bools, Floats, Ints, every
from bigkernel.transforms.one import One
from bigkernel.transforms.transform import Drawn, ImageInfo, Params, Transform


class _RandomFlip(Transform):
    blocks = 1
    horizontal: ClassVar[bool]

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = arguments.probability(self._expect, p)

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        active = images.active & (u[0, :, 0] < self.p)
        return Params(active), [steps.Flip(active, self.horizontal)]

    def _one(self, one: One) -> bool:
        return one.block(0)[0] >= self.p or one.flip(self.horizontal)


class RandomHorizontalFlip(_RandomFlip):
    """Mirrors images left to right with probability ``p``."""

    horizontal = True
    _one = _RandomFlip._one


class RandomVerticalFlip(_RandomFlip):
    """Mirrors images top to bottom with probability ``p``."""

    horizontal = False
    _one = _RandomFlip._one


@dataclass
class CropParams(Params):
    """``padding`` [N, 4] (left, top, right, bottom) first, then the box [N] in the padded image."""

    padding: Ints
    top: Ints
    left: Ints
    height: Ints
    width: Ints


class CenterCrop(Transform):
    """Crops the middle; an image smaller than ``size`` is padded with 0 first."""

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__()
        self.size = arguments.crop_size(Expect("CenterCrop"), size)

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        size = np.stack([images.width, images.height], axis=1)
        crop = np.broadcast_to(np.asarray(self.size[::-1]), size.shape)
        short = np.maximum(crop - size, 0)
        padding = np.concatenate([short // 2, (short + 1) // 2], axis=1)
        # Halves go to the even side, as in torchvision, which uses Python's round().
        corner = np.rint((np.maximum(size, crop) - crop) / 2.0).astype(np.int64)
        box = corner[:, 1], corner[:, 0], crop[:, 1], crop[:, 0]
        params = CropParams(images.active, padding, *box)
        return params, _pad_and_crop(params, None, edge=False)

    def _one(self, one: One) -> bool:
        height, width = self.size
        if one.height < height or one.width < width:
            return False  # it is padded
        top, left = round((one.height - height) / 2.0), round((one.width - width) / 2.0)
        return one.move(top, left, height, width)


class RandomCrop(Transform):
    """Crops a window of ``size`` at a random place, after padding if asked for.

    An image that is smaller than the crop is an error unless ``pad_if_needed``. ``padding_mode``
    is "constant" or "edge" (torchvision's mirrored modes have no kernel here).
    """

    blocks = 1

    def __init__(
        self,
        size: int | Sequence[int],
        padding: int | Sequence[int] | None = None,
        pad_if_needed: bool = False,
        fill: Fill = 0,
        padding_mode: str = "constant",
    ) -> None:
        super().__init__()
        expect = Expect("RandomCrop")
        self.size = arguments.crop_size(expect, size)
        self.padding = None if padding is None else arguments.padding_sides(expect, padding)
        self.pad_if_needed = pad_if_needed
        self.fill = fill
        self._fill = arguments.fill_values(expect, fill)
        self.padding_mode = arguments.padding_mode(expect, padding_mode)

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        active = images.active
        sides = np.asarray(self.padding or (0, 0, 0, 0), dtype=np.int64)
        padding = np.broadcast_to(sides, (len(active), 4))
        size = np.stack([images.width, images.height], axis=1) + padding[:, :2] + padding[:, 2:]
        crop = np.broadcast_to(np.asarray(self.size[::-1]), size.shape)
        short = np.maximum(crop - size, 0)
        if self.pad_if_needed:
            padding = padding + np.tile(short, 2)
            size = size + 2 * short
        elif (short.any(axis=1) & active).any():
            i = int(np.flatnonzero(short.any(axis=1) & active)[0])
            padded = "padded " if self.padding else ""
            raise BadArgument(
                f"bigkernel.RandomCrop: the crop {self.size} must fit into the {padded}image, got "
                f"{(int(size[i, 1]), int(size[i, 0]))} (height, width) for image {i}. "
                "Pass pad_if_needed=True, or resize the images before."
            )
        room = np.maximum(size - crop, 0) + 1
        top, left = integers(u[0, :, 0], room[:, 1]), integers(u[0, :, 1], room[:, 0])
        params = CropParams(active, padding, top, left, crop[:, 1], crop[:, 0])
        return params, _pad_and_crop(params, self._fill, edge=self.padding_mode == "edge")

    def _one(self, one: One) -> bool:
        if self.padding is not None and (
            self.padding_mode == "edge" or not one.pad(*self.padding, self._fill)
        ):
            return False
        height, width = self.size
        if one.height < height or one.width < width:
            return False
        u = one.block(0)
        top, left = integer(u[0], one.height - height + 1), integer(u[1], one.width - width + 1)
        return one.move(top, left, height, width)


def _pad_and_crop(
    params: CropParams, fill: tuple[float, ...] | None, edge: bool
) -> list[steps.Step]:
    """The padding, then the box in the padded image; negative sides of the padding crop."""
    sides = params.padding
    cut = np.maximum(-sides, 0)[:, :2]
    crop = steps.Crop(
        params.active, params.top + cut[:, 1], params.left + cut[:, 0], params.height, params.width
    )
    return [steps.Pad(params.active, np.maximum(sides, 0), fill, edge), crop]


class Pad(Transform):
    """Adds ``padding`` pixels (one number; x, y; or left, top, right, bottom) around images.

    Negative padding crops. ``padding_mode`` is "constant" (``fill``) or "edge"; torchvision's
    mirrored modes have no kernel here.
    """

    def __init__(
        self, padding: int | Sequence[int], fill: Fill = 0, padding_mode: str = "constant"
    ) -> None:
        super().__init__()
        expect = Expect("Pad")
        self.padding = padding
        self._sides = arguments.padding_sides(expect, padding)
        self.fill = fill
        self._fill = arguments.fill_values(expect, fill)
        self.padding_mode = arguments.padding_mode(expect, padding_mode)

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        active = images.active
        sides = np.broadcast_to(np.asarray(self._sides, dtype=np.int64), (len(active), 4))
        edge = self.padding_mode == "edge"
        if min(self._sides) >= 0:
            return Params(active), [steps.Pad(active, sides, self._fill, edge)]
        height = images.height + sides[:, 1] + sides[:, 3]
        width = images.width + sides[:, 0] + sides[:, 2]
        empty = active & ((height < 1) | (width < 1))
        if empty.any():
            i = int(np.flatnonzero(empty)[0])
            raise BadArgument(
                f"bigkernel.Pad: padding must leave at least one pixel a side, got {self.padding} "
                f"for image {i} of {(int(images.height[i]), int(images.width[i]))} (height, "
                "width). Negative padding crops."
            )
        corner = np.zeros_like(height)
        params = CropParams(active, sides, corner, corner, height, width)
        return Params(active), _pad_and_crop(params, self._fill, edge)


@dataclass
class ResizeParams(Params):
    """The size [N] that each image is scaled to."""

    height: Ints
    width: Ints


class Resize(Transform):
    """Scales images to ``size``: (height, width), or the shorter edge's length.

    ``max_size`` bounds the longer edge; with ``size=None`` it is the longer edge's length.
    ``interpolation`` is "nearest", "nearest-exact" or "bilinear"; with ``antialias``, bilinear
    widens its filter where the image shrinks. PIL images are always antialiased, unless it is
    ``False``.
    """

    def __init__(
        self,
        size: int | Sequence[int] | None,
        interpolation: str | InterpolationMode | int = "bilinear",
        max_size: int | None = None,
        antialias: bool | None = True,
    ) -> None:
        super().__init__()
        expect = Expect("Resize")
        self.size = _resize_size(expect, size, max_size)
        self.interpolation = arguments.interpolation_mode(expect, interpolation)
        self.max_size = max_size
        self.antialias = antialias

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        active = images.active
        height, width = self._target(images.height, images.width)
        small = active & ((height < 1) | (width < 1))
        if small.any():
            i = int(np.flatnonzero(small)[0])
            raise BadArgument(
                "bigkernel.Resize: images must keep at least one pixel a side, got "
                f"{(int(height[i]), int(width[i]))} (height, width) for image {i}. "
                "Raise size or max_size."
            )
        params = ResizeParams(active, height, width)
        antialias = images.pil if self.antialias is None else self.antialias
        step = steps.Resize(active, height, width, self.interpolation, antialias)
        return params, [step]

    def _one(self, one: One) -> bool:
        given = np.asarray([one.height]), np.asarray([one.width])
        height, width = (int(side[0]) for side in self._target(*given))
        if (height, width) == (one.height, one.width) or height < 1 or width < 1:
            return False  # nothing to be done, or to be said
        box = (0, 0, one.height, one.width)
        return self.interpolation is InterpolationMode.BILINEAR and one.resize(
            box, height, width, bool(self.antialias)
        )

    def _target(self, height: Ints, width: Ints) -> tuple[Ints, Ints]:
        if self.size is not None and len(self.size) == 2:
            return np.full_like(height, self.size[0]), np.full_like(width, self.size[1])
        short, long = np.minimum(height, width), np.maximum(height, width)
        if self.size is None:
            assert self.max_size is not None
            new_short = (self.max_size * short / long).astype(np.int64)
            new_long = np.full_like(long, self.max_size)
        else:
            new_short = np.full_like(short, self.size[0])
            new_long = (self.size[0] * long / short).astype(np.int64)
            if self.max_size is not None:
                over = new_long > self.max_size
                shrunk = (self.max_size * new_short / np.maximum(new_long, 1)).astype(np.int64)
                new_short = np.where(over, shrunk, new_short)
                new_long = np.where(over, self.max_size, new_long)
        upright = width <= height
        return np.where(upright, new_long, new_short), np.where(upright, new_short, new_long)


def _resize_size(expect: Expect, size: object, max_size: int | None) -> list[int] | None:
    fits = max_size is None or arguments.is_int(max_size)
    expect(fits, "max_size", "an int or None", repr(max_size))
    if size is None:
        expect(max_size is not None, "max_size", "an int when size is None", "None")
        return None
    sides = [size] if arguments.is_int(size) else size
    wanted = "an int, a sequence of one or two ints, or None"
    if not isinstance(sides, Sequence) or len(sides) not in (1, 2):
        raise expect.error("size", wanted, size)
    positive = all(arguments.is_int(s) and s > 0 for s in sides)
    expect(positive, "size", "positive whole numbers", repr(size))
    if max_size is not None:
        expect(len(sides) == 1, "max_size", "None when size is (height, width)", max_size)
        expect(max_size > sides[0], "max_size", f"greater than size {sides[0]}", max_size)
    return [int(s) for s in sides]


@dataclass
class ResizedCropParams(Params):
    """The box [N] that is cut out and scaled."""

    top: Ints
    left: Ints
    height: Ints
    width: Ints


@lru_cache(maxsize=64)
def _ranges(least: float, most: float, lowest: float, highest: float) -> tuple[float, ...]:
    """(least, span) of the areas, and of the logarithms of the ratios."""
    low, high = np.log(np.asarray((lowest, highest), dtype=np.float64)).tolist()
    return float(least), float(most - least), low, high - low


def _side(area: float) -> int:
    """The nearest whole number to the side of a square; 0, as which it fits nowhere, if large."""
    return round(math.sqrt(area)) if area < 2.0**62 else 0


class RandomResizedCrop(Transform):
    """Cuts out a box of random area and aspect ratio and scales it to ``size``.

    Its area is ``scale`` (from 0 on) times the image's, its width over its height ``ratio`` (drawn
    evenly in the logarithm). As in torchvision, ten boxes are tried; if none fits, it is the
    largest box in the middle whose ratio is in range.
    """

    blocks = 10

    def __init__(
        self,
        size: int | Sequence[int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3.0 / 4.0, 4.0 / 3.0),
        interpolation: str | InterpolationMode | int = "bilinear",
        antialias: bool | None = True,
    ) -> None:
        super().__init__()
        expect = Expect("RandomResizedCrop")
        self.size = arguments.crop_size(expect, size)
        for name, value in (("scale", scale), ("ratio", ratio)):
            pair = isinstance(value, Sequence) and len(value) == 2
            expect(pair, name, "a sequence of two floats", repr(value), cls=TypeError)
            least = 0.0 if name == "scale" else math.ulp(0.0)
            fits = all(arguments.is_number(v) and least <= v < math.inf for v in value)
            wanted = "positive numbers" if least else "numbers from 0 on"
            expect(fits, name, wanted, repr(value))
        if scale[0] > scale[1] or ratio[0] > ratio[1]:
            message = "bigkernel.RandomResizedCrop: scale and ratio should be of kind (min, max)"
            warnings.warn(message, stacklevel=2)
        self.scale = scale
        self.ratio = ratio
        self.interpolation = arguments.interpolation_mode(expect, interpolation)
        self.antialias = antialias

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        active = images.active
        params = self._draw_box(active, u, images.height, images.width)
        crop = steps.Crop(active, params.top, params.left, params.height, params.width)
        height, width = (np.full_like(params.top, s) for s in self.size)
        antialias = images.pil if self.antialias is None else self.antialias
        resize = steps.Resize(active, height, width, self.interpolation, antialias)
        return params, [crop, resize]

    def _one(self, one: One) -> bool:
        if self.interpolation is not InterpolationMode.BILINEAR:
            return False
        for number in range(self.blocks):
            u = one.block(number)
            area, ratio = self._shape(one.height * one.width, u[0], u[1])
            ratio = float(ratio)
            box_width, box_height = _side(area * ratio), _side(area / ratio)
            if 0 < box_width <= one.width and 0 < box_height <= one.height:
                break
        else:
            return False
        top = integer(u[2], one.height - box_height + 1)
        left = integer(u[3], one.width - box_width + 1)
        box = (top, left, box_height, box_width)
        if box[2:] == tuple(self.size):
            return False
        return one.resize(box, *self.size, bool(self.antialias))

    def _shape(self, whole: Ints | int, first: Any, second: Any) -> tuple[Any, Any]:
        """Area and ratio of boxes in an image of ``whole`` pixels."""
        least, span, least_log, span_of_logs = _ranges(*self.scale, *self.ratio)
        return whole * (least + span * first), np.exp(least_log + span_of_logs * second)

    def _draw_box(self, active: Bools, u: Floats, height: Ints, width: Ints) -> ResizedCropParams:
        area, ratio = self._shape(height * width, u[:, :, 0], u[:, :, 1])  # [10, N]
        box_width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        box_height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
        first = fits.argmax(axis=0)
        each = np.arange(len(height))
        found = fits[first, each]
        h, w = box_height[first, each], box_width[first, each]
        if not every(found):
            middle_height, middle_width = self._middle_box(height, width)
            h, w = np.where(found, h, middle_height), np.where(found, w, middle_width)
        top = integers(u[first, each, 2], np.maximum(height - h, 0) + 1)
        left = integers(u[first, each, 3], np.maximum(width - w, 0) + 1)
        if not every(found):
            top = np.where(found, top, (height - h) // 2)
            left = np.where(found, left, (width - w) // 2)
        return ResizedCropParams(active, top, left, h, w)

    def _middle_box(self, height: Ints, width: Ints) -> tuple[Ints, Ints]:
        in_ratio = width / height
        low, high = min(self.ratio), max(self.ratio)
        h = np.where(in_ratio < low, np.rint(width / low).astype(np.int64), height)
        w = np.where(in_ratio > high, np.rint(height * high).astype(np.int64), width)
        return np.clip(h, 1, height), np.clip(w, 1, width)
