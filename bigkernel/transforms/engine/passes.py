"""Folded passes: steps done to images, through the fewest augment calls that are right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bigkernel.expect import Expect
from bigkernel.ops.augment import augment
from bigkernel.transforms.engine.fold import Group, fold
from bigkernel.transforms.engine.images import Images
from bigkernel.transforms.engine.samples import Ints
from bigkernel.transforms.engine.step import Step
from bigkernel.transforms.engine.table import Call

_EXPECT = Expect("transforms")
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
    for height, width in sorted(set(zip(call.height.tolist(), call.width.tolist(), strict=True))):
        places = np.flatnonzero((call.height == height) & (call.width == width))
        part = call if len(places) == len(call.height) else call.take(places)
        result = augment(
            _pick(images, places),
            torch.from_numpy(part.geometry),
            torch.from_numpy(part.color.astype(np.float32)),
            size=(height, width),
            fill=torch.from_numpy(np.ascontiguousarray(part.fill)),
            mean=_constants(part.mean),
            std=_constants(part.std),
            interpolation="bilinear" if part.bilinear else "nearest",
            antialias=part.antialias,
            in_scale=part.in_scale,
            dtype=part.dtype,
            channels_last_in=channels_last_in,
            channels_last_out=channels_last_out,
        )
        results.append((places, result))
    return results


def _constants(numbers: tuple[float, ...] | None) -> Tensor | None:
    return None if numbers is None else torch.from_numpy(np.asarray(numbers))


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
