"""Augment against torchvision.transforms.v2, sample by sample.

Run with `pytest -m bench benchmarks/test_augment.py`.

64 uint8 images of 256 x 256 to 224 x 224 fp32, parameters of its own for every sample. Cases:
"simple" is resized crop + flip + normalise, "full" adds a rotation and colour jitter in random
order. Every implementation gets the same parameters, drawn beforehand; how close the results are
is asserted before anything is timed.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode

import bigkernel
from bigkernel.ops import augment

pytestmark = pytest.mark.bench

COUNT, SOURCE, SIZE = 64, 256, 224
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
ADJUST = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
KINDS = ("bigkernel", "bigkernel-torch", "torchvision")


@dataclass
class Sample:
    box: tuple[int, int, int, int]  # top, left, height, width
    flip: bool
    angle: float
    order: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)


def draw(generator: torch.Generator) -> Sample:
    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    area, ratio = (
        uniform(0.08, 1.0) * SOURCE**2,
        math.exp(uniform(math.log(3 / 4), math.log(4 / 3))),
    )
    width = min(SOURCE, round(math.sqrt(area * ratio)))
    height = min(SOURCE, round(math.sqrt(area / ratio)))
    top, left = int(uniform(0, SOURCE - height)), int(uniform(0, SOURCE - width))
    factors = [uniform(0.6, 1.4), uniform(0.6, 1.4), uniform(0.6, 1.4), uniform(-0.1, 0.1)]
    order = torch.randperm(4, generator=generator).tolist()
    return Sample((top, left, height, width), uniform(0, 1) < 0.5, uniform(-15, 15), order, factors)


def tables(samples: list[Sample], full: bool) -> tuple[Tensor, Tensor | None]:
    geometry = torch.zeros(len(samples), 16, dtype=torch.float64)
    for row, sample in zip(geometry, samples, strict=True):
        top, left, height, width = sample.box
        scale = width / SIZE
        crop = [[scale, 0, left], [0, height / SIZE, top], [0, 0, 1]]
        if sample.flip:
            crop[0] = [-scale, 0, left + width]
        matrix = torch.tensor(crop, dtype=torch.float64)
        if full:
            c, s = math.cos(math.radians(sample.angle)), math.sin(math.radians(sample.angle))
            h = SIZE / 2
            turn = [[c, -s, h - c * h + s * h], [s, c, h - s * h - c * h], [0, 0, 1]]
            matrix = matrix @ torch.tensor(turn, dtype=torch.float64)
        row[:6] = matrix[:2].flatten()
        row[6:10] = torch.tensor([left, top, left + width, top + height])
        row[10:14] = torch.tensor([0, 0, SIZE, SIZE])
        row[14] = 0 if full else 1
    if not full:
        return geometry, None
    color = [[[k + 1 + 16, s.factors[k]] for k in s.order] for s in samples]
    return geometry, torch.tensor(color, dtype=torch.float32)


def torchvision_batch(images: Tensor, samples: list[Sample], full: bool) -> Tensor:
    out = []
    for image, sample in zip(images, samples, strict=True):
        x = F.resized_crop(image, *sample.box, [SIZE, SIZE], antialias=True)
        if sample.flip:
            x = F.horizontal_flip(x)
        if full:
            x = F.rotate(x, sample.angle, InterpolationMode.BILINEAR, fill=0)
            for k in sample.order:
                x = ADJUST[k](x, sample.factors[k])
        out.append(F.normalize(F.to_dtype(x, torch.float32, scale=True), MEAN, STD))
    return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["simple", "full"])
def test_augment_batch(benchmark, case, kind):
    full = case == "full"
    generator = torch.Generator().manual_seed(0)
    samples = [draw(generator) for _ in range(COUNT)]
    coarse = torch.rand(COUNT, 3, 32, 32, generator=generator) * 255
    images = torch.nn.functional.interpolate(coarse, SOURCE, mode="bilinear").to(torch.uint8)
    geometry, color = tables(samples, full)

    def run() -> Tensor:
        if kind == "torchvision":
            return torchvision_batch(images, samples, full)
        return augment(
            images, geometry, color, size=(SIZE, SIZE), mean=MEAN, std=STD, dtype=torch.float32
        )

    benchmark.group = case
    with bigkernel.use_backend("torch" if kind == "bigkernel-torch" else None):
        few = samples[:4]
        apart = (run()[:4] - torchvision_batch(images[:4], few, full)).abs().mean() * 0.225 * 255
        assert apart < 2, f"the results are {apart} LSB apart on average"
        benchmark.pedantic(run, rounds=5, warmup_rounds=1)
