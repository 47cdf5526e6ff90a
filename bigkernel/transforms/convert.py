"""Type, range and normalisation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from bigkernel.expect import Expect
from bigkernel.transforms import arguments, steps
from bigkernel.transforms.engine.samples import Floats
from bigkernel.transforms.one import One
from bigkernel.transforms.transform import Drawn, ImageInfo, Params, Transform

_TO_DTYPE, _NORMALIZE = Expect("ToDtype"), Expect("Normalize")


class ToImage(Transform):
    """Turns PIL images (and arrays) into tensors, and channels-last tensors to channels first.

    The values stay. torchvision's ToImage returns a ``tv_tensors.Image``, this one a plain tensor,
    or what it was given.
    """

    _makes_tensor: ClassVar[bool] = True

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        return Params(images.active), []

    def _one(self, one: One) -> bool:
        return True


class ToDtype(Transform):
    """Converts to ``dtype``; with ``scale``, between uint8's 0..255 and the floats' 0..1.

    ``dtype`` is uint8, float16, bfloat16, float32 or float64, or a dict as torchvision's, whose
    entry for images (``tv_tensors.Image``, ``torch.Tensor`` or "others") counts.
    """

    def __init__(
        self, dtype: torch.dtype | Mapping[Any, torch.dtype | None], scale: bool = False
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self._dtype = arguments.image_dtype(_TO_DTYPE, dtype)
        self.scale = scale
        if self._dtype is None and scale:
            warnings.warn(
                "bigkernel.ToDtype: scale was set but no dtype for images: they stay as they are",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, scale={self.scale}"

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        _check_tensors(_TO_DTYPE, images)
        if self._dtype is None:
            return Params(images.active), []
        return Params(images.active), [steps.ToDtype(images.active, self._dtype, self.scale)]

    def _one(self, one: One) -> bool:
        return self._dtype is None or one.convert(self._dtype, self.scale)


class Normalize(Transform):
    """(image - mean) / std for each channel; uint8 images are scaled to 0..1 before.

    ``inplace`` is accepted for torchvision's sake: the result is always a new tensor.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> None:
        super().__init__()
        self.mean = list(arguments.channel_values(_NORMALIZE, "mean", mean))
        self.std = list(arguments.channel_values(_NORMALIZE, "std", std))
        _NORMALIZE(all(s != 0 for s in self.std), "std", "without a zero", repr(std))
        self.inplace = inplace

    def draw(self, u: Floats, images: ImageInfo) -> Drawn:
        _check_tensors(_NORMALIZE, images)
        step = steps.Normalize(images.active, tuple(self.mean), tuple(self.std))
        return Params(images.active), [step]

    def _one(self, one: One) -> bool:
        return one.normalize(self.mean, self.std)


def _check_tensors(expect: Expect, images: ImageInfo) -> None:
    fix = f"Put ToImage() before {expect.function}"
    expect(not images.pil, "images", "tensors", "PIL images", fix, TypeError)
