"""One usual image, in plain numbers: NumPy takes as long for one image's as for a thousand's.

A transform that has a method ``_one`` writes what it draws for the image into a :class:`One`, as
its ``draw`` and the steps would into a ``Table``, or says that it cannot, whatever the reason; then
the call goes the way of a batch, with the same key. So this holds what chains mostly are: crops,
one resize of the whole image, flips, then conversion and normalisation; and no sentence of an
error.
"""

from __future__ import annotations

import math
from array import array
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from bigkernel import _library
from bigkernel.ops.augment.op import launch_usual
from bigkernel.ops.augment.reference import OUT_DTYPES
from bigkernel.ops.augment.table import CLAMP, INTERPOLATIONS, NATIVE_DTYPES, NEAREST_FLOOR
from bigkernel.transforms import steps
from bigkernel.transforms.engine.draws import Key, philox4x32_of_one, round_keys
from bigkernel.transforms.engine.images import CHANNEL_COUNTS
from bigkernel.transforms.engine.passes import constants
from bigkernel.transforms.engine.samples import every
from bigkernel.transforms.engine.table import Fill, Table

_DTYPES = frozenset(getattr(torch, name) for name in NATIVE_DTYPES)
_NEAREST, _BILINEAR = (INTERPOLATIONS.index(name) for name in ("nearest", "bilinear"))
# (mean, std), each as the bytes of float64 numbers, of which 0.0 and -0.0 differ; or (dtype, scale)
Conversion = tuple[bytes, bytes] | tuple[torch.dtype, bool]


def is_usual(images: object, layout: str) -> bool:
    """Whether ``gather`` would take it for one plain image [C, H, W], without a word."""
    if not (
        type(images) is Tensor
        and images.dtype in _DTYPES
        and _library.is_usual()
        and images.layout is torch.strided
        and not images.is_nested
        and not images.requires_grad
        and not is_functorch_wrapped_tensor(images)
        and not torch._C._len_torch_dispatch_stack()
    ):
        return False
    shape = images.shape
    if len(shape) != 3 or 0 in shape:
        return False
    if layout == "auto":
        return shape[2] not in CHANNEL_COUNTS or shape[0] in CHANNEL_COUNTS
    return layout == "channels_first"


class _Shared(NamedTuple):
    """What calls of the same options have in common."""

    color: Tensor
    fill: Tensor
    mean: Tensor | None
    std: Tensor | None
    scale: float
    dtype: int  # a place in OUT_DTYPES


class One:
    """The augment call of one image: its map keeps the axes, so that a side needs two numbers."""

    def __init__(self, image: Tensor, key: Key) -> None:
        self.channels, self.height, self.width = image.shape  # after what is written so far
        self.place = -1  # of the transform in the chain
        self._image, self._key = image, key
        self._rounds: list[tuple[int, int]] | None = None
        number = int(key.ids[0])
        self._id = number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF
        self._x, self._y = (1.0, 0.0), (1.0, 0.0)  # source = scale * output + shift
        self._source = self._output = (0, 0, self.width, self.height)
        self._untouched = True
        self._bilinear = self._antialias = False
        self._fill: tuple[float, ...] = (0.0,)
        self._filled = False
        self._conversions: tuple[Conversion, ...] = ()

    def block(self, number: int) -> tuple[float, float, float, float]:
        """Of the four numbers in [0, 1) that `Draws` has for the transform."""
        if self._rounds is None:
            self._rounds = round_keys(self._key.seed)
        a, b, c, d = philox4x32_of_one(self._rounds, number, self.place, *self._id)
        return (a >> 8) * 2.0**-24, (b >> 8) * 2.0**-24, (c >> 8) * 2.0**-24, (d >> 8) * 2.0**-24

    # Each returns whether it could be written.

    def write(self, transform: Any) -> bool:
        """A transform, or a chain of them."""
        if not transform._is_chain:
            self.place += 1
        written: bool = transform._one(self)
        return written

    def resize(
        self, box: tuple[int, int, int, int], height: int, width: int, antialias: bool
    ) -> bool:
        """The box (top, left, height, width) of the image that was given becomes this size."""
        if not self._untouched or self._conversions:
            return False
        top, left, box_height, box_width = box
        self._x, self._y = (box_width / width, float(left)), (box_height / height, float(top))
        self._source = (left, top, left + box_width, top + box_height)
        self._output = (0, 0, width, height)
        self.height, self.width = height, width
        self._bilinear, self._antialias, self._untouched = True, antialias, False
        return True

    def flip(self, horizontal: bool) -> bool:
        if self._conversions:
            return False
        x0, y0, x1, y1 = self._output
        if horizontal:
            scale, shift = self._x
            self._x = -scale, scale * self.width + shift
            self._output = self.width - x1, y0, self.width - x0, y1
        else:
            scale, shift = self._y
            self._y = -scale, scale * self.height + shift
            self._output = x0, self.height - y1, x1, self.height - y0
        self._untouched = False
        return True

    def move(self, top: int, left: int, height: int, width: int) -> bool:
        """The image becomes a window of this size, which may reach out of it."""
        if self._conversions:
            return False
        (scale, shift), (scale_y, shift_y) = self._x, self._y
        self._x = scale, scale * left + shift
        self._y = scale_y, scale_y * top + shift_y
        x0, y0, x1, y1 = self._output
        self._output = (
            min(max(x0 - left, 0), width),
            min(max(y0 - top, 0), height),
            min(max(x1 - left, 0), width),
            min(max(y1 - top, 0), height),
        )
        self.height, self.width = height, width
        self._untouched = False
        return True

    def pad(self, left: int, top: int, right: int, bottom: int, fill: Fill) -> bool:
        """Around the image, with what nothing else is filled with."""
        if left == top == right == bottom == 0:
            return True
        fill = (0.0,) if fill is None else fill
        if self._filled or min(left, top, right, bottom) < 0 or not all(map(math.isfinite, fill)):
            return False
        self._fill, self._filled = fill, True
        return self.move(-top, -left, self.height + top + bottom, self.width + left + right)

    def normalize(self, mean: list[float], std: list[float]) -> bool:
        try:
            self._conversions += ((array("d", mean).tobytes(), array("d", std).tobytes()),)
        except TypeError:
            return False
        return True

    def convert(self, dtype: torch.dtype, scale: bool) -> bool:
        self._conversions += ((dtype, scale),)
        return True

    def run(self) -> Tensor | None:
        """The image after all of it."""
        image = self._image
        shared = _shared(image.dtype, self.channels, self._conversions, self._fill)
        if shared is None:
            return None
        (scale_x, shift_x), (scale_y, shift_y) = self._x, self._y
        row = (scale_x, 0, shift_x, 0, scale_y, shift_y, *self._source, *self._output)
        arguments = (
            [image],
            torch.from_numpy(np.array(((*row, CLAMP, NEAREST_FLOOR),), np.float64)),
            *shared[:4],
            self.height,
            self.width,
            False,
            False,
            _BILINEAR if self._bilinear else _NEAREST,
            self._antialias,
            *shared[4:],
        )
        return launch_usual(image.device, arguments)[0]


@lru_cache(maxsize=256)
def _shared(
    dtype: torch.dtype,
    channels: int,
    conversions: tuple[Conversion, ...],
    fill: tuple[float, ...],
) -> _Shared | None:
    """None if the steps do not fit into one table, or if there is something to be said of them."""
    one = np.ones(1, bool)
    table = Table(np.ones(1, np.int64), np.ones(1, np.int64), channels, dtype)
    try:
        for first, second in conversions:
            step: steps.Step
            if isinstance(first, bytes):
                step = steps.Normalize(one, _floats(first), _floats(second))
            else:
                step = steps.ToDtype(one, first, bool(second))
            if not every(step.fits(table)):
                return None
            step.write(table)
        rows = [
            None if numbers is None else constants(name, numbers, channels, torch.float32)
            for name, numbers in (("mean", table.mean), ("std", table.std))
        ]
    except (TypeError, ValueError):
        return None
    if table.dtype not in _DTYPES or len(fill) not in (1, channels):
        return None
    with torch.inference_mode(False):  # they are kept for calls outside of it
        color = torch.from_numpy(np.zeros((1, 0, 2), np.float32))
        filling = torch.from_numpy(np.full((1, channels), fill, np.float32))
        mean, std = (None if row is None else torch.from_numpy(row) for row in rows)
    return _Shared(color, filling, mean, std, table.scale, OUT_DTYPES.index(table.dtype))


def _floats(given: Any) -> tuple[float, ...]:
    return tuple(np.frombuffer(given).tolist())
