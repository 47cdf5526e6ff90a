"""The columns and codes of augment's tables: the one place where they are written.

The kernels take them from ``csrc/augment/codes.h``, which is :func:`header`: ``setup.py`` runs this
file, without importing the package, and writes the header before it compiles. ``reference.py`` and
the transforms import them.

geometry, float64 [N, 16]
    0..5    a b c d e f: the map from the output to the source. The centre of output pixel (x, y)
            comes from the point ``sx = a (x + .5) + b (y + .5) + c``,
            ``sy = d (x + .5) + e (y + .5) + f`` of the source, in pixel-edge coordinates: source
            pixel i covers i..i+1. Points that are NaN, infinite or more than 2^20 pixels from the
            origin give fill.
    6..9    source box x0 y0 x1 y1, whole numbers: pixels outside it do not exist. It is cut to the
            image; an empty box gives fill everywhere.
    10..13  output box x0 y0 x1 y1: output pixels outside it are fill.
    14      border, what taps outside the source box do. With s = the weighted sum of the taps
            inside and m = the sum of their weights:
            0  m (s - fill) + fill: what torchvision's rotate and affine do when given a fill. The
               blend weighs s twice by m; it differs from 2 only in the edge's half-transparent
               pixels.
            1  taps are clamped into the box, as resize does. A filter that reaches over more than
               two pixels (antialias) drops them and renormalises, as torch does; fill is left only
               where no tap remains.
            2  s + (1 - m) fill: a plain blend; with fill 0, what rotate and affine do without fill.
    15      how nearest picks a pixel (0 and 1 first round sx and sy to 1/65536 of a pixel, so that
            what is a tie in exact arithmetic is one):
            0  floor(sx): a point on the edge of two pixels takes the right one.
            1  round(sx - .5), halves to even: rotate and affine in exact arithmetic.
            2  as resize does: it takes floor(k * scale) for output pixel k of the resize, a
               float32 product. a and e are the scales (negative where flipped), b = d = 0, and x0,
               y0 of the source box are where the resized region begins; k follows from the map,
               which is centre-aligned as for any other resize. (Any other map: as 0.)
            3  as rotate and affine do: with the rounding errors of their fp32 positions, which
               decide what would be a tie. The source box has to be their whole input and the
               output their whole output, or its mirror image.

color, float32 [N, K, 2]
    Up to K pairs (code, factor), applied in order to the sampled pixels, fill included; any code
    may repeat. 0 none, 1 brightness, 2 contrast, 3 saturation, 4 hue (factor in turns, -0.5 to
    0.5), 5 greyscale (factor unused): torchvision's adjust_* and rgb_to_grayscale with 3 channels,
    in real numbers and clamped to the range of the input, 0..255 for uint8 and 0..1 for floats.
    Contrast takes the mean grey of the whole output image at that point of the chain.
    Code + 16 works in whole numbers, as torchvision does on uint8 images: pixels are rounded and
    clamped before, grey is cut to a whole number, the result is cut to a whole number. A chain of
    such codes repeats torchvision's intermediate roundings; a chain of plain codes has none. On
    float images + 16 changes nothing.
    Images that have not three channels keep their saturation and hue and are grey already.

fill, float32 [N, C] or [1, C], in the units of the input.

Sampling (bilinear): a separable triangle filter around (sx, sy). Its half-width is one source
pixel; with ``antialias`` it is ``max(1, hypot(a, b))`` along x and ``max(1, hypot(d, e))`` along y.
For axis-aligned maps that is torch's ``interpolate(antialias=True)``; any other map, such as a
resize followed by a rotation, is filtered as well. Nearest ignores ``antialias``.

Last, out = (value * in_scale - mean) / std; whole-number output is rounded to nearest (halves to
even) and clamped to its range, and NaN becomes 0.

Images of other whole-number dtypes are treated as uint8 ones with the range 0..max of theirs (bool:
0..1), in float64. Nothing but moved by nearest sampling, to the same dtype, they stay exact.
"""

from collections.abc import Mapping
from enum import IntEnum


class Border(IntEnum):
    """What comes from outside the source box."""

    FILL_BLEND = 0
    CLAMP = 1
    FILL_OVER = 2


class Nearest(IntEnum):
    """How nearest sampling rounds a position."""

    FLOOR = 0
    EVEN = 1
    RESIZE = 2
    WARP = 3


class Color(IntEnum):
    """Colour operations."""

    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    HUE = 4
    GREYSCALE = 5


# Columns of geometry.
MAP = slice(0, 6)
SOURCE = slice(6, 10)
OUTPUT = slice(10, 14)
BORDER = 14
NEAREST = 15
COLUMNS = 16

# As plain numbers, which NumPy takes faster.
FILL_BLEND, CLAMP, FILL_OVER = map(int, Border)
NEAREST_FLOOR, NEAREST_EVEN, NEAREST_RESIZE, NEAREST_WARP = map(int, Nearest)
BRIGHTNESS, CONTRAST, SATURATION, HUE, GREYSCALE = map(int, Color)
WHOLE_NUMBERS = 16  # added to a colour code
CODES = frozenset(Color) | {code + WHOLE_NUMBERS for code in Color}

FAR = float(2**20)  # positions beyond this many pixels, infinities and NaN are fill
INTERPOLATIONS = ("nearest", "bilinear")  # the op's interpolation is an index into this
# With their names in C++. The op's out_dtype is an index into these, and into others after them.
NATIVE_DTYPES = {
    "float32": "kFloat32",
    "bfloat16": "kBFloat16",
    "float16": "kFloat16",
    "uint8": "kUInt8",
}


def header() -> str:
    """``csrc/augment/codes.h``."""
    places = {"Map": MAP.start, "Source": SOURCE.start, "Output": OUTPUT.start}
    places |= {"Border": BORDER, "Nearest": NEAREST}
    return "\n".join(
        [
            "// Written by setup.py from bigkernel/ops/augment/table.py, which explains it.",
            "#pragma once",
            "#include <cstdint>",
            "",
            '#include "common/dtypes.h"',
            "",
            "namespace bigkernel {",
            "",
            "// Of geometry: how many columns, and where each part begins.",
            f"constexpr int64_t kAugmentColumns = {COLUMNS};",
            *(f"constexpr int64_t kAugment{name}At = {place};" for name, place in places.items()),
            "",
            *_enum("AugmentBorder", {code.name: code for code in Border}),
            *_enum("AugmentNearest", {code.name: code for code in Nearest}),
            *_enum("AugmentOp", {code.name: code for code in Color}),
            *_enum("AugmentInterpolation", {n: i for i, n in enumerate(INTERPOLATIONS)}),
            "",
            "// Colour codes are 1 to the first, and the same with the second added.",
            f"constexpr int32_t kAugmentOps = {len(Color)};",
            f"constexpr int32_t kAugmentWholeNumbers = {WHOLE_NUMBERS};",
            "// Points beyond this many pixels are fill.",
            f"constexpr double kAugmentFar = {FAR};",
            "// What out_dtype stands for.",
            "constexpr DType kAugmentDTypes[] = {",
            *(f"    DType::{name}," for name in NATIVE_DTYPES.values()),
            "};",
            "",
            "}  // namespace bigkernel",
            "",
        ]
    )


def _enum(name: str, codes: Mapping[str, int]) -> list[str]:
    spelt = {"k" + code.title().replace("_", ""): int(number) for code, number in codes.items()}
    return [
        f"enum class {name} : int32_t {{",
        *(f"  {code} = {number}," for code, number in spelt.items()),
        "};",
    ]
