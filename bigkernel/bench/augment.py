"""Image augmentation against torchvision v2, albumentations and Kornia.

Every image gets parameters of its own, drawn anew in each call by every library in its own way:
torchvision and albumentations are called image by image, as their data loaders do, and the results
stacked; Kornia takes the batch, as floats. albumentations does not antialias, but where a large
image is made small it takes means over areas (INTER_AREA). The limit is a copy that moves as many
bytes as source and result have together.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigkernel import transforms as T
from bigkernel.bench.case import OURS, REFERENCE, Bar, Case, Ready, on_torch, peer
from bigkernel.bench.limits import copy
from bigkernel.measure import Run
from bigkernel.testing.tolerance import assert_as_accurate

TORCHVISION, ALBUMENTATIONS, KORNIA = "torchvision v2", "albumentations", "Kornia"
PEERS = (TORCHVISION, ALBUMENTATIONS, KORNIA)
SHORT, QUARTER = "rotation and normalisation alone", "the same to a quarter of the pixels"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SEED = 0
DEGREES, JITTER = 15.0, (0.4, 0.4, 0.4, 0.1)


@dataclass(frozen=True)
class Spec:
    """What is done to ``count`` images of ``size`` (height, width).

    ragged: sizes from that down to half of it.
    full: rotation and colour jitter besides crop, flip and normalisation. crop: a random resized
    crop; without it the whole image is resized. device: where the images are.
    """

    name: str
    count: int = 64
    size: tuple[int, int] = (256, 256)
    output: int = 224
    full: bool = False
    crop: bool = True
    ragged: bool = False
    interleaved: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def sizes(self) -> list[tuple[int, int]]:
        height, width = self.size
        if not self.ragged:
            return [self.size] * self.count
        generator = torch.Generator().manual_seed(1)
        part = torch.rand(self.count, 2, generator=generator) / 2 + 0.5
        return [(int(height * y), int(width * x)) for y, x in part.tolist()]


def cases(small: bool = False, device: str = "cpu") -> list[Case]:
    """The table; ``small`` has the same cases at sizes for a test."""
    simple, full = "crop + flip + normalise", "crop + flip + rotate + jitter + normalise"
    few = "64 of 256x256 to 224"
    shape: dict[str, Any] = {"count": 3, "size": (112, 96), "output": 96} if small else {}
    ragged: dict[str, Any] = shape or {"count": 1000, "size": (500, 500)}
    large: dict[str, Any] = {"count": 2, "size": (240, 160), "output": 48} if small else {
        "count": 4, "size": (2000, 3000)
    }  # fmt: skip
    table = [
        (Spec(f"{full}, {few}", full=True, **shape), (2.5, 15.0)),
        (Spec(f"{simple}, {few}", **shape), (3.5, 10.0)),
        (Spec(f"{simple}, {few}, bf16 result", dtype=torch.bfloat16, **shape), None),
        (Spec(f"{simple}, {few}, interleaved", interleaved=True, **shape), None),
        (Spec(f"{simple}, 1,000 of 250..500 a side to 224", ragged=True, **ragged), None),
        (Spec("resize + normalise, 4 of 3000x2000 to 224", crop=False, **large), None),
    ]
    rows = [_case(replace(spec, device=device), bars) for spec, bars in table]
    six = Spec(f"six transforms in a chain, {few}", **shape, device=device)
    return [*rows, _cost_case(six)]


def _cost_case(spec: Spec) -> Case:
    """The cost grows with the pixels of the result, not with the number of transforms."""
    bars = (Bar(0.8, SHORT), Bar(1 / 3, QUARTER))
    return Case(
        "augment", spec.name, (OURS, REFERENCE, SHORT, QUARTER), partial(build_cost, spec), bars
    )


def _case(spec: Spec, bars: tuple[float, float] | None) -> Case:
    wanted = () if bars is None else (Bar(bars[0], ALBUMENTATIONS), Bar(bars[1], TORCHVISION))
    names = (OURS, REFERENCE, *PEERS)
    return Case("augment", spec.name, names, partial(build, spec), wanted)


def build(spec: Spec) -> Ready:
    """Images and one run for each library that is installed."""
    images = photographs(spec)
    chain = our_chain(spec)
    layout = "channels_last" if spec.interleaved else "channels_first"
    given = _batch(spec, images)
    runs: dict[str, Run] = {OURS: lambda: chain(given, layout=layout)}
    runs[REFERENCE] = on_torch(runs[OURS])
    skipped, peers = {}, {}
    for name, make in ((TORCHVISION, Torchvision), (ALBUMENTATIONS, Albumentations),
                       (KORNIA, Kornia)):  # fmt: skip
        try:
            theirs = make(spec)
        except ImportError as error:
            skipped[name] = str(error)
            continue
        if name == KORNIA and spec.ragged:
            skipped[name] = "takes images of one size only"
            continue
        runs[name] = theirs.run(images)
        peers[name] = theirs
    source = sum(image.numel() for image in images)
    result = spec.count * 3 * spec.output**2 * spec.dtype.itemsize
    return Ready(
        runs=runs,
        check=lambda runs: _check(
            spec, images, given, layout, {name: peers[name] for name in runs if name in peers}
        ),
        op="augment",
        tensors=(images[0],),
        limit=copy(source + result),
        skipped=skipped,
    )


def build_cost(spec: Spec) -> Ready:
    """Our long chain, a short one, and the long one to half the side."""
    batch = torch.stack(photographs(spec))

    def chain(side: int, many: bool) -> T.Compose:
        turn: list[T.Transform] = [T.RandomRotation(DEGREES, "bilinear")]
        flips: list[T.Transform] = [T.RandomHorizontalFlip(), T.RandomVerticalFlip()]
        first: list[T.Transform] = [T.Pad(4), T.RandomCrop(side), *flips]
        head = first if many else [T.CenterCrop(side)]
        return T.Compose([*head, *turn, T.Normalize(MEAN, STD)])

    long = chain(spec.output, True)
    short, quarter = chain(spec.output, False), chain(spec.output // 2, True)
    runs: dict[str, Run] = {
        OURS: lambda: long(batch),
        REFERENCE: on_torch(lambda: long(batch)),
        SHORT: lambda: short(batch),
        QUARTER: lambda: quarter(batch),
    }

    def check(runs: dict[str, Run]) -> str:
        for run in runs.values():
            run()
        some, ids = batch[:4], list(range(len(batch[:4])))
        generator = torch.Generator().manual_seed(SEED)
        distance = _from_pytorch(lambda: long(some, generator, ids))
        return f"{spec.name}: as the PyTorch backend, to {distance:.3f} levels of 255"

    result = spec.count * 3 * spec.output**2 * 4
    return Ready(
        runs=runs,
        check=check,
        op="augment",
        tensors=(batch,),
        limit=copy(batch.numel() + result),
    )


def photographs(spec: Spec) -> list[Tensor]:
    """Photograph-like uint8 images [3, H, W]: smooth, with some noise."""
    generator = torch.Generator().manual_seed(0)

    def image(height: int, width: int) -> Tensor:
        coarse = torch.rand(1, 3, 12, 12, generator=generator) * 240
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
        noise = torch.randn(3, height, width, generator=generator) * 4
        return (smooth + noise).clamp(0, 255).to(spec.device, torch.uint8)

    return [image(*size) for size in spec.sizes()]


def _batch(spec: Spec, images: list[Tensor]) -> Any:
    if spec.interleaved:
        images = [image.permute(1, 2, 0).contiguous() for image in images]
    return images if spec.ragged else torch.stack(images)


def our_chain(
    spec: Spec, antialias: bool = True, rotate: bool | None = None, color: bool | None = None
) -> T.Compose:
    """Our chain; with parts left out it still draws the same for those before them."""
    size = (spec.output, spec.output)
    chain: list[T.Transform] = [T.Resize(size, antialias=antialias)]
    if spec.crop:
        chain = [T.RandomResizedCrop(size, antialias=antialias), T.RandomHorizontalFlip()]
    if spec.full if rotate is None else rotate:
        chain.append(T.RandomRotation(DEGREES, "bilinear"))
    if spec.full if color is None else color:
        chain.append(T.ColorJitter(*JITTER))
    return T.Compose([*chain, T.ToDtype(spec.dtype, scale=True), T.Normalize(MEAN, STD)])


@dataclass
class Drawn:
    """What ours drew for one image, in torchvision's terms."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    angle: float = 0.0
    order: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()


def drawn(spec: Spec, count: int) -> list[Drawn]:
    """Of the first ``count`` images, with seed ``SEED`` and ids from 0 on."""
    sizes = spec.sizes()[:count]
    generator = torch.Generator().manual_seed(SEED)
    params = our_chain(spec).sample(sizes, generator, list(range(count)))
    found = []
    for i, (height, width) in enumerate(sizes):
        here = Drawn(0, 0, height, width, False)
        if spec.crop:
            box, flip = params[0], params[1]
            here = Drawn(
                int(box.top[i]), int(box.left[i]), int(box.height[i]), int(box.width[i]),
                bool(flip.active[i]),
            )  # fmt: skip
        if spec.full:
            rotation, color = params[2], params[3]
            here.angle = float(rotation.angle[i])
            here.order = tuple(int(k) for k in color.order[i])
            here.factors = tuple(
                float(f[i]) for f in (color.brightness, color.contrast, color.saturation, color.hue)
            )
        found.append(here)
    return found


class Torchvision:
    """torchvision.transforms.v2, image by image."""

    compared = "all of it"

    def __init__(self, spec: Spec) -> None:
        self.v2 = peer("torchvision.transforms.v2")
        self.F = peer("torchvision.transforms.v2.functional")
        self.spec = spec

    @property
    def chain(self) -> Any:
        """Of one image."""
        v2, spec = self.v2, self.spec
        size = (spec.output, spec.output)
        first = [v2.Resize(size, antialias=True)]
        if spec.crop:
            first = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        if spec.full:
            bilinear = v2.InterpolationMode.BILINEAR
            first += [v2.RandomRotation(DEGREES, bilinear), v2.ColorJitter(*JITTER)]
        return v2.Compose([*first, v2.ToDtype(spec.dtype, scale=True), v2.Normalize(MEAN, STD)])

    def run(self, images: list[Tensor]) -> Run:
        chain = self.chain
        if self.spec.interleaved:
            images = [x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in images]
        return lambda: torch.stack([chain(image) for image in images])

    def alike(self) -> T.Compose:
        """What of our chain ``apply`` repeats."""
        return our_chain(self.spec)

    def apply(self, image: Tensor, drawn: Drawn) -> Tensor:
        return _normalised(self.resample(image, drawn))

    def resample(self, image: Tensor, drawn: Drawn) -> Tensor:
        """All but the normalisation, by torchvision's functions."""
        F = self.F
        size = [self.spec.output] * 2
        box = (drawn.top, drawn.left, drawn.height, drawn.width)
        x = F.resized_crop(image, *box, size, antialias=True)
        if drawn.flip:
            x = F.horizontal_flip(x)
        if self.spec.full:
            x = F.rotate(x, drawn.angle, self.v2.InterpolationMode.BILINEAR)
            adjust = (
                F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue
            )  # fmt: skip
            for k in drawn.order:
                x = adjust[k](x, drawn.factors[k])
        return x


class Albumentations:
    """albumentations on arrays [H, W, 3], image by image, to tensors."""

    compared = "without colours; not antialiased"

    def __init__(self, spec: Spec) -> None:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network
        self.A = peer("albumentations")
        self.to_tensor = peer("albumentations.pytorch").ToTensorV2()
        self.cv2 = peer("cv2")
        # Its own way of shrinking without aliasing is the mean over an area.
        self.filter = self.cv2.INTER_LINEAR if spec.crop else self.cv2.INTER_AREA
        self.spec = spec

    def run(self, images: list[Tensor]) -> Run:
        A, spec = self.A, self.spec
        self.cv2.setNumThreads(torch.get_num_threads())
        size = (spec.output, spec.output)
        first = [A.Resize(*size, interpolation=self.filter)]
        if spec.crop:
            first = [A.RandomResizedCrop(size, scale=(0.08, 1.0)), A.HorizontalFlip(p=0.5)]
        if spec.full:
            first += [A.Rotate((-DEGREES, DEGREES), p=1.0), A.ColorJitter(
                (0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=1.0
            )]  # fmt: skip
        chain = A.Compose([*first, A.Normalize(MEAN, STD), self.to_tensor])
        arrays = _arrays(images)
        return lambda: torch.stack([chain(image=x)["image"] for x in arrays]).to(spec.dtype)

    def alike(self) -> T.Compose:
        """What of our chain ``apply`` repeats."""
        return our_chain(self.spec, antialias=not self.spec.crop, color=False)

    def apply(self, image: Tensor, drawn: Drawn) -> Tensor:
        A, size = self.A, self.spec.output
        right, bottom = drawn.left + drawn.width, drawn.top + drawn.height
        steps = [
            A.Crop(drawn.left, drawn.top, right, bottom),
            A.Resize(size, size, interpolation=self.filter),
        ]
        steps += [A.HorizontalFlip(p=1.0)] if drawn.flip else []
        if self.spec.full:
            steps.append(A.Rotate((drawn.angle, drawn.angle), p=1.0))
        (array,) = _arrays([image])
        return _normalised(
            torch.from_numpy(A.Compose(steps)(image=array)["image"]).permute(2, 0, 1)
        )


class Kornia:
    """kornia.augmentation on the batch."""

    compared = "without rotation and colours; not antialiased"

    def __init__(self, spec: Spec) -> None:
        self.K = peer("kornia.augmentation")
        self.geometry = peer("kornia.geometry.transform")
        self.spec = spec

    def run(self, images: list[Tensor]) -> Run:
        K, spec = self.K, self.spec
        size = (spec.output, spec.output)
        first = [K.Resize(size, antialias=True)]
        if spec.crop:
            first = [
                K.RandomResizedCrop(size, scale=(0.08, 1.0), align_corners=False),
                K.RandomHorizontalFlip(p=0.5),
            ]
        if spec.full:
            first += [K.RandomRotation(DEGREES, p=1.0), K.ColorJitter(*JITTER, p=1.0)]
        chain = K.AugmentationSequential(
            *first, K.Normalize(torch.tensor(MEAN), torch.tensor(STD)), data_keys=["input"]
        )
        batch = torch.stack(images)

        def run() -> Tensor:
            out: Tensor = chain(batch.to(torch.float32) / 255)
            return out.to(spec.dtype)

        return run

    def alike(self) -> T.Compose:
        """What of our chain ``apply`` repeats."""
        return our_chain(self.spec, antialias=False, rotate=False, color=False)

    def apply(self, image: Tensor, drawn: Drawn) -> Tensor:
        right, bottom = drawn.left + drawn.width, drawn.top + drawn.height
        part = image[None, :, drawn.top : bottom, drawn.left : right].float() / 255
        x = self.geometry.resize(part, (self.spec.output,) * 2, align_corners=False)
        x = self.geometry.hflip(x) if drawn.flip else x
        return (x[0] - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _arrays(images: Sequence[Tensor]) -> list[Any]:
    return [np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in images]


def _normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (x.float() / 255 - mean) / std


_LEVEL = 1 / 255 / 0.225  # one of the 256 levels, after normalisation


def apart(a: Tensor, b: Tensor) -> float:
    """Mean distance of two results, in levels of 255."""
    return float((a.float() - b.float()).abs().mean()) / _LEVEL


def _from_pytorch(call: Callable[[], Tensor]) -> float:
    """The distance of our result from the PyTorch backend's, once it is found small."""
    ours = call()
    # fp32 differs by the order of its sums; bf16 has eight bits, half a level near white.
    allowed = 0.05 if ours.dtype == torch.float32 else 0.5
    distance = apart(ours, on_torch(call)())
    assert distance < allowed, f"{distance:.3f} levels from the PyTorch backend"
    return distance


def _check(
    spec: Spec,
    images: list[Tensor],
    given: Any,
    layout: str,
    peers: dict[str, Any],
) -> str:
    """Ours against float64, its own PyTorch backend and each peer, on the first images."""
    count = min(4, spec.count)
    parameters = drawn(spec, count)
    given = given[:count]

    def call(chain: T.Compose, images: Any = given) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        out: Tensor = chain(images, generator, list(range(count)), layout)
        return out.permute(0, 3, 1, 2) if spec.interleaved else out

    ours, wide = our_chain(spec), our_chain(replace(spec, dtype=torch.float64))
    # Of bytes colours are rounded to whole ones on the way, which float64 shows nothing of.
    exact = on_torch(call)(wide, _floats(given, torch.float64))
    source = _floats(given, torch.float32) if spec.full else given
    assert_as_accurate(call(ours, source), exact, on_torch(call)(ours, source))
    said = [f"{_from_pytorch(lambda: call(ours)):.2f} from PyTorch"]
    for name, made in peers.items():
        theirs = [made.apply(image, d) for image, d in zip(images, parameters, strict=False)]
        distance = apart(call(made.alike()), torch.stack(theirs))
        assert distance < 2, f"{name} is {distance:.2f} levels of 255 away on average"
        said.append(f"{distance:.2f} from {name} ({made.compared})")
    return (
        f"{spec.name}: to twice PyTorch's error against float64; mean distance in levels of 255: "
        f"{', '.join(said)}"
    )


def _floats(images: Any, dtype: torch.dtype) -> Any:
    """Images of bytes as floats from 0 to 1."""
    if isinstance(images, list):
        return [_floats(image, dtype) for image in images]
    return images.to(dtype) / 255
