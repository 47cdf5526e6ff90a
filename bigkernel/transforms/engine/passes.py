"""Folded passes: steps done to images, through the fewest augment calls that are right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigkernel.expect import Expect
from bigkernel.ops.augment.op import launch, work_dtype
from bigkernel.ops.augment.reference import OUT_DTYPES, Arguments
from bigkernel.ops.augment.table import INTERPOLATIONS
from bigkernel.transforms.engine.fold import Group, fold
from bigkernel.transforms.engine.images import Images
from bigkernel.transforms.engine.samples import Ints, every
from bigkernel.transforms.engine.step import Step
from bigkernel.transforms.engine.table import Call

_EXPECT = Expect("transforms")
_NEAREST, _BILINEAR = (INTERPOLATIONS.index(name) for name in ("nearest", "bilinear"))
Part = tuple[Ints, Tensor]  # places in the batch, and their images, of one size


def run_pass(
    batch: Images, chain: Sequence[Step], channels_last: bool
) -> tuple[Tensor | list[Tensor], list[Group]]:
    """The images after the steps (one batch if they have one size), and how they went there."""
    dtype, _ = batch.like()
    groups = fold(chain, batch.height, batch.width, batch.channels, dtype)
    results: list[Part] = []
    for group in groups:
        images = _pick(batch.tensors, group.members)
        last_in = batch.channels_last
        for call in group.calls[:-1]:
            parts = _apply(images, call, last_in, channels_last)
            images, last_in = join(parts, len(group.members)), channels_last
        parts = _apply(images, group.calls[-1], last_in, channels_last)
        results += [(group.members[places], part) for places, part in parts]
    dtypes = {part.dtype for _, part in results}
    if len(dtypes) != 1:
        got = " and ".join(sorted(map(str, dtypes)))
        fix = "Put ToDtype(torch.float32, scale=True) before a Normalize that is applied at random"
        raise _EXPECT.error("the results", "of one dtype", got, fix)
    return join(results, batch.count), groups


def _pick(images: Tensor | list[Tensor], members: Ints) -> Tensor | list[Tensor]:
    if len(members) == len(images):
        return images  # members are ascending, so these are all of them in order
    return [images[i] for i in members.tolist()]


def _apply(
    images: Tensor | list[Tensor], call: Call, channels_last_in: bool, channels_last_out: bool
) -> list[Part]:
    """One augment call for each output size."""
    results = []
    first = images if isinstance(images, Tensor) else images[0]
    channels, wide = call.fill.shape[1], work_dtype(first.dtype)
    everyone = np.arange(len(call.height))
    sizes = sorted(set(zip(call.height.tolist(), call.width.tolist(), strict=True)))
    for height, width in sizes:
        places, part = everyone, call
        if len(sizes) > 1:
            places = np.flatnonzero((call.height == height) & (call.width == width))
            part = call.take(places)
        given = _pick(images, places)
        result = launch(
            Arguments(
                images=[given] if isinstance(given, Tensor) else given,
                geometry=torch.from_numpy(part.geometry),
                color=torch.from_numpy(part.color.astype(np.float32)),
                fill=torch.from_numpy(np.ascontiguousarray(part.fill)).to(wide),
                mean=_constants("mean", part.mean, channels, wide),
                std=_constants("std", part.std, channels, wide),
                out_h=height,
                out_w=width,
                channels_last_in=channels_last_in,
                channels_last_out=channels_last_out,
                interpolation=_BILINEAR if part.bilinear else _NEAREST,
                antialias=part.antialias,
                in_scale=part.in_scale,
                out_dtype=OUT_DTYPES.index(part.dtype),
            ),
            finite=not part.bilinear or every(np.isfinite(part.fill)),
        )
        results.append((places, result))
    return results


def _constants(
    name: str, numbers: tuple[float, ...] | None, channels: int, dtype: torch.dtype
) -> Tensor | None:
    return None if numbers is None else torch.from_numpy(constants(name, numbers, channels, dtype))


def constants(
    name: str, numbers: tuple[float, ...], channels: int, dtype: torch.dtype
) -> np.ndarray:
    """[C] numbers of mean or std, as the op takes them."""
    # 0.0 and -0.0 are equal, and are not the same.
    numbers = tuple(numbers)
    signs = tuple(math.copysign(1.0, number) for number in numbers)
    return _row(name, numbers, signs, channels, dtype)


@lru_cache(maxsize=256)
def _row(
    name: str, numbers: tuple[float, ...], _: Any, channels: int, dtype: torch.dtype
) -> np.ndarray:
    """[C], as the op takes it. An array: a tensor would keep the modes that it was made in."""
    row = np.empty(channels, np.float32 if dtype == torch.float32 else np.float64)
    with np.errstate(over="ignore"):
        row[:] = numbers
    if name == "std" and (row == 0).any():
        raise _EXPECT.error(name, "without a zero", numbers)
    return row


def join(parts: list[Part], count: int) -> Tensor | list[Tensor]:
    """The parts in the batch's order: one tensor if all images have one size, else a list."""
    if len(parts) == 1:
        return parts[0][1]
    if len({part.shape[1:] for _, part in parts}) == 1:
        first = parts[0][1]
        whole = first.new_empty(count, *first.shape[1:])
        for places, part in parts:
            whole[torch.from_numpy(places).to(first.device)] = part
        return whole
    slots: list[Tensor | None] = [None] * count
    for places, part in parts:
        for place, image in zip(places.tolist(), part, strict=True):
            slots[place] = image
    return [image for image in slots if image is not None]
