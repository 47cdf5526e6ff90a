"""Rotations and affine maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bigkernel.expect import Expect
from bigkernel.transforms import arguments, steps
from bigkernel.transforms.arguments import Fill, InterpolationMode
from bigkernel.transforms.engine.affine import expanded_size, quarter_turns, warp_matrix
from bigkernel.transforms.engine.draws import uniform
from bigkernel.transforms.engine.samples import Bools, Floats, Ints
from bigkernel.transforms.transform import Drawn, ImageInfo, Params, Transform


def _center(expect: Expect, center: Sequence[float] | None) -> tuple[float, float] | None:
    if center is None:
        return None
    x, y = arguments.number_pair(expect, "center", center)
    return x, y


@dataclass
class RotationParams(Params):
    """``angle`` [N] in degrees, counter-clockwise."""

    angle: Floats


class RandomRotation(Transform):
    """Rotates images by an angle out of ``degrees`` (a range, or d for -d to d), around ``center``.

    ``center`` is (x, y) in pixels from the upper left corner, the image's middle if None.
    ``expand`` enlarges the canvas to hold the whole rotated image. What comes from outside the
    image is ``fill``. ``interpolation`` is "nearest" or "bilinear". Where a point falls between two
    pixels, "nearest" follows torchvision's float32 rounding and so takes the same pixel; with
    padding or a flip before it, or a crop or padding after it, the even one.
    """

    blocks = 1

    def __init__(
        self,
        degrees: float | Sequence[float],
        interpolation: str | InterpolationMode | int = "nearest",
        expand: bool = False,
        center: Sequence[float] | None = None,
        fill: Fill = 0,
    ) -> None:
        super().__init__()
        expect = Expect("RandomRotation")
        self.degrees = arguments.angle_range(expect, "degrees", degrees)
        self.interpolation = arguments.interpolation_mode(expect, interpolation)
        self.expand = expand
        self.center = center
        self._center = _center(expect, center)
        self.fill = fill
        self._fill = arguments.fill_values(expect, fill)

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        angle = uniform(u[0, :, 0], *self.degrees)
        matrix, height, width = self._warp(images.height, images.width, angle)
        step = steps.Affine(images.active, matrix, height, width, self.interpolation, self._fill)
        return RotationParams(images.active, angle), [step]

    def _warp(self, height: Ints, width: Ints, angle: Floats) -> tuple[Floats, Ints, Ints]:
        n = len(angle)
        still, one = np.zeros((n, 2)), np.ones(n)
        out_height, out_width = height, width
        if self.expand:
            matrix = warp_matrix(
                height, width, height, width, self._center, -angle, still, one, still
            )
            # torchvision takes the canvas that fits the turn about ``center``.
            out_height, out_width = expanded_size(height, width, matrix)
            if self._center is None:
                quarters = quarter_turns(angle)
                out_height = np.where(quarters % 2 == 0, height, out_height)
                out_width = np.where(quarters % 2 == 0, width, out_width)
                out_height = np.where((quarters >= 0) & (quarters % 2 == 1), width, out_height)
                out_width = np.where((quarters >= 0) & (quarters % 2 == 1), height, out_width)
        matrix = warp_matrix(
            height, width, out_height, out_width, self._center, -angle, still, one, still
        )
        return matrix, out_height, out_width


@dataclass
class AffineParams(Params):
    """``angle`` [N] and ``shear`` [N, 2] in degrees, ``translate`` [N, 2] pixels, ``scale`` [N]."""

    angle: Floats
    translate: Ints
    scale: Floats
    shear: Floats


class RandomAffine(Transform):
    """Rotates (clockwise), moves, scales and shears images about ``center``.

    ``translate`` (a, b) moves by up to a times the width and b times the height; ``shear`` is a
    range in degrees along x, or two ranges along x and y. See :class:`RandomRotation` for the rest.
    """

    blocks = 2

    def __init__(
        self,
        degrees: float | Sequence[float],
        translate: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        shear: float | Sequence[float] | None = None,
        interpolation: str | InterpolationMode | int = "nearest",
        fill: Fill = 0,
        center: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        expect = Expect("RandomAffine")
        self.degrees = arguments.angle_range(expect, "degrees", degrees)
        if translate is not None:
            fractions = arguments.number_pair(expect, "translate", translate)
            in_range = all(0.0 <= f <= 1.0 for f in fractions)
            expect(in_range, "translate", "between 0 and 1", repr(translate))
        if scale is not None:
            factors = arguments.number_pair(expect, "scale", scale)
            expect(all(f > 0 for f in factors), "scale", "positive", repr(scale))
        self.translate = translate
        self.scale = scale
        self.shear = (
            None if shear is None else arguments.angle_range(expect, "shear", shear, (2, 4))
        )
        self.interpolation = arguments.interpolation_mode(expect, interpolation)
        self.fill = fill
        self._fill = arguments.fill_values(expect, fill)
        self.center = center
        self._center = _center(expect, center)

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        active, height, width = images.active, images.height, images.width
        params = self._draw_params(active, u, height, width)
        matrix = warp_matrix(
            height,
            width,
            height,
            width,
            self._center,
            params.angle,
            params.translate.astype(np.float64),
            params.scale,
            params.shear,
        )
        step = steps.Affine(active, matrix, height, width, self.interpolation, self._fill)
        return params, [step]

    def _draw_params(self, active: Bools, u: Floats, height: Ints, width: Ints) -> AffineParams:
        n = len(active)
        translate = np.zeros((n, 2), dtype=np.int64)
        if self.translate is not None:
            reach = np.stack([width, height], axis=1) * np.asarray(self.translate)
            translate = np.rint(uniform(u[0, :, 1:3], -reach, reach)).astype(np.int64)
        scale = np.ones(n) if self.scale is None else uniform(u[0, :, 3], *self.scale)
        shear = np.zeros((n, 2))
        if self.shear is not None:
            shear[:, 0] = uniform(u[1, :, 0], self.shear[0], self.shear[1])
            if len(self.shear) == 4:
                shear[:, 1] = uniform(u[1, :, 1], self.shear[2], self.shear[3])
        return AffineParams(active, uniform(u[0, :, 0], *self.degrees), translate, scale, shear)
