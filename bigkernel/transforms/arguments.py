"""Constructor arguments: torchvision's spellings turned into one form, or one clear sentence."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, TypeGuard

import torch

from bigkernel.errors import BadArgument
from bigkernel.expect import Expect
from bigkernel.ops.augment.reference import OUT_DTYPES


class InterpolationMode(Enum):
    """torchvision's names. ``nearest``, ``nearest-exact`` and ``bilinear`` have kernels."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


_SUPPORTED = (
    InterpolationMode.NEAREST,
    InterpolationMode.NEAREST_EXACT,
    InterpolationMode.BILINEAR,
)
_PILLOW_CODES = {
    0: InterpolationMode.NEAREST,
    1: InterpolationMode.LANCZOS,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
    4: InterpolationMode.BOX,
    5: InterpolationMode.HAMMING,
}

# What torchvision takes as fill: a number, a number per channel, nothing, or one of these a type.
Fill = float | Sequence[float] | None | Mapping[Any, "float | Sequence[float] | None"]


def interpolation_mode(expect: Expect, value: object) -> InterpolationMode:
    """A string, torchvision's or this package's InterpolationMode, or a Pillow code."""
    name = getattr(value, "value", value)
    mode: InterpolationMode | None = None
    if isinstance(name, str):
        mode = next((m for m in InterpolationMode if m.value == name), None)
    elif isinstance(name, int) and not isinstance(name, bool):
        mode = _PILLOW_CODES.get(name)
    if mode is None or mode not in _SUPPORTED:
        fix = "Other filters have no kernel here: resize with torchvision before" if mode else ""
        wanted = "nearest, nearest-exact or bilinear"
        raise expect.error("interpolation", wanted, repr(value), fix)
    return mode


def is_int(value: object) -> TypeGuard[int]:
    """Python's and NumPy's whole numbers."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Python's and NumPy's real numbers, infinity and NaN included."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _sequence(expect: Expect, name: str, value: object, wanted: str) -> Sequence[Any]:
    """``value``, which is a sequence and no string."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise expect.error(name, wanted, repr(value), cls=TypeError)
    return value


def crop_size(expect: Expect, size: object) -> tuple[int, int]:
    """(height, width) from a number or a sequence of one or two."""
    if is_number(size):
        size = (size, size)
    size = _sequence(expect, "size", size, "an int or a sequence (height, width)")
    expect(len(size) in (1, 2), "size", "an int or two dimensions (height, width)", repr(size))
    pair = (size[0], size[-1])
    whole = all(is_number(s) and s == int(s) and s > 0 for s in pair)
    expect(whole, "size", "positive whole numbers", repr(size))
    return int(pair[0]), int(pair[1])


def probability(expect: Expect, p: float) -> float:
    """``p``, a number from 0 to 1."""
    expect(is_number(p) and 0.0 <= p <= 1.0, "p", "a number in [0.0, 1.0]", repr(p))
    return p


def number_pair(
    expect: Expect, name: str, value: object, sizes: tuple[int, ...] = (2,)
) -> list[float]:
    """A sequence of numbers with one of the lengths ``sizes``."""
    wanted = f"a sequence of length {' or '.join(map(str, sizes))}"
    value = _sequence(expect, name, value, wanted)
    expect(len(value) in sizes, name, wanted, repr(value))
    expect(all(is_number(v) for v in value), name, "numbers", repr(value), cls=TypeError)
    expect(all(math.isfinite(v) for v in value), name, "finite", repr(value))
    return [float(v) for v in value]


def angle_range(
    expect: Expect, name: str, value: object, sizes: tuple[int, ...] = (2,)
) -> list[float]:
    """[-value, value] from a number, or the sequence itself."""
    if is_number(value):
        wanted = "positive and finite when it is a single number"
        expect(0 <= value < math.inf, name, wanted, repr(value))
        return [-float(value), float(value)]
    return number_pair(expect, name, value, sizes)


def padding_sides(expect: Expect, padding: object) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) from an int or a sequence of 1, 2 or 4 ints."""
    wanted = "an int or a sequence of 1, 2 or 4 ints"
    sides = [padding] if is_int(padding) else padding
    if not isinstance(sides, (list, tuple)):
        raise expect.error("padding", wanted, repr(padding))
    fits = len(sides) in (1, 2, 4) and all(is_int(s) for s in sides)
    expect(fits, "padding", wanted, repr(padding))
    left, top = sides[0], sides[1 % len(sides)]
    right, bottom = sides[2 % len(sides)], sides[3 % len(sides)]
    return int(left), int(top), int(right), int(bottom)


def padding_mode(expect: Expect, mode: object) -> str:
    """Constant or edge."""
    name, known = "padding_mode", ("constant", "edge", "reflect", "symmetric")
    expect(mode in known, name, "constant, edge, reflect or symmetric", repr(mode))
    fix = "Mirrored borders have no kernel here: pad with torch.nn.functional.pad before"
    expect(mode in ("constant", "edge"), name, "constant or edge", repr(mode), fix)
    return str(mode)


def fill_values(expect: Expect, fill: Fill) -> tuple[float, ...] | None:
    """The fill for images, one number or one per channel; None stays None (torchvision's black)."""
    if isinstance(fill, Mapping):
        fill = _fill_for_images(fill)
    if fill is None:
        return None
    values = [fill] if is_number(fill) else fill
    if not (isinstance(values, (list, tuple)) and all(is_number(v) for v in values)):
        wanted = "a number, a tuple or list of numbers, a dict of those, or None"
        raise expect.error("fill", wanted, repr(fill), cls=TypeError)
    expect(len(values) > 0, "fill", "at least one number", repr(fill))
    return tuple(float(v) for v in values)


def channel_values(expect: Expect, name: str, value: Any) -> tuple[float, ...]:
    """A number, or one a channel."""
    values = (value,) if is_number(value) else tuple(value)
    expect(len(values) > 0, name, "at least one number", repr(value))
    return tuple(float(v) for v in values)


def _fill_for_images(fill: Mapping[Any, Any]) -> Any:
    """The entry of a {type: fill} mapping that torchvision would use for an image."""
    return _entry_for_images(fill, 0)


def _entry_for_images(mapping: Mapping[Any, Any], default: Any) -> Any:
    for key in mapping:
        if isinstance(key, type) and key.__name__ == "Image":
            return mapping[key]
    return mapping.get(torch.Tensor, mapping.get("others", default))


def image_dtype(expect: Expect, dtype: object) -> torch.dtype | None:
    """The dtype for images out of a dtype or a {type: dtype} mapping; None: leave it."""
    if isinstance(dtype, Mapping):
        missing = object()
        dtype = _entry_for_images(dtype, missing)
        if dtype is None:
            return None
        if dtype is missing:
            raise BadArgument(
                f'bigkernel.{expect.function}: dtype must name images or "others", got neither.'
            )
    if not isinstance(dtype, torch.dtype):
        raise expect.error("dtype", "a torch.dtype or a dict", repr(dtype))
    expect(dtype in OUT_DTYPES, "dtype", "a floating-point, whole-number or bool dtype", dtype)
    return dtype
