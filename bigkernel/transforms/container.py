"""Chains of transforms, and what comes into them from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from bigkernel.expect import Expect
from bigkernel.transforms import arguments
from bigkernel.transforms.engine.passes import Part
from bigkernel.transforms.engine.samples import Bools, Ints
from bigkernel.transforms.engine.stages import Given, call_foreign
from bigkernel.transforms.engine.walk import Walk
from bigkernel.transforms.one import One
from bigkernel.transforms.transform import Params, Transform


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


class Stage(Transform):
    """A tensor stage made of a function: ``function(images, u)``.

    It is given images [M, C, H, W] of one size and, float32 [blocks, M, 4], numbers in [0, 1) that
    are keyed by (seed, id, place in the chain), and returns as many images, of any size: see
    :meth:`Transform.transform`. A class of its own, with arguments that are printed, is a subclass
    of Transform. To be pickled, ``function`` must be one that has a name in its module.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], blocks: int = 1) -> None:
        super().__init__()
        Expect("Stage")(callable(function), "function", "callable", repr(function), cls=TypeError)
        self._function = function
        self.blocks = blocks
        self._block_count()

    def extra_repr(self) -> str:
        return f"{_name_of(self._function)}, blocks={self.blocks}"

    def transform(self, images: Tensor, u: Tensor) -> Tensor:
        return self._function(images, u)

    def sizes(self, height: Ints, width: Ints) -> None:
        return None

    def _label(self) -> str:
        return _name_of(self._function)

    def _name(self) -> str:
        return f"Stage({self._label()})"


class _Foreign(Transform):
    """A callable that a chain holds and that is no Transform, as a tensor stage."""

    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any], place: str) -> None:
        super().__init__()
        object.__setattr__(self, "_function", function)  # not a module of this one's
        self._place = place

    def sizes(self, height: Ints, width: Ints) -> None:
        return None

    def _label(self) -> str:
        return _name_of(self._function)

    def _name(self) -> str:
        return f"{self._place} ({self._label()})"

    def _call(self, given: Given) -> list[Part]:
        return call_foreign(self._name(), self._function, given)


class _Container(Transform):
    _is_chain: ClassVar[bool] = True

    def __init__(
        self, transforms: Sequence[Transform | Callable[..., Any]] | nn.ModuleList
    ) -> None:
        super().__init__()
        expect = self._expect
        kinds = (Sequence, nn.ModuleList)
        expect.kind("transforms", transforms, kinds, "a sequence of transforms")
        expect(len(transforms) > 0, "transforms", "at least one transform", "none")
        self.transforms = transforms
        list(self._inner())

    def _inner(self) -> Iterator[Transform]:
        transforms: Iterable[Any] = self.transforms
        for i, transform in enumerate(transforms):
            if isinstance(transform, Transform):
                yield transform
                continue
            is_class = isinstance(transform, type)
            if is_class or not callable(transform):
                raise self._expect.error(
                    f"transforms[{i}]",
                    "a transform or another callable, from images to images",
                    f"the class {transform.__name__}" if is_class else repr(transform),
                    f"Make one: {transform.__name__}(...)" if is_class else "",
                    TypeError,
                )
            yield _Foreign(transform, f"transforms[{i}]")

    def _chain(self) -> Iterator[Transform]:
        for transform in self._inner():
            yield from transform._chain()

    def _leaves(self) -> Iterator[tuple[str, Transform]]:
        for transform in self._inner():
            yield from transform._leaves()

    def _visit(self, walk: Walk, active: Bools) -> None:
        for transform in self._inner():
            transform._visit(walk, active)

    def extra_repr(self) -> str:
        if isinstance(self.transforms, nn.ModuleList):
            return ""  # nn.Module prints them itself
        return "\n".join(map(str, self.transforms))


class Compose(_Container):
    """Transforms one after another, folded into one ``augment`` call where that is right.

    Beside those of this package and subclasses of :class:`Transform`, ``transforms`` may hold any
    callable that takes a batch [N, C, H, W] and returns one, such as a module or a transform of
    torchvision's. It is a tensor stage: what comes before and after it is folded. If it draws from
    a global generator of torch, NumPy or Python, it is called for one sample after another, with
    those generators seeded by (seed, id, place in the chain), and leaves them as they were. One
    with the arguments ``generator`` and ``ids`` is called with those: once, if it takes the seed
    of that generator and the ids alone; if it draws from it, for one sample after another too.
    What it draws from generators of its own is not seen. The global generators are the process's:
    no other thread may draw from them while a chain with such stages runs, but for other chains.
    ``explain()`` shows the stages.

    One call resamples each image once, then recolours and normalises it. Folding changes nothing
    but this:

    - Two resamplings (a resized crop and a rotation, say) become one, at the finest interpolation
      in the call (bilinear, if any is) and with antialias, if any has it. So the image is blurred
      once, not twice.
    - Pixels outside an earlier crop count as fill for a later rotation or affine map, as they do
      one after another. A crop of a resized image ends within half a pixel of where it would.
    - The outermost pixels of a padded image that is then warped bilinearly blend plainly with the
      fill; torchvision's blend, when it is given a fill, weighs them twice.
    - A nearest rotation or affine map takes the pixels that torchvision's takes, to the last one,
      where the call holds no flip or padding before it and no crop or padding after it, and where
      torch's products are fused, as on Intel's processors. With one,
      a point on the edge of two pixels takes the even one, not the one that the rounding of
      torchvision's float32 positions picks: one pixel in 100,000 at angles drawn at random, up to
      half of them where points lie on edges by design (45 degrees and twice the size), and always
      the pixel next to it.
    - Values are not rounded to the dtype between transforms, except between colour operations on
      uint8 images, which round as torchvision's do.

    ``tests/test_transforms_folding.py`` and ``tests/test_transforms_ties.py`` measure the
    differences. Where folding would change more, the chain takes another call: geometry after
    colour (but for flips, and crops without contrast before them), a warp after a rotation or
    affine map, a resize or another fill after padding, colour after ``Normalize``.
    """

    def _one(self, one: One) -> bool:
        chain: list[Any] = list(self.transforms)
        # All of them are asked before the first one draws.
        return all(isinstance(t, Transform) and t._one is not None for t in chain) and all(
            map(one.write, chain)
        )


class RandomApply(_Container):
    """Applies all of ``transforms`` with probability ``p``, or none of them."""

    blocks = 1

    def __init__(
        self,
        transforms: Sequence[Transform | Callable[..., Any]] | nn.ModuleList,
        p: float = 0.5,
    ) -> None:
        super().__init__(transforms)
        self.p = arguments.probability(Expect("RandomApply"), p)

    def extra_repr(self) -> str:
        return "\n".join(filter(None, [super().extra_repr(), f"p={self.p}"]))

    def _chain(self) -> Iterator[Transform]:
        yield self  # its own draw comes first
        yield from super()._chain()

    def _leaves(self) -> Iterator[tuple[str, Transform]]:
        for name, transform in super()._leaves():
            yield f"{name} (p={self.p})", transform

    def _visit(self, walk: Walk, active: Bools) -> None:
        active = active & (walk.numbers()[0, :, 0] < self.p)
        walk.params.append(Params(active))
        super()._visit(walk, active)
