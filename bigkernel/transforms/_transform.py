"""The base of every transform: drawing parameters, folding steps, running the op."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bigkernel._eager import eager
from bigkernel.errors import check
from bigkernel.ops.augment import augment
from bigkernel.transforms import _steps as steps
from bigkernel.transforms._arguments import InterpolationMode
from bigkernel.transforms._draws import Bools, Draws, Floats, Ints, keys
from bigkernel.transforms._fold import fold
from bigkernel.transforms._images import BYTE_MODES, INDEXED_MODES, Images, gather
from bigkernel.transforms._segment import Call
from bigkernel.transforms._steps import Step


@dataclass
class Params:
    """The parameters of one transform for a batch; every field has one entry a sample.

    ``active`` [N]: whether the transform does anything to the sample.
    """

    active: Bools


@dataclass
class Sampling:
    """A walk over a chain: the draws, the images' sizes so far, and what came of it."""

    draws: Draws
    height: Ints
    width: Ints
    pil: bool  # the images so far are PIL images, not tensors
    modes: frozenset[str] = frozenset()  # theirs
    visited: int = 0
    params: list[Params] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def numbers(self) -> Floats:
        """[blocks, N, 4] uniform numbers of the transform that the walk has come to."""
        self.visited += 1
        return self.draws.of(self.visited - 1)

    def add(self, params: Params, *todo: Step) -> None:
        self.params.append(params)
        for step in todo:
            if self.pil:
                step = _for_pictures(step, self.modes)
            self.height, self.width = step.sizes(self.height, self.width)
            self.steps.append(step)


def _for_pictures(step: Step, modes: frozenset[str]) -> Step:
    """As Pillow does it: the values of some modes are no colours, or cannot be blended."""
    check(
        not isinstance(step, steps.Color) or not step.active.any() or modes <= BYTE_MODES,
        "transforms",
        "images",
        f"PIL images of mode {', '.join(sorted(BYTE_MODES))} for colour transforms",
        f"mode {', '.join(sorted(modes - BYTE_MODES))}",
        'Convert with image.convert("RGB")',
    )
    if modes & INDEXED_MODES and isinstance(step, steps.Resize):
        return replace(step, interpolation=InterpolationMode.NEAREST_EXACT)
    if modes & INDEXED_MODES and isinstance(step, steps.Affine):
        return replace(step, interpolation=InterpolationMode.NEAREST)
    return step


class Transform(nn.Module):
    """A transform of image batches with random parameters of their own for every image.

    Call it as ``t(images, generator=None, ids=None, layout=None)``.

    images:
        a batch [N, C, H, W] or [N, H, W, C] or one image [C, H, W] or [H, W, C], floats (0..1) or
        whole numbers (0 to the dtype's largest, 255 for uint8; bool 0..1); a PIL image; an array
        [H, W, C] or [H, W], or of a batch; or a list of images, which may differ in size. Of a
        tensor with more dimensions, [N, T, C, H, W] say, the first counts samples: the images of a
        sample share its parameters, as frames of a clip have to.
        PIL images of modes P and 1 are sampled by "nearest", as Pillow does.
    layout:
        "channels_first", "channels_last", or "auto": the channels are in the last dimension if
        only that one of the three counts 1, 3 or 4, and in the first otherwise, as for torchvision
        (in an array of one picture, in the last). None takes the attribute ``layout`` of the
        transform, which is "auto" until it is set.
    generator:
        where random numbers come from, torch's default generator (``torch.manual_seed``) if None.
    ids:
        without them, each call draws its numbers from the generator, which advances, as those of
        torch and torchvision do: objects and calls are independent of each other, and the same
        seed again repeats what followed it. In a chain the outermost transform draws for all. A
        transform without random parameters leaves the generator alone.
        With them, one whole number an image, the generator only gives the seed it was made with
        and is not advanced. The parameters of an image are a function of (seed, id, place of the
        transform in the chain), whatever the object, the call, the batch, its order or the device:
        the same id gets the same parameters until the seed changes.

    Returns what it was given: a batch for a batch, in the same layout, an image for an image, a
    PIL image for a PIL image, a list of them for a list of them. A list of tensors comes back as
    one batch if all results have one size, else as a list. ``ToImage`` in the chain makes it
    tensors with the channels first. The dtype stays, unless ``ToDtype`` or ``Normalize`` (whole
    numbers to float32) change it. Floats keep their gradient, which PyTorch computes, as it does
    all of such a call (see ``bigkernel.explain``).

    torch.fx.symbolic_trace keeps a transform as one call. TorchScript, tracing and export do not
    know them: they refuse with a sentence.

    ``t.sample(sizes, generator, ids)`` returns the parameters alone.
    """

    blocks: ClassVar[int] = 0  # of four random numbers, for each image

    def __init__(self) -> None:
        super().__init__()
        self.layout = "auto"

    def walk(self, sampling: Sampling, active: Bools) -> None:
        """Draws parameters for the ``active`` images and adds what is to be done to them."""
        raise NotImplementedError

    def chain(self) -> Iterator[Transform]:
        """The transforms by their numbers: depth first, without Compose, which draws nothing."""
        yield self

    def gives_tensor(self) -> bool:
        """Whether ``ToImage`` is in the chain."""
        return any(t.makes_tensor for t in self.chain())

    makes_tensor: ClassVar[bool] = False

    # Drawing reads a generator and computes in NumPy: a compiled caller calls it as it is.
    @eager
    def forward(
        self,
        images: Any,
        generator: torch.Generator | None = None,
        ids: Any = None,
        layout: str | None = None,
    ) -> Any:
        """See the class."""
        if isinstance(images, torch.fx.Proxy):
            return self._symbolic(images, generator=generator, ids=ids, layout=layout)
        batch = gather(images, self.layout if layout is None else layout)
        if batch.count == 0:
            return self._empty(batch)
        height, width = batch.height[:: batch.frames], batch.width[:: batch.frames]
        sampling = self._draw(height, width, generator, ids, batch.is_pil, batch.modes)
        chain = sampling.steps
        if batch.frames > 1:
            chain = [step.take(np.arange(batch.count) // batch.frames) for step in chain]
        result, channels_last = _run(batch, chain, self.gives_tensor())
        return batch.give_back(result, channels_last, self.gives_tensor())

    def sample(
        self,
        sizes: Sequence[tuple[int, int]] | Tensor,
        generator: torch.Generator | None = None,
        ids: Any = None,
    ) -> Any:
        """The parameters that a call with images of these sizes would draw.

        sizes: (height, width) of each image; generator and ids as in a call: without ids, the
        generator advances, and the next call draws others. Returns the transform's parameters, a
        dataclass of NumPy arrays with one entry an image; a chain returns a list with one entry a
        transform, depth first (a RandomApply before those inside it).
        """
        table = np.asarray(sizes)
        whole = np.issubdtype(table.dtype, np.integer) or table.size == 0
        fits = whole and (table.size == 0 or (table.shape[1:] == (2,) and table.min() > 0))
        check(fits, "transforms", "sizes", "positive pairs (height, width)", repr(sizes))
        table = table.astype(np.int64).reshape(-1, 2)
        params = self._draw(table[:, 0], table[:, 1], generator, ids, pil=False).params
        return params if self.is_chain else params[0]

    is_chain: ClassVar[bool] = False

    def _draw(
        self,
        height: Ints,
        width: Ints,
        generator: torch.Generator | None,
        ids: Any,
        pil: bool,
        modes: frozenset[str] = frozenset(),
    ) -> Sampling:
        blocks = [t.blocks for t in self.chain()]
        seed, numbers = keys(generator, ids, len(height), draws=any(blocks))
        sampling = Sampling(Draws(seed, numbers, blocks), height, width, pil, modes)
        self.walk(sampling, np.ones(len(height), dtype=bool))
        return sampling

    def _empty(self, batch: Images) -> Any:
        """The result for no images: what one more image would have had, without it."""
        if not isinstance(batch.tensors, Tensor):
            return []
        shape = batch.tensors.shape[1:]
        extra = Images(
            tensors=batch.tensors.new_zeros(1, *shape),
            kind="batch",
            channels_last=batch.channels_last,
            height=np.asarray([shape[0 if batch.channels_last else 1]]),
            width=np.asarray([shape[1 if batch.channels_last else 2]]),
            channels=batch.channels,
            wrapper=batch.wrapper,
            lead=batch.lead,
        )
        sampling = self._draw(extra.height, extra.width, None, [0], pil=False)
        result, channels_last = _run(extra, sampling.steps, self.gives_tensor())
        return extra.give_back(result[:0], channels_last, self.gives_tensor())

    def _symbolic(self, images: torch.fx.Proxy, **arguments: Any) -> torch.fx.Proxy:
        """This call in the graph of torch.fx.symbolic_trace, as that of a layer of torch's."""
        tracer = images.tracer
        owned = any(module is self for module in tracer.root.modules())  # type: ignore[attr-defined]
        check(
            owned and tracer.root is not self,  # type: ignore[attr-defined]
            "transforms",
            "the module that torch.fx traces",
            "a module that holds the transform",
            "the transform itself",
            "It is one call: there is nothing to trace in it",
            NotImplementedError,
        )
        target = tracer.path_of_module(self)  # type: ignore[attr-defined]
        given = {name: value for name, value in arguments.items() if value is not None}
        return tracer.create_proxy("call_module", target, (images,), given)

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            f"bigkernel.{type(self).__name__}: TorchScript cannot compile transforms, which draw "
            "and fold in NumPy. Script the model without them, or use torch.compile."
        )

    def extra_repr(self) -> str:
        """The arguments, as torchvision prints them."""
        shown = (bool, int, float, str, tuple, list, enum.Enum)
        own = ((k, v) for k, v in self.__dict__.items() if k not in ("training", "layout"))
        return ", ".join(
            f"{name}={value.value if isinstance(value, enum.Enum) else value}"
            for name, value in own
            if not name.startswith("_") and isinstance(value, shown)
        )


def _run(
    batch: Images, chain: list[Step], channels_first: bool
) -> tuple[Tensor | list[Tensor], bool]:
    """The images after the steps (one batch if they have one size), and their layout."""
    dtype, _ = batch.like()
    channels_last = batch.channels_last and not channels_first
    groups = fold(chain, batch.height, batch.width, batch.channels, dtype)
    results: list[tuple[Ints, Tensor]] = []  # (places in the batch, images of one size)
    for group in groups:
        images = _pick(batch.tensors, group.members)
        last_in = batch.channels_last
        for call in group.calls[:-1]:
            parts = _apply(images, call, last_in, channels_last)
            images, last_in = _join(parts, len(group.members)), channels_last
        parts = _apply(images, group.calls[-1], last_in, channels_last)
        results += [(group.members[places], part) for places, part in parts]
    dtypes = {part.dtype for _, part in results}
    check(
        len(dtypes) == 1,
        "transforms",
        "the results",
        "of one dtype",
        " and ".join(sorted(map(str, dtypes))),
        "Put ToDtype(torch.float32, scale=True) before a Normalize that is applied at random",
    )
    return _join(results, batch.count), channels_last


def _pick(images: Tensor | list[Tensor], members: Ints) -> Tensor | list[Tensor]:
    if len(members) == len(images):
        return images  # members are ascending, so these are all of them in order
    return [images[i] for i in members.tolist()]


def _apply(
    images: Tensor | list[Tensor], call: Call, channels_last_in: bool, channels_last_out: bool
) -> list[tuple[Ints, Tensor]]:
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


def _join(parts: list[tuple[Ints, Tensor]], count: int) -> Tensor | list[Tensor]:
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
