"""Affine maps of the plane, one a sample: rows (m0, m1, m2, m3, m4, m5) of a float64 [n, 6].

Point (x, y) goes to (m0 x + m1 y + m2, m3 x + m4 y + m5). Boxes are rows (x0, y0, x1, y1).
"""

from __future__ import annotations

import numpy as np

from bigkernel.transforms.engine.samples import Bools, Floats, Ints

_EXACT = 1e-9


def identity(n: int) -> Floats:
    """n maps that change nothing."""
    rows = np.zeros((n, 6))
    rows[:, 0] = rows[:, 4] = 1.0
    return rows


def scaling(x: Floats, y: Floats) -> Floats:
    """Maps that multiply positions by ``x`` and ``y``."""
    rows = np.zeros((len(x), 6))
    rows[:, 0], rows[:, 4] = x, y
    return rows


def compose(after: Floats, before: Floats) -> Floats:
    """The map that does ``before``, then ``after``."""
    # In few operations: of one image's maps each takes as long as of a thousand's.
    a, b = after.reshape(-1, 2, 3), before.reshape(-1, 2, 3)
    rows = a[:, :, :1] * b[:, :1] + a[:, :, 1:2] * b[:, 1:]
    rows[:, :, 2] += a[:, :, 2]
    return rows.reshape(-1, 6)


def invert(rows: Floats) -> Floats:
    """The maps back."""
    a, b, c, d, e, f = rows.T
    det = a * e - b * d
    return np.stack([e, -b, b * f - c * e, -d, a, c * d - a * f], axis=1) / det[:, None]


def snapped(rows: Floats) -> Floats:
    """Maps whose linear part has whole numbers where it nearly has: cos(90 degrees) is 6e-17."""
    near = np.rint(rows)
    whole = np.abs(rows - near) < 1e-12
    whole[:, [2, 5]] = False
    return np.where(whole, near, rows)


def keeps_axes(rows: Floats) -> Bools:
    """[n] maps that send boxes to boxes: scaled, mirrored, turned by quarters, moved."""
    m = np.abs(rows)
    return np.asarray((m[:, 1] + m[:, 3] < _EXACT) | (m[:, 0] + m[:, 4] < _EXACT))


def is_whole_pixel_move(rows: Floats) -> Bools:
    """[n] maps that send whole pixels to whole pixels."""
    m = np.abs(rows)
    off = np.abs(rows - np.rint(rows)).max(axis=1)
    off += np.abs(m[:, 0] + m[:, 1] - 1.0) + np.abs(m[:, 3] + m[:, 4] - 1.0)
    return np.asarray((off < _EXACT) & keeps_axes(rows))


def map_box(rows: Floats, box: Ints | Floats) -> Floats:
    """[n, 4] the smallest boxes around the mapped boxes (the mapped boxes, if axes are kept)."""
    m, low, high = rows.reshape(-1, 2, 3), box[:, None, :2], box[:, None, 2:]  # [n, 1, (x, y)]
    at, reach = m[:, :, :2] * ((low + high) * 0.5), np.abs(m[:, :, :2]) * ((high - low) * 0.5)
    middle, half = at[:, :, 0] + at[:, :, 1] + m[:, :, 2], reach[:, :, 0] + reach[:, :, 1]
    mapped = np.empty((len(rows), 4))
    np.subtract(middle, half, out=mapped[:, :2])
    np.add(middle, half, out=mapped[:, 2:])
    return mapped


def canvas_box(height: Ints, width: Ints) -> Ints:
    """[n, 4] the boxes of whole images."""
    box = np.zeros((len(height), 4), dtype=np.int64)
    box[:, 2], box[:, 3] = width, height
    return box


def intersect(box: Floats | Ints, bounds: Ints) -> Floats:
    """[n, 4] the common part; of no width or height, inside ``bounds``, where there is none."""
    corners = box.reshape(-1, 2, 2)  # [n, corner, (x, y)]
    inside = np.maximum(corners, bounds[:, None, :2]).astype(np.float64)
    return np.minimum(inside, bounds[:, None, 2:], out=inside).reshape(-1, 4)


def warp_matrix(
    height: Ints,
    width: Ints,
    out_height: Ints,
    out_width: Ints,
    center: tuple[float, float] | None,
    angle: Floats,
    translate: Floats,
    scale: Floats,
    shear: Floats,
) -> Floats:
    """Output point -> input point of torchvision's ``affine``; ``angle`` clockwise, in degrees.

    The forward map is T C R(angle) S(scale) ShearY ShearX C^-1, with C the move to ``center``
    (in pixels; the image's middle if None) and T that by ``translate`` [n, 2] (x, y) pixels;
    ``shear`` [n, 2] in degrees. The middles of input and output coincide when their sizes differ.
    """
    rotation, shear_x, shear_y = np.radians(angle), np.radians(shear[:, 0]), np.radians(shear[:, 1])
    cos_y = np.cos(shear_y)
    a = np.cos(rotation - shear_y) / cos_y
    b = -(a * np.tan(shear_x) + np.sin(rotation))
    c = np.sin(rotation - shear_y) / cos_y
    d = np.cos(rotation) - c * np.tan(shear_x)
    # The linear part has determinant 1 before scaling, so its inverse needs no division.
    linear = np.stack([d, -b, -c, a], axis=1) / scale[:, None]
    middle = np.stack([width, height], axis=1) * 0.5
    pivot = np.zeros_like(middle) if center is None else np.asarray(center) - middle
    from_point = pivot + translate + np.stack([out_width, out_height], axis=1) * 0.5
    to_point = pivot + middle
    rows = np.empty((len(angle), 6))
    rows[:, 0:2], rows[:, 3:5] = linear[:, 0:2], linear[:, 2:4]
    rows[:, 2] = to_point[:, 0] - (linear[:, 0:2] * from_point).sum(axis=1)
    rows[:, 5] = to_point[:, 1] - (linear[:, 2:4] * from_point).sum(axis=1)
    return rows


def expanded_size(height: Ints, width: Ints, matrix: Floats) -> tuple[Ints, Ints]:
    """(height, width) of the canvas that holds the whole rotated image, torchvision's rule.

    ``matrix`` is the map of :func:`warp_matrix` for a canvas of the image's own size. torchvision
    works in float32 and cuts the corners' coordinates to 1e-4, which decides the size where it is
    nearly whole.
    """
    middle = np.stack([width, height], axis=1)[:, None] * 0.5  # [n, 1, 2]
    linear64 = matrix[:, [0, 1, 3, 4]].reshape(-1, 2, 2)
    offset = (matrix[:, [2, 5]] + (linear64 * middle).sum(axis=2) - middle[:, 0]).astype(np.float32)
    half = np.stack([width, height], axis=1).astype(np.float32) * np.float32(0.5)
    corners = np.asarray([[-1, -1], [-1, 1], [1, 1], [1, -1]], dtype=np.float32)
    points = corners[None] * half[:, None]  # [n, 4, 2]
    linear = matrix[:, [0, 1, 3, 4]].astype(np.float32)
    shift = offset + half
    x = points[:, :, 0] * linear[:, 0:1] + points[:, :, 1] * linear[:, 1:2] + shift[:, 0:1]
    y = points[:, :, 0] * linear[:, 2:3] + points[:, :, 1] * linear[:, 3:4] + shift[:, 1:2]
    tolerance, inverse = np.float32(1e-4), np.float32(1.0 / 1e-4)

    def extent(values: np.ndarray) -> Ints:
        high = np.ceil(np.trunc(values.max(axis=1) * inverse) * tolerance)
        low = np.floor(np.trunc(values.min(axis=1) * inverse) * tolerance)
        return (high - low).astype(np.int64)

    return extent(y), extent(x)


def quarter_turns(angle: Floats) -> Ints:
    """[n] quarter turns (0..3) that the angle in degrees is exactly, or -1."""
    turned = np.mod(angle, 360.0)
    quarters = np.rint(turned / 90.0).astype(np.int64) % 4
    return np.where(turned == quarters * 90.0, quarters, -1)
