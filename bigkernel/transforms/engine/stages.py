"""Tensor stages: functions of pixels between the folded passes of a chain."""

from __future__ import annotations

import inspect
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigkernel.expect import Expect, shape_of
from bigkernel.ops.augment.op import check_plain
from bigkernel.ops.augment.reference import OUT_DTYPES
from bigkernel.transforms.engine.draws import Draws
from bigkernel.transforms.engine.images import INDEXED_MODES, Images
from bigkernel.transforms.engine.passes import Part, join
from bigkernel.transforms.engine.samples import Bools, Ints

_EXPECT = Expect("transforms")
_KINDS = "a tensor [N, C, H, W]"


@dataclass
class Given:
    """What a stage is called with: images of one size, and what their draws are keyed by."""

    images: Tensor  # [M, C, H, W]
    samples: Ints  # [M] the sample of each image: frames of a clip belong to one
    draws: Draws
    place: int  # of the stage in the chain

    def numbers(self) -> Tensor:
        """float32 [blocks, M, 4] in [0, 1), on the images' device; frames of a clip share them."""
        # Exact: they have 24 bits.
        u = self.draws.of(self.place)[:, self.samples].astype(np.float32)
        return torch.from_numpy(u).to(self.images.device)


def run_stage(
    name: str,
    call: Callable[[Given], list[Part]],
    batch: Images,
    active: Bools,
    draws: Draws,
    place: int,
    modes: frozenset[str],
) -> Images:
    """``batch``, channels first, after the stage has been called for its ``active`` images [N].

    Images of each size go through one call. ``call`` may give results of several sizes. ``modes``
    are those of the PIL images that the results go back to; none where they do not.
    """
    indexed = modes & INDEXED_MODES
    if indexed:
        wanted = f"without a palette for {name}, which computes with colours"
        got = f"PIL images of mode {', '.join(sorted(indexed))}"
        raise _EXPECT.error("images", wanted, got, 'Convert with image.convert("RGB")')
    tensors, parts = batch.tensors, list[Part]()
    sizes = np.stack([batch.height, batch.width], axis=1)
    for size in np.unique(sizes, axis=0):
        alike = (sizes == size).all(axis=1)
        places, others = np.flatnonzero(alike & active), np.flatnonzero(alike & ~active)
        if len(places) > 0:
            given = Given(_select(tensors, places), places // batch.frames, draws, place)
            try:
                parts += [(places[some], result) for some, result in call(given)]
            except Exception as error:
                shape, dtype = list(given.images.shape), given.images.dtype
                error.add_note(f"bigkernel: in {name}, for images {shape} of {dtype}")
                raise
        if len(others) > 0:
            parts.append((others, _select(tensors, others)))
    _check_alike(name, batch, parts, bool(active.all()), bool(modes))
    result = join(parts, batch.count)
    first = parts[0][1]
    height, width = batch.height.copy(), batch.width.copy()
    for places, part in parts:
        height[places], width[places] = part.shape[2:]
    return replace(batch, tensors=result, height=height, width=width, channels=first.shape[1])


def _select(tensors: Tensor | list[Tensor], places: Ints) -> Tensor:
    if isinstance(tensors, Tensor):
        if len(places) == len(tensors):
            return tensors
        return tensors[torch.from_numpy(places).to(tensors.device)]
    return torch.stack([tensors[i] for i in places.tolist()])


def _check_alike(
    name: str, batch: Images, parts: list[Part], everyone: bool, pictures: bool
) -> None:
    def kind(image: Tensor) -> tuple[torch.dtype, int, torch.device]:
        return image.dtype, image.shape[1], image.device

    kinds = sorted({kind(part) for _, part in parts}, key=str)
    results = f"the results of {name}"
    wanted = "of one dtype, number of channels and device"
    wanted += "" if everyone else ", as the images that it is not applied to"
    got = " and ".join(f"{d} with {c} channels on {v}" for d, c, v in kinds)
    _EXPECT(len(kinds) == 1, results, wanted, got)
    before = (batch.like()[0], batch.channels)
    wanted = f"{before[0]} with {before[1]} channels, as the PIL images that they go back to"
    got = f"{kinds[0][0]} with {kinds[0][1]}"
    _EXPECT(not pictures or kinds[0][:2] == before, results, wanted, got, "Put ToImage() before it")


def check_result(name: str, result: Any, images: Tensor) -> Tensor:
    """The stage's result for ``images``, or a sentence that says what is wrong with it."""
    m, name = len(images), f"the result of {name}"
    wanted = f"{_KINDS} with one image for each of the {m} given"
    if not isinstance(result, Tensor):
        got = "None" if result is None else f"a {type(result).__name__}"
        fix = "A tensor stage takes and returns tensors [N, C, H, W]"
        raise _EXPECT.error(name, wanted, got, fix, TypeError)
    if type(result).__module__.startswith("torchvision."):
        result = result.as_subclass(Tensor)
    check_plain(_EXPECT, name, result)
    fits = result.dim() == 4 and len(result) == m and result.numel() > 0
    got = f"{shape_of(result)} for images of {shape_of(images)}"
    _EXPECT(fits, name, wanted + ", not empty", got)
    wanted = "of a floating-point, whole-number or bool dtype of torch's"
    _EXPECT.dtype(name, result, OUT_DTYPES, wanted)
    return result


def call_keyed(
    name: str,
    function: Callable[[Tensor, Ints], Any],
    given: Given,
    handed: torch.Generator | None = None,
) -> list[Part]:
    """``function(images, places)``, so that its draws depend on neither the batch nor its order.

    It is called for all images. If it has drawn from a global generator, or from the one that it is
    ``handed``, that result is dropped, and it is called again, for one sample after another, with
    those generators seeded by (seed, id, place). The global ones are left as they were.
    """
    own = [] if handed is None else [(handed, handed.get_state())]
    images, everyone = given.images, np.arange(len(given.images))
    kept = images.clone()  # it may work in place, and have to be called again
    with _generators(images.device) as has_drawn:
        result = function(images, everyone)
        drew = has_drawn() or any(not torch.equal(g.get_state(), state) for g, state in own)
    if not drew:
        return [(everyone, check_result(name, result, images))]
    seeds, parts = given.draws.seeds(given.place), []
    with _generators(images.device):
        for sample in np.unique(given.samples):
            places = np.flatnonzero(given.samples == sample)
            frames = kept[int(places[0]) : int(places[-1]) + 1]
            _seed(seeds[sample], images.device)
            if handed is not None:
                handed.manual_seed(seeds[sample])
            result = check_result(name, function(frames, places), frames)
            parts.append((places, result.clone()))  # its memory may be that of every call
    if len({part.shape[1:] for _, part in parts}) == 1:
        return [(everyone, torch.cat([part for _, part in parts]))]
    return parts


def call_foreign(name: str, function: Callable[..., Any], given: Given) -> list[Part]:
    """A callable from elsewhere; one with the arguments ``generator`` and ``ids`` gets those."""
    if not takes_ids(function):
        return call_keyed(name, lambda images, places: function(images), given)
    generator = torch.Generator().manual_seed(given.draws.seed(given.place))
    ids = torch.from_numpy(given.draws.key.ids[given.samples])

    def call(images: Tensor, places: Ints) -> Any:
        return function(images, generator=generator, ids=ids[torch.from_numpy(places)])

    return call_keyed(name, call, given, generator)


def takes_ids(function: Callable[..., Any]) -> bool:
    """Whether it can be called as transforms are: f(images, generator=..., ids=...)."""
    target = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        known = inspect.signature(target).parameters
    except (TypeError, ValueError):  # some of those written in C
        return False
    return {"generator", "ids"} <= set(known)


# The global generators are the process's: of threads that call stages, one at a time has them.
_TURN = threading.RLock()


def _renew_turn() -> None:
    global _TURN
    _TURN = threading.RLock()


os.register_at_fork(after_in_child=_renew_turn)  # the thread that has it is not in the child


@contextmanager
def _generators(device: torch.device) -> Iterator[Callable[[], bool]]:
    """The global generators stay as they are; gives a function that says whether they were used."""
    with _TURN:
        has_drawn = draws_since(device)
        torches = _torch_generators(device)
        before = [generator.get_state() for generator in torches]
        plain, numpys = random.getstate(), np.random.get_state(legacy=False)
        try:
            yield has_drawn
        finally:
            for generator, state in zip(torches, before, strict=True):
                generator.set_state(state)
            random.setstate(plain)
            np.random.set_state(numpys)


def draws_since(device: torch.device) -> Callable[[], bool]:
    """A function that says whether a global generator has been used since now."""

    def states() -> tuple[Any, ...]:
        numpys = np.random.get_state(legacy=False)
        words = [w.tobytes() if isinstance(w, np.ndarray) else w for w in numpys["state"].values()]
        torches = [g.get_state().numpy().tobytes() for g in _torch_generators(device)]
        return random.getstate(), *words, numpys["has_gauss"], numpys["gauss"], *torches

    before = states()
    return lambda: states() != before


def _torch_generators(device: torch.device) -> list[torch.Generator]:
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        generators.append(torch.cuda.default_generators[device.index or 0])
    return generators


def _seed(seed: int, device: torch.device) -> None:
    for generator in _torch_generators(device):
        generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
