"""Type, range and normalisation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from bigkernel.errors import check
from bigkernel.transforms import _arguments as arguments
from bigkernel.transforms import _steps as steps
from bigkernel.transforms._draws import Bools
from bigkernel.transforms._transform import Params, Sampling, Transform


class ToImage(Transform):
    """Turns PIL images (and arrays) into tensors, and channels-last tensors to channels first.

    The values stay. torchvision's ToImage returns a ``tv_tensors.Image``, this one a plain tensor,
    or what it was given.
    """

    makes_tensor: ClassVar[bool] = True

    def walk(self, sampling: Sampling, active: Bools) -> None:
        sampling.numbers()
        sampling.pil = False
        sampling.add(Params(active))


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
        self._dtype = arguments.image_dtype("ToDtype", dtype)
        self.scale = scale
        if self._dtype is None and scale:
            warnings.warn(
                "scale was set but no dtype for images: they stay as they are", stacklevel=2
            )

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, scale={self.scale}"

    def walk(self, sampling: Sampling, active: Bools) -> None:
        sampling.numbers()
        _check_tensors("ToDtype", sampling)
        if self._dtype is None:
            sampling.add(Params(active))
        else:
            sampling.add(Params(active), steps.ToDtype(active, self._dtype, self.scale))


class Normalize(Transform):
    """(image - mean) / std for each channel; uint8 images are scaled to 0..1 before.

    ``inplace`` is accepted for torchvision's sake: the result is always a new tensor.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> None:
        super().__init__()
        self.mean = _numbers("mean", mean)
        self.std = _numbers("std", std)
        check(all(s != 0 for s in self.std), "Normalize", "std", "without a zero", repr(std))
        self.inplace = inplace

    def walk(self, sampling: Sampling, active: Bools) -> None:
        sampling.numbers()
        _check_tensors("Normalize", sampling)
        step = steps.Normalize(active, tuple(self.mean), tuple(self.std))
        sampling.add(Params(active), step)


def _numbers(name: str, value: Any) -> list[float]:
    values = [value] if arguments.is_number(value) else list(value)
    check(len(values) > 0, "Normalize", name, "at least one number", repr(value))
    return [float(v) for v in values]


def _check_tensors(owner: str, sampling: Sampling) -> None:
    check(
        not sampling.pil,
        owner,
        "images",
        "tensors",
        "PIL images",
        f"Put ToImage() before {owner}",
        TypeError,
    )
