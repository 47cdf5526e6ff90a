"""A walk over a chain: the draws, the images' sizes so far, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigkernel.expect import Expect
from bigkernel.transforms.engine.draws import Draws
from bigkernel.transforms.engine.images import Images
from bigkernel.transforms.engine.passes import Part, run_pass
from bigkernel.transforms.engine.samples import Bools, Floats, Ints, some
from bigkernel.transforms.engine.stages import Given, run_stage
from bigkernel.transforms.engine.step import Step

_EXPECT = Expect("transforms")
Sizes = tuple[Ints, Ints]  # heights [N], widths [N]


class Walk:
    """Over a chain without images: it draws the parameters, and collects steps.

    What is asked for sizes after a stage that does not say them raises: see ``sizes``.
    """

    def __init__(
        self,
        draws: Draws,
        height: Ints,
        width: Ints,
        pil: bool = False,
        modes: frozenset[str] = frozenset(),
    ) -> None:
        self.draws = draws
        self.pil = pil  # the images so far are PIL images, not tensors
        self.modes = modes  # theirs
        self.params: list[Any] = []
        self.steps: list[Step] = []
        self._place = -1
        self._sizes: Sizes | None = (height, width)
        self._unknown_after = ""

    def numbers(self) -> Floats:
        """[blocks, N, 4] uniform numbers of the transform that the walk has come to."""
        self._place += 1
        return self.draws.of(self._place)

    @property
    def sizes(self) -> Sizes:
        """Of the images so far."""
        if self._sizes is None:
            raise ValueError(
                f"bigkernel.transforms: parameters can be sampled where sizes are known, got a "
                f"transform that needs them after {self._unknown_after}, whose result may have any "
                "size. Call the chain with images, or define sizes(height, width) in a subclass of "
                "Transform."
            )
        return self._sizes

    def add(self, name: str, params: Any, todo: Sequence[Step]) -> None:
        """What ``draw`` of the transform of this name has returned."""
        self.params.append(params)
        for step in todo:
            if self.pil:
                step = step.of_pictures(self.modes)
            if self._sizes is not None:
                step.check(*self._sizes)
                after = step.sizes(*self._sizes)
                if after[0] is not self._sizes[0] and some((after[0] < 1) | (after[1] < 1)):
                    self._refuse_sizes(name, step, after)
                self._sizes = after
            self.steps.append(step)

    def _refuse_sizes(self, name: str, step: Step, after: Sizes) -> None:
        i = int(np.argmin(np.minimum(*after)))
        which = f"images after its {type(step).__name__}"
        got = f"{(int(after[0][i]), int(after[1][i]))} (height, width) for image {i}"
        raise Expect(name).error(which, "at least one pixel high and wide", got)

    def stage(
        self,
        name: str,
        sizes: Callable[[Ints, Ints], Sizes | None],
        call: Callable[[Given], list[Part]],
        active: Bools,
    ) -> None:
        """A tensor stage; ``sizes`` says those after it, or None where nobody knows."""
        self._sizes = None if self._sizes is None else _told(name, sizes, self._sizes, active)
        if self._sizes is None:
            self._unknown_after = self._unknown_after or name


def _told(
    name: str, sizes: Callable[[Ints, Ints], Sizes | None], before: Sizes, active: Bools
) -> Sizes | None:
    """What a tensor stage's ``sizes`` says of those after it, which are ``before`` it."""
    after: Any = sizes(*(side.copy() for side in before))
    if after is None:
        return None
    pair = isinstance(after, (tuple, list)) and len(after) == 2
    sides = [np.asarray(side) for side in after] if pair else []
    fits = pair and all(
        side.shape in ((), active.shape) and side.dtype.kind in "iuf" and (side == side // 1).all()
        for side in sides
    )
    wanted = f"(heights, widths), whole numbers [{len(active)}] or one for all, or None"
    _EXPECT(fits, f"what sizes of {name} returns", wanted, f"{after!r:.80}")
    height, width = (
        np.where(active, new, old).astype(np.int64) for new, old in zip(sides, before, strict=True)
    )
    return height, width


@dataclass
class Done:
    """What a pass or a tensor stage has done: to how many images, in how many calls for each."""

    images: int = 0
    calls: Sequence[tuple[int, int]] = ()  # of a pass, by the groups that images fall into

    def __str__(self) -> str:
        if not self.calls:
            return _counted(self.images, "image")
        by_count: dict[int, int] = {}
        for images, calls in self.calls:
            by_count[calls] = by_count.get(calls, 0) + images
        return ", ".join(
            f"{_counted(images, 'image')} in {_counted(calls, 'call')}"
            for calls, images in sorted(by_count.items())
        )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


class Run(Walk):
    """A walk with images. Tensor stages run when the walk comes to them, passes before them."""

    def __init__(self, draws: Draws, batch: Images, channels_last: bool) -> None:
        per = batch.frames
        super().__init__(draws, batch.height[::per], batch.width[::per], batch.is_pil, batch.modes)
        self.batch = batch  # the images so far, but for the steps that are still to be done
        self.channels_last = channels_last  # of the result
        self.done: list[Done] = []  # a pass, then a stage and a pass for every stage
        self._staged = False  # images are no longer the caller's own

    def stage(
        self,
        name: str,
        sizes: Callable[[Ints, Ints], Sizes | None],
        call: Callable[[Given], list[Part]],
        active: Bools,
    ) -> None:
        if self.steps:
            self._pass(channels_last=False)
        else:
            self.done.append(Done())
            if not self._staged:  # a stage may work in place, or return what it was given
                self.batch = _own(self.batch)
        self._staged = True
        per = self.batch.frames
        expected = _told(name, sizes, self.sizes, active)
        everyone = np.repeat(active, per)
        if everyone.any():
            modes = self.modes if self.pil else frozenset()
            self.batch = run_stage(name, call, self.batch, everyone, self.draws, self._place, modes)
        self.done.append(Done(int(everyone.sum())))
        found = self.batch.height[::per], self.batch.width[::per]
        self._sizes = found
        if expected is None:
            return
        wrong = (expected[0] != found[0]) | (expected[1] != found[1])
        if wrong.any():
            i = int(np.argmax(wrong))
            said, got = ((int(h[i]), int(w[i])) for h, w in (expected, found))
            wanted = f"of the size that its sizes(height, width) says, {said} for image {i}"
            fix = f"Define sizes in {name}, to return the heights and widths after it, or None"
            raise _EXPECT.error(f"the results of {name}", wanted, str(got), fix)

    def finish(self) -> tuple[Tensor | list[Tensor], bool]:
        """The images after all of it (one batch if they have one size), and their layout."""
        if self.steps or not self._staged:
            self._pass(self.channels_last)
        else:
            self.done.append(Done())
        tensors, last = self.batch.tensors, self.batch.channels_last
        if self.channels_last and not last:
            if isinstance(tensors, Tensor):
                tensors = tensors.movedim(1, -1).contiguous()
            else:
                tensors = [t.movedim(0, -1).contiguous() for t in tensors]
        return tensors, self.channels_last

    def _pass(self, channels_last: bool) -> None:
        batch, chain = self.batch, self.steps
        if batch.frames > 1:
            chain = [step.take(np.arange(batch.count) // batch.frames) for step in chain]
        tensors, groups = run_pass(batch, chain, channels_last)
        height, width = (np.repeat(side, batch.frames) for side in self.sizes)
        self.batch = replace(
            batch, tensors=tensors, height=height, width=width, channels_last=channels_last
        )
        self.steps = []
        calls = [(len(group.members), len(group.calls)) for group in groups]
        self.done.append(Done(batch.count, calls))


def _own(batch: Images) -> Images:
    """Copies of the images, channels first."""

    def copy(image: Tensor) -> Tensor:
        image = image.movedim(-1, -3) if batch.channels_last else image
        return image.clone(memory_format=torch.contiguous_format)

    given = batch.tensors
    tensors = copy(given) if isinstance(given, Tensor) else [copy(image) for image in given]
    return replace(batch, tensors=tensors, channels_last=False)
