"""Chains of transforms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import nn

from bigkernel.errors import check
from bigkernel.transforms import _arguments as arguments
from bigkernel.transforms._draws import Bools
from bigkernel.transforms._transform import Params, Sampling, Transform


class _Container(Transform):
    is_chain: ClassVar[bool] = True

    def __init__(self, transforms: Sequence[Transform] | nn.ModuleList) -> None:
        super().__init__()
        name = type(self).__name__
        check(
            isinstance(transforms, (Sequence, nn.ModuleList)),
            name,
            "transforms",
            "a sequence of transforms",
            type(transforms).__name__,
            cls=TypeError,
        )
        check(len(transforms) > 0, name, "transforms", "at least one transform", "none")
        for i, transform in enumerate(transforms):
            check(
                isinstance(transform, Transform),
                name,
                f"transforms[{i}]",
                "a transform of bigkernel.transforms",
                type(transform).__name__,
                "Apply other callables to the images before or after",
                TypeError,
            )
        self.transforms = transforms

    def _inner(self) -> Iterator[Transform]:
        for transform in self.transforms:
            assert isinstance(transform, Transform)
            yield transform

    def chain(self) -> Iterator[Transform]:
        for transform in self._inner():
            yield from transform.chain()

    def extra_repr(self) -> str:
        if isinstance(self.transforms, nn.ModuleList):
            return ""  # nn.Module prints them itself
        return "\n".join(map(str, self.transforms))


class Compose(_Container):
    """Transforms one after another, folded into one ``augment`` call where that is right.

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

    def walk(self, sampling: Sampling, active: Bools) -> None:
        for transform in self._inner():
            transform.walk(sampling, active)


class RandomApply(_Container):
    """Applies all of ``transforms`` with probability ``p``, or none of them."""

    blocks: ClassVar[int] = 1

    def __init__(self, transforms: Sequence[Transform] | nn.ModuleList, p: float = 0.5) -> None:
        super().__init__(transforms)
        self.p = arguments.probability("RandomApply", p)

    def extra_repr(self) -> str:
        return "\n".join(filter(None, [super().extra_repr(), f"p={self.p}"]))

    def chain(self) -> Iterator[Transform]:
        yield self  # its own draw comes first
        yield from super().chain()

    def walk(self, sampling: Sampling, active: Bools) -> None:
        active = active & (sampling.numbers()[0, :, 0] < self.p)
        sampling.add(Params(active))
        for transform in self._inner():
            transform.walk(sampling, active)
