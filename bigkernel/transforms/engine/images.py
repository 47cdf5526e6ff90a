"""What users pass as images, brought into the form that the augment op takes, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.jit._trace import is_tracing

from bigkernel.expect import Expect, shape_of
from bigkernel.ops.augment.op import check_plain
from bigkernel.ops.augment.reference import OUT_DTYPES
from bigkernel.transforms.engine.samples import Ints

_EXPECT = Expect("transforms")
LAYOUTS = ("auto", "channels_first", "channels_last")
CHANNEL_COUNTS = (1, 3, 4)
BYTE_MODES = frozenset(("L", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"))
INDEXED_MODES = frozenset(("P", "1"))  # places in a palette, black and white: not to be blended
_OF_A_SAMPLE = "Of a sample, with a label or a target, give the image alone"
_PILLOW_MODES = BYTE_MODES | INDEXED_MODES | {"I", "F", "I;16", "I;16L", "I;16B"}


@dataclass
class Images:
    """Images of one dtype, device and number of channels.

    ``tensors``: one batch [N, C, H, W], or N images [C, H, W]; channels last if ``channels_last``.
    ``kind``: "batch", "single" or "list" of tensors, or "pil" or "pils", as they were given.
    ``lead``: of a batch, its dimensions before the last three; images of one place in the first
    (the frames of a clip) share their parameters, and lie one after another in ``tensors``.
    """

    tensors: Tensor | list[Tensor]
    kind: str
    channels_last: bool
    height: Ints
    width: Ints
    channels: int
    wrapper: type[Tensor] | None = None
    pictures: tuple[Any, ...] = ()
    lead: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return len(self.tensors)

    @property
    def frames(self) -> int:
        """How many images share the parameters of a sample."""
        return math.prod(self.lead[1:])

    @property
    def is_pil(self) -> bool:
        return self.kind in ("pil", "pils")

    @property
    def modes(self) -> frozenset[str]:
        return frozenset(picture.mode for picture in self.pictures)

    def like(self) -> tuple[torch.dtype, torch.device]:
        first = self.tensors if isinstance(self.tensors, Tensor) else self.tensors[0]
        return first.dtype, first.device

    def give_back(self, result: Tensor | list[Tensor], channels_last: bool, as_tensor: bool) -> Any:
        """The result in the form that the images had (tensors, if ``as_tensor``)."""
        if self.is_pil and not as_tensor:
            pictures = [
                _to_pil(image if channels_last else image.movedim(0, -1), like)
                for image, like in zip(result, self.pictures, strict=True)
            ]
            return pictures if self.kind == "pils" else pictures[0]
        if len(self.lead) > 1:
            if isinstance(result, Tensor):
                result = result.reshape(*self.lead, *result.shape[1:])
            else:
                starts = range(0, len(result), self.frames)
                clips = [torch.stack(list(result[i : i + self.frames])) for i in starts]
                result = [clip.reshape(*self.lead[1:], *clip.shape[1:]) for clip in clips]
        if self.kind in ("single", "pil"):
            result = result[0]
        if self.wrapper is not None and isinstance(result, Tensor):
            return result.as_subclass(self.wrapper)
        return result


def gather(images: Any, layout: str) -> Images:
    """Images from a tensor, an array, a PIL image, or a list of those."""
    _EXPECT(layout in LAYOUTS, "layout", " or ".join(map(repr, LAYOUTS)), repr(layout))
    if isinstance(images, np.ndarray):
        if images.ndim <= 3 and layout == "auto":
            layout = "channels_last"  # as arrays of one picture are, for torchvision too
        images = _from_numpy(images)
    if isinstance(images, Tensor):
        wrapper = _wrapper("images", images)
        if images.dim() < 3:
            wanted = "a batch [N, C, H, W] or [N, H, W, C], or an image [C, H, W] or [H, W, C]"
            raise _EXPECT.error("images", wanted, shape_of(images))
        last = _channels_last(images, layout)
        single = images.dim() == 3
        plain = images.as_subclass(Tensor)
        batch = plain[None] if single else plain
        lead = tuple(batch.shape[:-3])
        batch = batch.flatten(0, -4) if len(lead) > 1 else batch
        count = batch.shape[0]
        height, width, channels = _extent(batch, last)
        return Images(
            tensors=batch,
            kind="single" if single else "batch",
            channels_last=last,
            height=np.full(count, height),
            width=np.full(count, width),
            channels=channels,
            wrapper=wrapper,
            lead=lead,
        )
    if _is_pil(images):
        return _from_list([images], "pil", layout)
    if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
        wanted = "a tensor, a PIL image, or a list of those"
        raise _EXPECT.error("images", wanted, type(images).__name__, _OF_A_SAMPLE, TypeError)
    return _from_list(list(images), "list", layout)


def _from_numpy(array: np.ndarray) -> Tensor:
    """A tensor of an array, copied only where torch cannot see it, or would warn.

    The first are mirrored views (BGR to RGB) and another byte order, the second arrays that cannot
    be written (those of PIL images, for one).
    """
    array = np.atleast_3d(array)
    if min(array.strides) < 0 or not array.dtype.isnative or not array.flags.writeable:
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(array)


def _from_list(items: list[Any], kind: str, layout: str) -> Images:
    pictures = [_is_pil(item) for item in items]
    if items and all(pictures):
        kind = "pil" if kind == "pil" else "pils"
    tensors: list[Tensor] = []
    lasts: list[bool] = []
    for i, item in enumerate(items):
        if pictures[i]:
            tensor, last = _from_pil(item), True
        elif isinstance(item, np.ndarray):
            tensor, last = _from_numpy(item), True
        else:
            name = f"images[{i}]"
            _EXPECT.kind(name, item, Tensor, "a tensor or a PIL image", _OF_A_SAMPLE)
            _wrapper(name, item)
            _EXPECT.rank(name, item, 3, "an image [C, H, W] or [H, W, C]")
            tensor, last = item.as_subclass(Tensor), _channels_last(item, layout)
        tensors.append(tensor)
        lasts.append(last)
    channels_last = bool(items) and all(lasts)
    if not channels_last:
        tensors = [t.movedim(-1, 0) if last else t for t, last in zip(tensors, lasts, strict=True)]
    extents = [_extent(t, channels_last) for t in tensors]
    indexed = [
        pil and item.mode in INDEXED_MODES for pil, item in zip(pictures, items, strict=True)
    ]
    for i, extent in enumerate(extents):
        if indexed[i] != indexed[0]:
            wanted = "a picture with colours or one without (modes P and 1), as the first image"
            got = f"mode {items[i].mode!r}" if pictures[i] else "a tensor"
            fix = 'Convert them all with image.convert("RGB")'
            raise _EXPECT.error(f"images[{i}]", wanted, got, fix)
        same = (tensors[i].dtype, tensors[i].device, extent[2])
        first = (tensors[0].dtype, tensors[0].device, extents[0][2])
        if same != first:
            wanted = f"{first[0]} on {first[1]} with {first[2]} channels, as the first image"
            got = f"{same[0]} on {same[1]} with {same[2]}"
            fix = 'PIL images: convert them all with image.convert("RGB")' if pictures[i] else ""
            raise _EXPECT.error(f"images[{i}]", wanted, got, fix)
    return Images(
        tensors=tensors,
        kind=kind,
        channels_last=channels_last,
        height=np.asarray([e[0] for e in extents], dtype=np.int64),
        width=np.asarray([e[1] for e in extents], dtype=np.int64),
        channels=extents[0][2] if extents else 3,
        pictures=tuple(items) if kind in ("pil", "pils") else (),
    )


def _wrapper(name: str, tensor: Tensor) -> type[Tensor] | None:
    """torchvision's class of the tensor, which must be Image; None for a plain tensor."""
    check_plain(_EXPECT, name, tensor)
    # Whatever records the operations would record this call's numbers as constants.
    if is_tracing() or get_proxy_mode() is not None:
        wanted = "outside of torch.jit.trace, torch.export and make_fx"
        got = "a call inside, which would be traced with one call's random numbers as constants"
        fix = "Trace the model without its transforms"
        raise _EXPECT.error(name, wanted, got, fix, NotImplementedError)
    kind = type(tensor)
    if not kind.__module__.startswith("torchvision."):
        return None
    fix = "Masks, boxes and videos need torchvision's own transforms"
    got = f"a tv_tensors.{kind.__name__}"
    _EXPECT(kind.__name__ == "Image", name, "images", got, fix, TypeError)
    return kind


def _extent(tensor: Tensor, channels_last: bool) -> tuple[int, int, int]:
    """(height, width, channels), after checking dtype and size."""
    wanted = "of a floating-point, whole-number or bool dtype of torch's"
    fix = "Convert with .to(torch.uint8) or .float()"
    _EXPECT.dtype("images", tensor, OUT_DTYPES, wanted, fix)
    shape = tensor.shape[-3:]
    height, width, channels = shape if channels_last else (shape[1], shape[2], shape[0])
    wanted = "at least one pixel high and wide, with at least one channel"
    _EXPECT(height > 0 and width > 0 and channels > 0, "images", wanted, shape_of(tensor))
    return height, width, channels


def _channels_last(tensor: Tensor, layout: str) -> bool:
    """Whether the last dimension holds the channels: by ``layout``, else by the shape."""
    if layout != "auto":
        return layout == "channels_last"
    return tensor.shape[-1] in CHANNEL_COUNTS and tensor.shape[-3] not in CHANNEL_COUNTS


def _is_pil(item: object) -> bool:
    # By name: Pillow is an optional dependency, and whoever has its images has imported it.
    return any(c.__module__ == "PIL.Image" and c.__name__ == "Image" for c in type(item).__mro__)


def _from_pil(picture: Any) -> Tensor:
    """[H, W, C] of a PIL image: bool (mode 1), uint16 (I;16), int32 (I), float32 (F) or uint8."""
    if picture.mode not in _PILLOW_MODES:
        wanted = f"PIL images of mode {', '.join(sorted(_PILLOW_MODES))}"
        fix = 'Convert with image.convert("RGB")'
        raise _EXPECT.error("images", wanted, f"mode {picture.mode!r}", fix)
    return _from_numpy(np.array(picture))


def _to_pil(image: Tensor, like: Any) -> Any:
    """A PIL image of the mode, palette and notes (such as its colour profile) of ``like``."""
    from PIL import Image

    array = image.detach().cpu().numpy()
    size = (array.shape[1], array.shape[0])
    if like.mode == "1":
        array = np.packbits(array[:, :, 0], axis=1)
    elif like.mode == "I;16B":
        array = array.astype(">u2")
    picture = Image.frombytes(like.mode, size, np.ascontiguousarray(array).tobytes())
    if like.mode == "P":
        kind = like.palette.mode
        picture.putpalette(like.getpalette(kind), kind)
    picture.info = dict(like.info)
    return picture
