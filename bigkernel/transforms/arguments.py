"""Constructor arguments: torchvision's spellings turned into one form, or one clear sentence."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, TypeGuard

import torch

from bigkernel.errors import BadArgument, check
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


def interpolation_mode(owner: str, value: object) -> InterpolationMode:
    """A string, torchvision's or this package's InterpolationMode, or a Pillow code."""
    name = getattr(value, "value", value)
    mode: InterpolationMode | None = None
    if isinstance(name, str):
        mode = next((m for m in InterpolationMode if m.value == name), None)
    elif isinstance(name, int) and not isinstance(name, bool):
        mode = _PILLOW_CODES.get(name)
    check(
        mode in _SUPPORTED,
        owner,
        "interpolation",
        "nearest, nearest-exact or bilinear",
        repr(value),
        "Other filters have no kernel here: resize with torchvision before" if mode else "",
    )
    assert mode is not None
    return mode


def is_int(value: object) -> TypeGuard[int]:
    """Python's and NumPy's whole numbers."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Python's and NumPy's real numbers, infinity and NaN included."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def crop_size(owner: str, size: object) -> tuple[int, int]:
    """(height, width) from a number or a sequence of one or two."""
    if is_number(size):
        size = (size, size)
    check(
        isinstance(size, Sequence) and not isinstance(size, str),
        owner,
        "size",
        "an int or a sequence (height, width)",
        repr(size),
        cls=TypeError,
    )
    assert isinstance(size, Sequence)
    check(
        len(size) in (1, 2), owner, "size", "an int or two dimensions (height, width)", repr(size)
    )
    pair = (size[0], size[-1])
    check(
        all(is_number(s) and s == int(s) and s > 0 for s in pair),
        owner,
        "size",
        "positive whole numbers",
        repr(size),
    )
    return int(pair[0]), int(pair[1])


def probability(owner: str, p: float) -> float:
    check(is_number(p) and 0.0 <= p <= 1.0, owner, "p", "a number in [0.0, 1.0]", repr(p))
    return p


def number_pair(owner: str, name: str, value: object, sizes: tuple[int, ...] = (2,)) -> list[float]:
    """A sequence of numbers with one of the lengths ``sizes``."""
    wanted = f"a sequence of length {' or '.join(map(str, sizes))}"
    check(
        isinstance(value, Sequence) and not isinstance(value, str),
        owner,
        name,
        wanted,
        repr(value),
        cls=TypeError,
    )
    assert isinstance(value, Sequence)
    check(len(value) in sizes, owner, name, wanted, repr(value))
    check(all(is_number(v) for v in value), owner, name, "numbers", repr(value), cls=TypeError)
    check(all(math.isfinite(v) for v in value), owner, name, "finite", repr(value))
    return [float(v) for v in value]


def angle_range(owner: str, name: str, value: object, sizes: tuple[int, ...] = (2,)) -> list[float]:
    """[-value, value] from a number, or the sequence itself."""
    if is_number(value):
        check(
            0 <= value < math.inf,
            owner,
            name,
            "positive and finite when it is a single number",
            repr(value),
        )
        return [-float(value), float(value)]
    return number_pair(owner, name, value, sizes)


def padding_sides(owner: str, padding: object) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) from an int or a sequence of 1, 2 or 4 ints."""
    wanted = "an int or a sequence of 1, 2 or 4 ints"
    sides = [padding] if is_int(padding) else padding
    check(isinstance(sides, (list, tuple)), owner, "padding", wanted, repr(padding))
    assert isinstance(sides, (list, tuple))
    check(
        len(sides) in (1, 2, 4) and all(is_int(s) for s in sides),
        owner,
        "padding",
        wanted,
        repr(padding),
    )
    left, top = sides[0], sides[1 % len(sides)]
    right, bottom = sides[2 % len(sides)], sides[3 % len(sides)]
    return int(left), int(top), int(right), int(bottom)


def padding_mode(owner: str, mode: object) -> str:
    check(
        mode in ("constant", "edge", "reflect", "symmetric"),
        owner,
        "padding_mode",
        "constant, edge, reflect or symmetric",
        repr(mode),
    )
    check(
        mode in ("constant", "edge"),
        owner,
        "padding_mode",
        "constant or edge",
        repr(mode),
        "Mirrored borders have no kernel here: pad with torch.nn.functional.pad before",
    )
    return str(mode)


def fill_values(owner: str, fill: Fill) -> tuple[float, ...] | None:
    """The fill for images, one number or one per channel; None stays None (torchvision's black)."""
    if isinstance(fill, Mapping):
        fill = _fill_for_images(fill)
    if fill is None:
        return None
    values = [fill] if is_number(fill) else fill
    check(
        isinstance(values, (list, tuple)) and all(is_number(v) for v in values),
        owner,
        "fill",
        "a number, a tuple or list of numbers, a dict of those, or None",
        repr(fill),
        cls=TypeError,
    )
    assert isinstance(values, (list, tuple))
    check(len(values) > 0, owner, "fill", "at least one number", repr(fill))
    return tuple(float(v) for v in values)


def channel_values(owner: str, name: str, value: Any) -> tuple[float, ...]:
    """A number, or one a channel."""
    values = (value,) if is_number(value) else tuple(value)
    check(len(values) > 0, owner, name, "at least one number", repr(value))
    return tuple(float(v) for v in values)


def _fill_for_images(fill: Mapping[Any, Any]) -> Any:
    """The entry of a {type: fill} mapping that torchvision would use for an image."""
    return _entry_for_images(fill, 0)


def _entry_for_images(mapping: Mapping[Any, Any], default: Any) -> Any:
    for key in mapping:
        if isinstance(key, type) and key.__name__ == "Image":
            return mapping[key]
    return mapping.get(torch.Tensor, mapping.get("others", default))


def image_dtype(owner: str, dtype: object) -> torch.dtype | None:
    """The dtype for images out of a dtype or a {type: dtype} mapping; None: leave it."""
    if isinstance(dtype, Mapping):
        missing = object()
        dtype = _entry_for_images(dtype, missing)
        if dtype is None:
            return None
        if dtype is missing:
            raise BadArgument(
                f'bigkernel.{owner}: dtype must name images or "others", got neither.'
            )
    check(isinstance(dtype, torch.dtype), owner, "dtype", "a torch.dtype or a dict", repr(dtype))
    check(
        dtype in OUT_DTYPES,
        owner,
        "dtype",
        "a floating-point, whole-number or bool dtype",
        dtype,
    )
    assert isinstance(dtype, torch.dtype)
    return dtype
