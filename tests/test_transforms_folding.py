"""Compose folds a chain into the fewest calls that are right: which, and what folding changes.

The reference does the chain one step after another, each step alone through the same op, with the
same parameters. Most chains have to agree with it exactly (float64 images, so only rounding in
the last bits is left). Where two resamplings become one, the difference is measured and bounded.
"""

from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bigkernel
from bigkernel import transforms as bk
from bigkernel.transforms import steps
from bigkernel.transforms.engine import passes
from bigkernel.transforms.engine.draws import Draws, Key
from bigkernel.transforms.engine.fold import fold
from bigkernel.transforms.engine.images import gather
from bigkernel.transforms.engine.passes import run_pass
from bigkernel.transforms.engine.walk import Walk


@pytest.fixture(autouse=True)
def float64_backend() -> Iterator[None]:
    with bigkernel.use_backend("torch"):
        yield


def scene(n: int = 8, height: int = 33, width: int = 41, seed: int = 2) -> Tensor:
    """float64 [n, 3, height, width]: soft shapes with a few edges, as photographs have."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 7, 8, generator=generator, dtype=torch.float64)
    soft = torch.nn.functional.interpolate(
        coarse, (height, width), mode="bicubic", align_corners=False
    )
    edges = torch.nn.functional.interpolate(coarse[:, :, :4, :5], (height, width)) > 0.6
    return (0.7 * soft + 0.3 * edges).clamp(0, 1)


def draw(chain: bk.Transform, images: Tensor, seed: int = 7) -> Walk:
    n, _, height, width = images.shape
    key = Key(torch.Generator().manual_seed(seed), np.arange(n), n)
    draws = Draws(key, [t.blocks for t in chain._chain()])
    return chain._walk(Walk(draws, np.full(n, height), np.full(n, width)))


def one_after_another(chain: bk.Transform, images: Tensor) -> Tensor:
    result: Any = images
    for step in draw(chain, images).steps:
        result, _ = run_pass(gather(result, "channels_first"), [step], channels_last=False)
    return result


def folded(chain: bk.Transform, images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return chain(images, generator, range(len(images)), layout="channels_first")


def calls(chain: bk.Transform, images: Tensor) -> list[int]:
    """How many calls each sample's group takes."""
    n, channels, height, width = images.shape
    groups = fold(
        draw(chain, images).steps, np.full(n, height), np.full(n, width), channels, images.dtype
    )
    members = np.concatenate([g.members for g in groups])
    assert sorted(members.tolist()) == list(range(n))
    return sorted(len(g.calls) for g in groups)


ROTATION = bk.RandomRotation(40, "bilinear")
JITTER = bk.ColorJitter(0.4, 0.4, 0.4, 0.1)
PLAIN_JITTER = bk.ColorJitter(brightness=0.4, saturation=0.4, hue=0.1)
NORMALIZE = bk.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])

EXACT = {
    # what stays one call
    "flips-crop-pad": (
        [
            bk.RandomHorizontalFlip(),
            bk.RandomCrop(20),
            bk.Pad(3, fill=0.2),
            bk.RandomVerticalFlip(),
        ],
        1,
    ),
    "cifar": ([bk.RandomCrop(33, padding=4), bk.RandomHorizontalFlip(), NORMALIZE], 1),
    "crop-rotate": ([bk.RandomCrop((20, 25)), ROTATION], 1),
    "crop-rotate-nearest": ([bk.RandomCrop((20, 25)), bk.RandomRotation(40, fill=0.5)], 1),
    "flip-crop-affine": (
        [
            bk.RandomHorizontalFlip(),
            bk.CenterCrop(20),
            bk.RandomAffine(20, (0.1, 0.1), (0.7, 1.5), 10, "bilinear", (0.1, 0.2, 0.3)),
        ],
        1,
    ),
    "pad-rotate-black": ([bk.Pad(5), ROTATION], 1),
    "pad-rotate-nearest": ([bk.Pad((0, 1, 5, 7), fill=0.3), bk.RandomRotation(40, fill=0.3)], 1),
    "rotate-crop-flip-pad": (
        [ROTATION, bk.RandomCrop(20), bk.RandomHorizontalFlip(), bk.Pad(2)],
        1,
    ),
    "crop-resize": ([bk.RandomCrop(25), bk.RandomVerticalFlip(), bk.Resize((17, 40))], 1),
    "resize-pad-flip": ([bk.Resize((20, 50)), bk.Pad(2, fill=1), bk.RandomHorizontalFlip()], 1),
    "resize-shift": ([bk.Resize((20, 50)), bk.RandomAffine(0, (0.2, 0.2), fill=0.4)], 1),
    "edge-pad-flip-crop-pad": (
        [
            bk.Pad(4, padding_mode="edge"),
            bk.RandomHorizontalFlip(),
            bk.RandomCrop(30),
            bk.Pad(2, fill=0.7),
        ],
        1,
    ),
    "quarter-turn-resize": ([bk.RandomRotation((90, 90), expand=True), bk.Resize((20, 50))], 1),
    "jitter-flip": ([JITTER, bk.RandomHorizontalFlip(), bk.RandomVerticalFlip()], 1),
    "jitter-crop-no-contrast": ([PLAIN_JITTER, bk.RandomCrop(20)], 1),
    "jitter-twice": ([JITTER, bk.RandomGrayscale(0.5), JITTER, NORMALIZE], 1),
    "normalize-rotate-nearest": ([NORMALIZE, bk.RandomRotation(40, fill=(0.1, -2, 3))], 1),
    "normalize-rotate-no-fill": ([NORMALIZE, bk.RandomRotation(40, "bilinear", fill=None)], 1),
    "normalize-twice": ([NORMALIZE, bk.Pad(2, fill=(3, 2, 1)), NORMALIZE], 1),
    "training": (
        [
            bk.RandomResizedCrop(24),
            bk.RandomHorizontalFlip(),
            JITTER,
            bk.RandomGrayscale(),
            NORMALIZE,
        ],
        1,
    ),
    # what has to be cut
    "two-fills": ([bk.Pad(5, fill=0.3), ROTATION], 2),
    "pad-resize": ([bk.Pad(3), bk.Resize((20, 20))], 2),
    "edge-pad-rotate": ([bk.Pad(3, padding_mode="edge"), ROTATION], 2),
    "rotate-rotate": ([ROTATION, bk.RandomRotation(30, "bilinear")], 2),
    "jitter-rotate": ([PLAIN_JITTER, ROTATION], 2),
    "jitter-resized-crop": ([JITTER, bk.RandomResizedCrop(20)], 2),
    "contrast-crop": ([bk.ColorJitter(contrast=0.4), bk.RandomCrop(20)], 2),
    "normalize-jitter": ([NORMALIZE, JITTER], 2),
    "normalize-rotate": ([NORMALIZE, bk.RandomRotation(40, "bilinear", fill=(0.1, -2, 3))], 2),
    "enlarge-crop-rotate": ([bk.Resize((60, 150)), bk.CenterCrop((51, 47)), ROTATION], 2),
    "flip-nearest-resize": (
        [bk.RandomHorizontalFlip(1.0), bk.Resize((20, 30), "nearest")],
        2,
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_folding_is_exact(name: str) -> None:
    transforms, expected_calls = EXACT[name]
    chain = bk.Compose(transforms)
    images = scene(4)
    assert calls(chain, images) == [expected_calls]
    torch.testing.assert_close(
        folded(chain, images), one_after_another(chain, images), rtol=1e-6, atol=2e-6
    )


def random_chain(random: Random) -> bk.Compose:
    """Up to five transforms, of which one at most resamples: folding has to be exact."""
    fill = random.choice([0, 0, 0.3, (0.1, 0.2, 0.3)])
    border = random.choice(["constant", "constant", "edge"])
    width, height = random.randint(8, 40), random.randint(8, 40)
    nearest = random.choice(["nearest", "nearest-exact"])
    whole = [
        bk.RandomHorizontalFlip(),
        bk.RandomVerticalFlip(),
        bk.RandomCrop((height // 2, width // 2), random.choice([None, 3]), True, fill, border),
        bk.CenterCrop((height, width)),
        bk.Pad(random.choice([1, (2, 3), (0, 1, 4, 2)]), fill, border),
        bk.RandomRotation((random.choice([90, 180, 270]),) * 2, expand=True, fill=fill),
        bk.RandomAffine(0, (0.3, 0.3), fill=fill),
        bk.ColorJitter(0.4, random.choice([None, 0.4]), 0.4, 0.1),
        bk.RandomGrayscale(0.5),
        NORMALIZE,
    ]
    # A fill in bilinear warps makes the rim of padded images differ, as documented.
    warps = [
        bk.RandomRotation(50, "nearest", random.random() < 0.5, fill=fill),
        bk.RandomRotation(50, "bilinear", random.random() < 0.5, fill=None),
        bk.RandomAffine(30, (0.1, 0.2), (0.6, 1.6), 10, "nearest", fill),
        bk.RandomAffine(30, (0.1, 0.2), (0.6, 1.6), 10, "bilinear", None),
        bk.Resize((height, width), random.choice([nearest, "bilinear"])),
        bk.RandomResizedCrop((height, width), interpolation=random.choice([nearest, "bilinear"])),
    ]
    chain = random.sample(whole, random.randint(1, 4))
    if random.random() < 0.7:
        chain.insert(random.randint(0, len(chain)), random.choice(warps))
    return bk.Compose([bk.RandomApply([t]) if random.random() < 0.25 else t for t in chain])


@pytest.mark.parametrize("seed", range(4))
def test_random_chains_are_exact(seed: int) -> None:
    random = Random(seed)
    for i in range(8):
        chain = random_chain(random)
        images = scene(3, 17, 22, seed=i)
        result = folded(chain, images)
        if isinstance(result, list):  # sizes differ: each must be what it is alone
            for k, image in enumerate(result):
                generator = torch.Generator().manual_seed(7)
                alone = chain(images[k], generator, k, "channels_first")
                torch.testing.assert_close(image, alone, rtol=1e-6, atol=1e-5, msg=str(chain))
        else:
            expected = one_after_another(chain, images)
            torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-5, msg=str(chain))


def test_uint8_chain_is_exact_in_whole_pixels() -> None:
    images = (scene() * 255).round().to(torch.uint8)
    chain = bk.Compose(
        [
            bk.RandomCrop(30, padding=3, fill=(9, 8, 7)),
            bk.RandomHorizontalFlip(),
            JITTER,
            bk.RandomGrayscale(0.3),
            bk.RandomVerticalFlip(),
        ]
    )
    assert calls(chain, images) == [1]
    with bigkernel.use_backend(None):
        assert torch.equal(folded(chain, images), one_after_another(chain, images))


def test_fill_keeps_its_units_through_conversions() -> None:
    images = (scene() * 255).round().to(torch.uint8)
    rotation = bk.RandomRotation((45, 45), fill=(0.25, 0.5, 1.0))
    result = bk.Compose([bk.ToDtype(torch.float32, scale=True), rotation])(images)
    corner = result[:, :, 0, 0]
    torch.testing.assert_close(corner, torch.tensor([[0.25, 0.5, 1.0]]).expand(8, 3))
    normalized = bk.Compose([NORMALIZE, bk.Pad(1, fill=-2)])(images)
    torch.testing.assert_close(normalized[:, :, 0, 0], torch.full((8, 3), -2.0))


def test_samples_part_ways_by_their_own_parameters() -> None:
    chain = bk.Compose(
        [
            bk.RandomApply([JITTER], p=0.5),
            bk.RandomApply([bk.RandomRotation(40, "bilinear", fill=1)], p=0.5),
            bk.RandomApply([bk.Pad(2, fill=0.5), bk.RandomCrop((21, 26))], p=0.5),
            NORMALIZE,
        ]
    )
    images = scene(12, 21, 26)
    assert len(calls(chain, images)) > 1
    result = folded(chain, images)
    torch.testing.assert_close(result, one_after_another(chain, images), rtol=1e-6, atol=2e-6)
    for ids in ([3], [5, 0, 9]):
        alone = chain(images[ids], torch.Generator().manual_seed(7), ids, "channels_first")
        assert torch.equal(alone, result[ids])


def test_normalize_at_random() -> None:
    chain = bk.RandomApply([NORMALIZE], p=0.5)
    images = scene()
    torch.testing.assert_close(folded(chain, images), one_after_another(chain, images))
    with pytest.raises(ValueError, match="one dtype"):
        folded(chain, (images * 255).to(torch.uint8))


def test_conversion_to_uint8_stays_where_it_is() -> None:
    chain = bk.Compose([NORMALIZE, bk.ToDtype(torch.uint8, scale=True), NORMALIZE])
    images = scene()
    assert calls(chain, images) == [2]
    torch.testing.assert_close(folded(chain, images), one_after_another(chain, images))


# Two resamplings in one: (chain, bounds on the mean and the 99.9% difference, in levels of uint8,
# inside the picture, and on the mean with its rim, where a pixel is partly fill). The bounds are a
# third above what was measured.
APPROXIMATE = {
    "resized-crop-rotate": ([bk.RandomResizedCrop(40), ROTATION], 1.7, 17.0, 1.8),
    "resize-center-crop-rotate": ([bk.Resize(48), bk.CenterCrop(40), ROTATION], 1.6, 13.0, 3.2),
    "rotate-resized-crop": ([ROTATION, bk.RandomResizedCrop(40)], 0.9, 15.0, 0.9),
    "resize-resized-crop": ([bk.Resize(64), bk.RandomResizedCrop(40)], 1.2, 18.0, 1.2),
    "nearest-rotate-resize": ([bk.RandomRotation(40), bk.Resize(48)], 2.0, 54.0, 3.1),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_two_resamplings_in_one_differ_little(name: str) -> None:
    transforms, mean_bound, tail_bound, rim_bound = APPROXIMATE[name]
    chain = bk.Compose(transforms)
    images = scene(4, 80, 100)
    assert calls(chain, images) == [1]
    off = 255 * (folded(chain, images) - one_after_another(chain, images)).abs()
    white = torch.ones_like(images)
    covered = torch.minimum(folded(chain, white), one_after_another(chain, white)) > 1 - 1e-6
    inside = torch.nn.functional.max_pool2d((~covered).double(), 5, 1, 2) == 0
    mean, tail = off[inside].mean().item(), off[inside].quantile(0.999).item()
    rim = off.mean().item()
    print(f"\n{name}: inside mean {mean:.2f}, 99.9% {tail:.1f}; with the rim mean {rim:.2f} levels")
    assert mean <= mean_bound
    assert tail <= tail_bound
    assert rim <= rim_bound


def _resized_crop_and_more(random: Random, count: int) -> tuple[list[steps.Step], Any, Any]:
    """A crop and a resize of ``count`` images, what may come after them, and the images' sizes."""

    def numbers(low: Any, high: Any) -> Any:
        return np.asarray([random.randint(int(x), int(y)) for x, y in zip(low, high, strict=True)])

    one, active = np.ones(count, dtype=np.int64), np.ones(count, dtype=bool)
    height, width = numbers(one, 300 * one), numbers(one, 300 * one)
    crop_h, crop_w = numbers(one, height), numbers(one, width)
    top, left = numbers(0 * one, height - crop_h), numbers(0 * one, width - crop_w)
    out_h, out_w = random.randint(2, 200) * one, random.randint(2, 200) * one
    filters = ("bilinear", "bilinear", "nearest", "nearest-exact")
    chain: list[steps.Step] = [
        steps.Crop(active, top, left, crop_h, crop_w),
        steps.Resize(active, out_h, out_w, random.choice(filters), random.random() < 0.5),
    ]
    turn = np.tile([[0.9, 0.1, 1.0, -0.1, 0.9, 2.0]], (count, 1))
    more = [
        steps.Flip(numbers(0 * one, one).astype(bool), random.random() < 0.5),
        steps.Affine(active, turn, out_h, out_w, "bilinear", None),
        steps.Color(active, np.full((count, 1), steps.CONTRAST), np.full((count, 1), 1.2)),
        steps.Crop(active, 0 * one, 0 * one, out_h // 2, out_w),
        steps.ToDtype(active, torch.float32, True),
        steps.Normalize(active, (0.5,), (0.25,)),
    ]
    return chain + [step for step in more if random.random() < 0.6], height, width


@pytest.mark.parametrize("seed", range(60))
def test_a_resized_crop_begins_a_table_as_its_two_steps_do(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit; so do those that leave an image as large as it was."""
    random = Random(seed)
    chain, height, width = _resized_crop_and_more(random, random.choice((1, 1, 3)))
    if seed % 10 == 9:  # one is not resized
        crop, resize = chain[0], chain[1]
        assert isinstance(crop, steps.Crop)
        assert isinstance(resize, steps.Resize)
        crop.height[0], crop.width[0] = resize.height[0], resize.width[0]
        crop.top[0] = crop.left[0] = 0
        height[0], width[0] = resize.height[0] + 1, resize.width[0] + 2
    quick = fold(chain, height, width, 3, torch.uint8)
    monkeypatch.setattr(steps.Crop, "begins", lambda *given: False)
    slow = fold(chain, height, width, 3, torch.uint8)
    assert len(quick) == len(slow)
    for one, other in zip(quick, slow, strict=True):
        assert one.members.tolist() == other.members.tolist()
        assert len(one.calls) == len(other.calls)
        for a, b in zip(one.calls, other.calls, strict=True):
            for name, value in vars(a).items():
                wanted = getattr(b, name)
                if isinstance(value, np.ndarray):
                    assert (value.dtype, value.shape) == (wanted.dtype, wanted.shape), name
                    assert value.tobytes() == wanted.tobytes(), name
                else:
                    assert value == wanted, name


def test_constants_are_those_of_the_call() -> None:
    """What is kept of mean and std is told apart by all that decides it, the sign of a 0 too."""
    wide, narrow = torch.float64, torch.float32
    given: list[tuple[str, tuple[float, ...], int, torch.dtype]] = [
        ("mean", (0.0,), 3, narrow),
        ("mean", (-0.0,), 3, narrow),
        ("mean", (0.1,), 3, narrow),
        ("mean", (0.1,), 3, wide),
        ("mean", (0.1,), 1, wide),
        ("std", (0.1, 0.2, 0.3), 3, wide),
        ("std", (1e-60,), 3, wide),
    ]
    for name, numbers, channels, dtype in [*given, *reversed(given)]:
        row = passes._constants(name, numbers, channels, dtype)
        assert row is not None
        wanted = torch.tensor(numbers, dtype=dtype).expand(channels)
        assert row.dtype == dtype
        assert row.numpy().tobytes() == wanted.contiguous().numpy().tobytes()
    with pytest.raises(ValueError, match="std must be without a zero"):
        passes._constants("std", (1e-60,), 3, narrow)
