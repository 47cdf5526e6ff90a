"""One usual image is drawn and folded in plain numbers: to the bit as a batch of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bigkernel.transforms as bk
from bigkernel.errors import BadArgument
from bigkernel.transforms.engine.draws import Draws, Key, philox4x32_of_one, round_keys
from bigkernel.transforms.one import One

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZE = bk.Normalize(MEAN, STD)
TO_FLOAT = bk.ToDtype(torch.float32, scale=True)
FLIPS = (bk.RandomHorizontalFlip(), bk.RandomVerticalFlip())
# By a name: the transforms, and the image's height and width.
SHORT: dict[str, tuple[list[Any], tuple[int, int]]] = {
    "training": ([bk.RandomResizedCrop(20), FLIPS[0], TO_FLOAT, NORMALIZE], (37, 29)),
    "enlarged": ([bk.RandomResizedCrop((24, 40), antialias=False), *FLIPS, NORMALIZE], (9, 12)),
    "to one size": ([bk.RandomResizedCrop(16, (0.5, 0.9)), FLIPS[0], NORMALIZE], (16, 16)),
    "evaluation": ([bk.Resize(24), bk.CenterCrop(19), NORMALIZE], (41, 30)),
    "resized": ([bk.Resize(8, max_size=11)], (41, 30)),
    "small pictures": ([bk.RandomCrop(16, padding=4), FLIPS[0], NORMALIZE], (16, 16)),
    "filled": ([bk.RandomCrop((9, 14), padding=(5, 0, 1, 2), fill=(7, 8, 9)), *FLIPS], (12, 13)),
    "flipped, then cropped": ([*FLIPS, bk.RandomCrop(9), *FLIPS], (12, 13)),
    "cropped twice": ([bk.RandomResizedCrop(20), bk.RandomCrop(9), *FLIPS], (23, 31)),
    "nested": ([bk.Compose([FLIPS[0], bk.RandomCrop(9)]), FLIPS[1], NORMALIZE], (12, 13)),
    "converted": ([bk.ToImage(), FLIPS[0], bk.ToDtype(torch.bfloat16, scale=True)], (5, 6)),
    "to float16": ([FLIPS[0], bk.ToDtype(torch.float16)], (5, 6)),
    "normalised twice": ([FLIPS[0], NORMALIZE, NORMALIZE], (5, 6)),
    "by minus 0": ([FLIPS[0], bk.Normalize([-0.0], [-1.0])], (5, 6)),
    "by 0": ([FLIPS[0], bk.Normalize([0.0], [-1.0])], (5, 6)),
    "ratio": ([bk.RandomResizedCrop(8, (0, 1), (0.1, 9)), FLIPS[1]], (13, 40)),
}  # fmt: skip
LONG: dict[str, tuple[list[Any], tuple[int, int]]] = {
    "other transforms": ([FLIPS[0], bk.RandomRotation(10)], (12, 13)),
    "no box": ([bk.RandomResizedCrop(8, (3.0, 4.0))], (12, 13)),
    "nearest": ([bk.RandomResizedCrop(8, interpolation="nearest")], (12, 13)),
    "resized to its size": ([bk.Resize((12, 13)), FLIPS[0]], (12, 13)),
    "resized after a crop": ([bk.RandomCrop(9), bk.Resize(5), FLIPS[0]], (12, 13)),
    "padded to size": ([bk.CenterCrop(20)], (12, 13)),
    "edges": ([bk.RandomCrop(12, padding=2, padding_mode="edge")], (12, 13)),
    "not finite": ([bk.RandomCrop(12, padding=2, fill=float("nan"))], (12, 13)),
    "flipped after": ([NORMALIZE, bk.RandomHorizontalFlip(1.0)], (12, 13)),
    "another dtype": ([FLIPS[0], bk.ToDtype(torch.float64, scale=True)], (12, 13)),
    "to whole numbers": ([FLIPS[0], NORMALIZE, bk.ToDtype(torch.uint8), NORMALIZE], (12, 13)),
    "a function": ([FLIPS[0], torch.neg], (12, 13)),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which calls of one image were short."""
    taken: list[bool] = []
    run = One.run

    def spy(self: One) -> Tensor | None:
        result = run(self)
        taken.append(result is not None)
        return result

    monkeypatch.setattr(One, "run", spy)
    return taken


def image(size: tuple[int, int], dtype: torch.dtype = torch.uint8) -> Tensor:
    drawn = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(1))
    return drawn.to(torch.uint8) if dtype == torch.uint8 else drawn.to(dtype) / 256


def same(chain: Callable[..., Any], x: Tensor, seed: int, **given: Any) -> None:
    alone, batched = (torch.Generator().manual_seed(seed) for _ in range(2))
    got, wanted = chain(x, alone, **given), chain(x[None], batched, **given)[0]
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    # Bits: signs of zeros, and NaN.
    assert torch.equal(got.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))
    assert torch.equal(alone.get_state(), batched.get_state())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["uint8", "fp32"])
@pytest.mark.parametrize("name", SHORT)
def test_short_way_is_that_of_a_batch(name: str, dtype: torch.dtype, short: list[bool]) -> None:
    chain, size = SHORT[name]
    for seed in range(12):
        same(bk.Compose(chain), image(size, dtype), seed)
    assert sum(short) >= 10  # no box may have been found, or one of the result's size


@pytest.mark.parametrize("name", LONG)
def test_long_way_where_the_short_one_is_not_sure(name: str, short: list[bool]) -> None:
    chain, size = LONG[name]
    for seed in range(3):
        same(bk.Compose(chain), image(size), seed)
    assert not any(short)


def test_short_way_of_single_transforms_and_of_ids(short: list[bool]) -> None:
    x = image((20, 30))
    for transform in (bk.RandomResizedCrop(9), bk.RandomHorizontalFlip(), NORMALIZE, TO_FLOAT):
        same(transform, x, 3)
    chain = bk.Compose(SHORT["training"][0])
    for number in (0, 7, 2**40 + 3, -5):
        same(chain, x, 3, ids=[number])
    assert short == [True] * 8


def test_numbers_of_one_are_those_of_a_batch() -> None:
    seed, ids = 0x1234_5678_9ABC_DEF0, [0, 1, 2**32 + 5, -1]
    draws = Draws(Key(torch.Generator().manual_seed(seed), ids, 4), [2, 0, 3])
    for place, blocks in ((0, 2), (2, 3)):
        for i, number in enumerate(ids):
            for block in range(blocks):
                low, high = number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF
                words = philox4x32_of_one(round_keys(seed), block, place, low, high)
                numbers = [(word >> 8) * 2.0**-24 for word in words]
                assert numbers == draws.of(place)[block, i].tolist()
    # Boxes are drawn by exp of one number here, of ten there.
    u = np.random.default_rng(0).uniform(-3, 3, (10, 1000))
    assert [np.exp(x) for x in u.ravel()] == np.exp(u).ravel().tolist()


@pytest.mark.parametrize(
    "transform",
    [bk.RandomCrop(40), bk.Normalize([0.5, 0.5], [1.0, 1.0]), bk.RandomCrop(9, 1, fill=(1, 2))],
    ids=["crop", "mean", "fill"],
)
def test_sentences_are_those_of_a_batch(transform: bk.Transform) -> None:
    said = []
    for x in (image((12, 13)), image((12, 13))[None]):
        with pytest.raises(BadArgument) as error:
            bk.Compose([FLIPS[0], transform])(x)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_subclass_does_what_it_says(short: list[bool]) -> None:
    class Never(bk.RandomHorizontalFlip):
        def draw(self, u: Any, images: Any) -> Any:
            images.active = images.active & False
            return super().draw(u, images)

    x = image((12, 13))
    for seed in range(5):
        assert torch.equal(Never(1.0)(x, torch.Generator().manual_seed(seed)), x)
    assert not short


def test_constants_outlive_inference_mode(short: list[bool]) -> None:
    chain = bk.Compose([FLIPS[0], bk.Normalize((0.25, 0.5, 0.125), STD)])
    x = image((12, 13))
    with torch.inference_mode():
        chain(x)
    result = chain(x)
    assert short == [True, True]
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (weight * result).sum().backward()
    assert torch.equal(weight.grad, result.sum((1, 2), keepdim=True))
