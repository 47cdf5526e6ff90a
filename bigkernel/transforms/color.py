"""Colour jitter and greyscale."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bigkernel.expect import Expect
from bigkernel.transforms import arguments, steps
from bigkernel.transforms.engine.draws import integers, uniform
from bigkernel.transforms.engine.samples import Floats, Ints
from bigkernel.transforms.steps import BRIGHTNESS, CONTRAST, GREYSCALE, HUE, SATURATION
from bigkernel.transforms.transform import Drawn, ImageInfo, Params, Transform

_JITTER = Expect("ColorJitter")
_ORDERS = np.asarray(list(itertools.permutations(range(4))), dtype=np.int64)
_CODES = np.asarray([BRIGHTNESS, CONTRAST, SATURATION, HUE], dtype=np.int64)
_OPERATIONS = ("brightness", "contrast", "saturation", "hue")


@dataclass
class ColorJitterParams(Params):
    """The four factors [N] (None where not jittered) and the order [N, 4] of the operations.

    The order counts brightness 0, contrast 1, saturation 2, hue 3, as torchvision's ``fn_idx``.
    """

    order: Ints
    brightness: Floats | None
    contrast: Floats | None
    saturation: Floats | None
    hue: Floats | None


class ColorJitter(Transform):
    """Changes brightness, contrast, saturation and hue at random, in random order.

    A number b stands for the range [max(0, 1 - b), 1 + b] of factors (for hue [-b, b] turns of the
    colour circle, b up to 0.5). Images need 1 or 3 channels; saturation and hue leave those of 1.
    """

    blocks = 2

    def __init__(
        self,
        brightness: float | Sequence[float] | None = None,
        contrast: float | Sequence[float] | None = None,
        saturation: float | Sequence[float] | None = None,
        hue: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        unbounded = (0.0, float("inf"))
        self.brightness = _factor_range("brightness", brightness, 1.0, unbounded)
        self.contrast = _factor_range("contrast", contrast, 1.0, unbounded)
        self.saturation = _factor_range("saturation", saturation, 1.0, unbounded)
        self.hue = _factor_range("hue", hue, 0.0, (-0.5, 0.5))

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        n = len(images.active)
        ranges = [getattr(self, name) for name in _OPERATIONS]
        factors = [None if r is None else _factors(u[0, :, i], *r) for i, r in enumerate(ranges)]
        order = _ORDERS[integers(u[1, :, 0], np.full(n, len(_ORDERS)))]
        used = np.asarray([r is not None for r in ranges])
        codes = np.where(used, _CODES, 0)[order]
        table = np.stack([np.ones(n) if f is None else f for f in factors], axis=1)
        values = np.take_along_axis(table, order, axis=1)
        if used.any():
            # The operations in use, pushed together, so that the table gets no idle columns.
            kept = np.argsort(codes == 0, axis=1, kind="stable")[:, : int(used.sum())]
            codes = np.take_along_axis(codes, kept, axis=1)
            values = np.take_along_axis(values, kept, axis=1)
        params = ColorJitterParams(images.active, order, *factors)
        return params, [steps.Color(images.active, codes, values)]


def _factors(u: Floats, low: float, high: float) -> Floats:
    # float32 numbers, as torchvision draws them: the last bit decides pixels between two levels.
    return uniform(u, low, high).astype(np.float32).astype(np.float64)


def _factor_range(
    name: str, value: object, center: float, bound: tuple[float, float]
) -> tuple[float, float] | None:
    if value is None:
        return None
    if arguments.is_number(value):
        _JITTER(value >= 0, name, "not negative when it is a single number", value)
        low, high = center - value, center + value
        if name != "hue":
            low = max(low, 0.0)
    else:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            wanted = "a number or a sequence of length 2"
            raise _JITTER.error(name, wanted, repr(value), cls=TypeError)
        low, high = arguments.number_pair(_JITTER, name, value)
    wanted = f"increasing and between {bound[0]} and {bound[1]}"
    _JITTER(bound[0] <= low <= high <= bound[1], name, wanted, f"{low} to {high}")
    return None if low == high == center else (float(low), float(high))


class RandomGrayscale(Transform):
    """Makes images grey with probability ``p``; the number of channels stays."""

    blocks = 1

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.p = arguments.probability(Expect("RandomGrayscale"), p)

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        active = images.active & (u[0, :, 0] < self.p)
        codes = np.full((len(active), 1), GREYSCALE)
        return Params(active), [steps.Color(active, codes, np.ones((len(active), 1)))]
