"""What is not of the package in a chain: transforms of one's own, functions, torchvision's."""

import copy
import multiprocessing
import pickle
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bigkernel
from bigkernel import transforms as bk
from bigkernel.data.augmentation import BatchAugmentation
from bigkernel.random import philox4x32, uniform01
from bigkernel.transforms import steps
from bigkernel.transforms.engine.table import Table

FLIP, CROP = bk.RandomHorizontalFlip(), bk.RandomCrop(12)
FLOATS = bk.ToDtype(torch.float32, scale=True)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 6, height: int = 17, width: int = 22, seed: int = 0) -> Tensor:
    shape = (n, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


def as_first(x: Any) -> Tensor:
    """[C, H, W] of a PIL image or an array."""
    return torch.from_numpy(np.array(x)).movedim(-1, 0)


class Shift(bk.Transform):
    """Moves images right by 0 to 3 pixels: steps."""

    blocks = 1

    @dataclass
    class Params(bk.Params):
        pixels: Any

    def draw(self, u: Any, images: bk.ImageInfo) -> Any:
        pixels = np.floor(4 * u[0, :, 0])
        matrix = np.tile([1.0, 0, 0, 0, 1, 0], (len(images), 1))
        matrix[:, 2] = -pixels
        step = steps.Affine(images.active, matrix, images.height, images.width, "nearest", fill=0)
        return self.Params(images.active, pixels), [step]


class Noise(bk.Transform):
    """Adds to each image a number of its own: a tensor stage."""

    blocks = 1

    def __init__(self, most: float = 0.5) -> None:
        super().__init__()
        self.most = most

    def transform(self, images: Tensor, u: Tensor) -> Tensor:
        return images + self.most * u[0, :, 0].view(-1, 1, 1, 1).to(images.dtype)


class Grain(Noise):
    """Noise in every pixel: it draws more than ``u`` has."""

    def transform(self, images: Tensor, u: Tensor) -> Tensor:
        return super().transform(images, u) + torch.randn_like(images)


def half_size(x: Tensor) -> Tensor:
    return x[:, :, ::2, ::2]


def darker(x: Tensor, u: Tensor) -> Tensor:
    return (x * u[0, :, 0].view(-1, 1, 1, 1)).to(x.dtype)


# Steps and draws


def one_step(step: Any) -> bk.Transform:
    class Does(bk.Transform):
        def draw(self, u: Any, images: bk.ImageInfo) -> Any:
            return bk.Params(images.active), [step(images) if callable(step) else step]

    return Does()


def test_an_unknown_step_raises() -> None:
    class Twist(steps.Step):
        pass

    with pytest.raises(NotImplementedError, match=r"got Twist, which does not\. Define fits"):
        one_step(lambda images: Twist(images.active))(images())
    with pytest.raises(TypeError, match=r"Does: what its draw lists must be a step .*got 'flip'"):
        one_step("flip")(images())


def test_a_step_of_ones_own_writes_itself() -> None:
    @dataclass
    class Gain(steps.Step):
        factor: float
        shared = True

        def fits(self, table: Table) -> Any:
            return np.ones(len(self.active), dtype=bool)

        def write(self, table: Table) -> None:
            table.rescale(self.factor, 0.0)

    chain = bk.Compose([FLIP, bk.RandomApply([one_step(lambda i: Gain(i.active, 0.5))]), FLIP])
    given = torch.rand(20, 3, 8, 9)
    plain = bk.Compose([FLIP, bk.RandomApply([bk.ToImage()]), FLIP])
    result, expected = (c(given, seeded(), range(20)) for c in (chain, plain))
    active = chain.sample([(8, 9)] * 20, seeded(), range(20))[1].active
    assert 0 < active.sum() < 20
    factor = torch.from_numpy(np.where(active, 0.5, 1.0)).float().view(-1, 1, 1, 1)
    torch.testing.assert_close(result, expected * factor)


def test_what_a_table_holds_a_sample_is_taken_without_a_list() -> None:
    table = Table(np.full(5, 9), np.full(5, 8), 3, torch.uint8)
    table.normalize((0.5,), (0.5,))
    table.mine = np.arange(5)  # as a later field would be
    part = table.take(np.asarray([4, 1]))
    arrays = {k: v for k, v in vars(part).items() if isinstance(v, np.ndarray)}
    assert len(arrays) > 12
    assert {len(array) for array in arrays.values()} == {2}
    assert part.mine.tolist() == [4, 1]
    assert part.mean == (0.5,) * 3


def test_draws_are_counted_without_the_transforms_help() -> None:
    """One that takes no numbers, though it has them, leaves its neighbours' where they were."""

    class Silent(bk.Transform):
        blocks = 3

        def draw(self, u: Any, images: bk.ImageInfo) -> Any:
            return bk.Params(images.active), []

    ids = torch.tensor([7, 2**33 + 1])
    chain = bk.Compose([Silent(), Noise(), Silent(), bk.RandomRotation((0, 8))])
    angle = chain.sample([(8, 8)] * 2, seeded(5), ids)[-1].angle
    word = philox4x32(5, 0, 3, ids & 0xFFFFFFFF, ids >> 32)[0]
    np.testing.assert_allclose(angle, 8 * uniform01(word).double().numpy(), rtol=1e-12)
    chain(torch.rand(2, 3, 8, 8), ids=ids)


def test_a_transform_of_steps_is_folded_with_its_neighbours() -> None:
    chain = bk.Compose([Shift(), FLIP, FLOATS])
    assert chain.explain(images()) == (
        "1. folded: Shift, RandomHorizontalFlip, ToDtype (6 images in 1 call)"
    )
    result = chain(images(), seeded(), range(6))
    shift, flip, _ = chain.sample([(17, 22)] * 6, seeded(), range(6))
    assert len(set(shift.pixels)) > 1
    for i, image in enumerate(images()):
        k = int(shift.pixels[i])
        moved = torch.nn.functional.pad(image, (k, 0))[:, :, :22]
        expected = moved.flip(-1) if flip.active[i] else moved
        torch.testing.assert_close(result[i], expected / 255)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda i: steps.Crop(i.active, 0, 0, 18, 5), "Crop: the box", id="crop"),
        pytest.param(lambda i: steps.Crop(i.active, 0, -1, 5, 5), "inside the image", id="left"),
        pytest.param(lambda i: steps.Crop(i.active, 0, 0, 0, 5), "at least one pixel", id="none"),
        pytest.param(lambda i: steps.Resize(i.active, 0, 4, "nearest", False), "pixel", id="size"),
        pytest.param(
            lambda i: steps.Resize(i.active, 4, 4, "cubic", False), "interpolation", id="filter"
        ),
        pytest.param(lambda i: steps.Pad(i.active, [[1, 1, 1]], 0), r"\[6, 4\]", id="sides"),
        pytest.param(lambda i: steps.Pad(i.active, -1, 0), "steps.Crop", id="negative"),
        pytest.param(lambda i: steps.Pad(i.active, 1, "red"), "fill", id="fill"),
        pytest.param(
            lambda i: steps.Affine(i.active, np.zeros((6, 6)), 4, 4, "nearest", 0),
            "invertible",
            id="flat",
        ),
        pytest.param(
            lambda i: steps.Affine(i.active, np.full((6, 6), np.nan), 4, 4, "nearest", 0),
            "finite",
            id="nan",
        ),
        pytest.param(lambda i: steps.Crop(i.active, 0.5, 0, 4, 4), "whole numbers", id="half"),
        pytest.param(lambda i: steps.Color(i.active, [[9]] * 6, [[1.0]] * 6), "codes", id="code"),
        pytest.param(lambda i: steps.Color(i.active, [[1]] * 6, [[1, 2]] * 6), "factors", id="k"),
        pytest.param(
            lambda i: steps.Color(i.active, [[1]] * 6, [[0.5]] * 5 + [[np.nan]]),
            "0 or more",
            id="nan-factor",
        ),
        pytest.param(
            lambda i: steps.Color(i.active, [[2]] * 6, [[-0.1]] * 6), "got -0.1", id="dark"
        ),
        pytest.param(
            lambda i: steps.Color(i.active, [[3]] * 6, [[np.inf]] * 6), "finite", id="inf"
        ),
        pytest.param(lambda i: steps.Color(i.active, [[4]] * 6, [[0.6]] * 6), "HUE", id="hue"),
        pytest.param(lambda i: steps.Normalize(i.active, 0.5, 0.0), "without a zero", id="std"),
        pytest.param(lambda i: steps.Normalize(i.active, np.nan, 1.0), "mean .*finite", id="mean"),
        pytest.param(lambda i: steps.ToDtype(i.active, "float32", True), "dtype of tor", id="name"),
        pytest.param(lambda i: steps.ToDtype(i.active, torch.cfloat, True), "cfloat|64", id="kind"),
        pytest.param(lambda i: steps.Flip(i.active, i.active), "are two steps", id="each-way"),
        pytest.param(
            lambda i: steps.Affine(i.active, [[1e300, 0, 0, 0, 1e300, 0]] * 6, 4, 4, "nearest", 0),
            "finite",
            id="huge",
        ),
        pytest.param(lambda i: steps.Flip(~i.active, True), "Start from images.active", id="out"),
        pytest.param(lambda i: steps.Flip(i.active[:2], True), r"\[6\] booleans", id="few"),
        pytest.param(lambda i: steps.Flip(i.active * 1, True), "booleans", id="ints"),
    ],
)
def test_bad_steps(make: Any, words: str) -> None:
    wide = bk.RandomApply([one_step(make)], 1.0 if "active" not in words else 0.5)
    with pytest.raises((TypeError, ValueError), match=words):
        wide(images(), seeded(), range(6))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        pytest.param(None, "pair .*got None", id="nothing"),
        pytest.param([], "pair", id="list"),
        pytest.param(lambda i: (i.active, []), "pair", id="no-params"),
    ],
)
def test_bad_draws(returned: Any, words: str) -> None:
    class Wrong(bk.Transform):
        def draw(self, u: Any, images: bk.ImageInfo) -> Any:
            return returned(images) if callable(returned) else returned

    with pytest.raises(TypeError, match=f"bigkernel.Wrong: what its draw returns must be.*{words}"):
        Wrong()(images())


def test_factors_that_say_nothing_are_not_looked_at() -> None:
    def color(images: bk.ImageInfo) -> steps.Color:
        active = images.active & (np.arange(6) < 3)
        factors = np.where(active, 1.0, np.nan)[:, None] * [1, np.nan, np.nan, 0.5]
        return steps.Color(active, [[steps.BRIGHTNESS, 0, steps.GREYSCALE, steps.HUE]] * 6, factors)

    given = images()
    result = one_step(color)(given)
    assert torch.equal(result[3:], given[3:])
    assert not torch.equal(result[:3], given[:3])


@pytest.mark.parametrize(
    "other",
    [lambda: torch.rand(()), np.random.rand, random.random],
    ids=["torch", "numpy", "python"],
)
def test_draw_takes_its_numbers_from_u_alone(other: Any) -> None:
    class Draws(bk.Transform):
        def draw(self, u: Any, images: bk.ImageInfo) -> Any:
            step = steps.Color(images.active, [[1]] * len(images), [[float(other())]] * len(images))
            return bk.Params(images.active), [step]

    class Asks(Shift):
        def draw(self, u: Any, images: bk.ImageInfo) -> Any:
            other()  # as another thread may
            return super().draw(u, images)

    same = [t.sample([(17, 22)] * 6, seeded(), range(6)).pixels.tolist() for t in (Shift(), Asks())]
    assert same[0] == same[1]
    chain = bk.Compose([FLIP, Draws()])
    for call in (
        lambda: chain(images(), seeded(), range(6)),
        lambda: chain.sample([(17, 22)], seeded(), [0]),
    ):
        with pytest.raises(
            ValueError, match=r"Draws: what its draw returns must be a function of u"
        ):
            call()


def test_what_a_transform_changes_in_place_is_its_own() -> None:
    class Turn(bk.Transform):
        blocks = 1

        def draw(self, u: Any, images: bk.ImageInfo) -> Any:
            active, height = images.active, images.height
            active &= u[0, :, 0] < 0.5
            height //= 2
            u[:] = 0
            return bk.Params(active), [steps.Flip(active, False)]

    class Brighten(Noise):
        def transform(self, images: Tensor, u: Tensor) -> Tensor:
            return super().transform(images, u.mul_(0.5))

        def sizes(self, height: Any, width: Any) -> Any:
            after = height.copy(), width.copy()
            height //= 2
            return after

    class Grainy(Brighten):  # which is called a second time
        def transform(self, images: Tensor, u: Tensor) -> Tensor:
            return super().transform(images, u) + 0 * torch.rand(())

    given = images() / 255
    turned = Turn()(given, seeded(), range(6))
    assert not torch.equal(turned, given)
    mirrored = bk.Compose([Turn(), bk.RandomHorizontalFlip(1.0), bk.CenterCrop(17)])
    expected = turned.flip(-1)[..., 2:19]  # 2.5 pixels, rounded to even
    assert torch.equal(mirrored(given, seeded(), range(6)), expected)
    plain, twice = (t(given, seeded(), range(6)) for t in (Brighten(), Grainy()))
    assert torch.equal(plain, twice)
    assert torch.equal(plain, Noise(0.25)(given, seeded(), range(6)))


def test_a_function_may_return_the_same_memory_in_every_call() -> None:
    kept = torch.zeros(6, 3, 17, 22)

    def into_kept(x: Tensor) -> Tensor:
        return torch.add(x, torch.rand(()), out=kept[: len(x)])

    chain, given = bk.Compose([into_kept]), images() / 255
    alone = [chain(image, seeded(), i) for i, image in enumerate(given)]
    assert torch.equal(chain(given, seeded(), range(6)), torch.stack(alone))


def test_subclasses_say_one_thing() -> None:
    with pytest.raises(TypeError, match="one that has both"):

        class Both(Noise):
            def draw(self, u: Any, images: bk.ImageInfo) -> Any:
                return bk.Params(images.active), []

    with pytest.raises(TypeError, match=r"\(Torchvisions\) must be .* torchvision's make_params"):

        class Torchvisions(bk.Transform):
            def make_params(self, flat_inputs: Any) -> dict[str, Any]:
                return {}

            def transform(self, images: Any, params: Any) -> Any:
                return images

    for method in ("forward", "__call__"):
        with pytest.raises(TypeError, match=f"one with a {method} of its own"):
            type("Calls", (Noise,), {method: lambda self, images: images})

    class Nothing(bk.Transform):
        pass

    with pytest.raises(NotImplementedError, match="Nothing must say what it does"):
        Nothing()(images())

    class Blocks(Noise):
        blocks = 1.5  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"Blocks: blocks must be .* whole number, got 1\.5"):
        Blocks()(images())


# Tensor stages


def test_a_stage_stands_between_folded_passes() -> None:
    chain = bk.Compose([CROP, FLIP, bk.Stage(darker), FLIP, FLOATS])
    assert chain.explain() == (
        "1. folded: RandomCrop, RandomHorizontalFlip\n"
        "2. tensor stage: darker\n"
        "3. folded: RandomHorizontalFlip, ToDtype"
    )
    assert chain.explain(images()) == (
        "1. folded: RandomCrop, RandomHorizontalFlip (6 images in 1 call)\n"
        "2. tensor stage: darker (6 images)\n"
        "3. folded: RandomHorizontalFlip, ToDtype (6 images in 1 call)"
    )
    result = chain(images(), seeded(), range(6))
    crop, first, _, second, _ = chain.sample([(17, 22)] * 6, seeded(), range(6))
    ids = torch.arange(6)
    factor = uniform01(philox4x32(3, 0, 2, ids, 0)[0])
    for i, image in enumerate(images()):
        top, left = crop.top[i], crop.left[i]
        x = image[:, top : top + 12, left : left + 12]
        x = x.flip(-1) if first.active[i] else x
        x = (x * factor[i]).to(torch.uint8)
        x = x.flip(-1) if second.active[i] else x
        torch.testing.assert_close(result[i], x / 255)


STAGES: dict[str, Any] = {
    "function": half_size,
    "Stage": bk.Stage(darker),
    "module": nn.AvgPool2d(2),
    "Noise": Noise(),
    "Grain": Grain(),
    "torch-random": lambda x: x + torch.rand(len(x), 1, 1, 1),
    "numpy-random": lambda x: x * float(np.random.rand()),
    "python-random": lambda x: x * random.random(),
    "ids": lambda x, generator=None, ids=None: (
        x * ids.view(-1, 1, 1, 1) + torch.rand((), generator=generator)
    ),
    "handed": lambda x, generator=None, ids=None: (
        x + torch.rand(len(x), 1, 1, 1, generator=generator)
    ),
    "unused": lambda x, generator=None, ids=None: x + torch.rand(len(x), 1, 1, 1),
}
V2 = ["GaussianBlur", "GaussianNoise", "RandomErasing", "RandomPerspective", "ElasticTransform"]


def stage(name: str) -> Any:
    if name in STAGES:
        return STAGES[name]
    v2 = pytest.importorskip("torchvision.transforms.v2")
    arguments: dict[str, Any] = {
        "GaussianBlur": {"kernel_size": 5},
        "RandomErasing": {"p": 0.8},
        "ElasticTransform": {"alpha": 9.0, "sigma": 0.5},
    }
    if name == "choice":
        return v2.RandomChoice([v2.RandomInvert(1.0), v2.RandomVerticalFlip(1.0), v2.Grayscale(3)])
    return getattr(v2, name)(**arguments.get(name, {}))


@pytest.mark.parametrize("name", [*STAGES, *V2, "choice"])
def test_with_ids_draws_depend_on_neither_batch_nor_order(name: str) -> None:
    chain = bk.Compose([CROP, FLOATS, stage(name), FLIP])
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    ids = torch.tensor([5, 0, 2**40, 7, 1, 9])
    whole = chain(images(), seeded(), ids)
    order = torch.tensor([4, 2, 0, 5])
    torch.manual_seed(17)
    torch.testing.assert_close(chain(images()[order], seeded(), ids[order]), whole[order])
    one = [chain(image, seeded(), [i]) for image, i in zip(images(), ids, strict=True)]
    torch.testing.assert_close(torch.stack(one), whole)
    assert not torch.equal(chain(images(), seeded(4), ids), whole)
    torch.set_rng_state(states[0])
    # None of the global generators has moved.
    chain(images(), seeded(), ids)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


@pytest.mark.parametrize("name", ["torch-random", "GaussianNoise", "handed", "unused"])
def test_images_and_places_draw_differently(name: str) -> None:
    alike = torch.zeros(4, 3, 9, 9)
    once = bk.Compose([stage(name)])(alike, seeded(), [1, 2, 3, 4])
    twice = bk.Compose([stage(name), stage(name)])(alike, seeded(), [1, 2, 3, 4])
    assert len({image.sum().item() for image in once}) == 4
    assert not torch.allclose(twice, 2 * once)


def test_without_ids_the_generator_gives_the_seed() -> None:
    chain = bk.Compose([FLOATS, stage("torch-random")])
    torch.manual_seed(8)
    first, second = chain(images()), chain(images())
    assert not torch.equal(first, second)
    torch.manual_seed(8)
    assert torch.equal(chain(images()), first)
    assert torch.equal(chain(images()), second)
    generator = seeded()
    assert torch.equal(chain(images(), seeded()), chain(images(), generator))
    assert not torch.equal(chain(images(), generator), chain(images(), seeded()))


def test_what_draws_nothing_runs_once_on_the_whole_batch_and_leaves_the_generator_alone() -> None:
    seen: list[tuple[int, ...]] = []

    def note(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x

    state = torch.get_rng_state()
    bk.Compose([bk.Resize(9), note, bk.CenterCrop(8)])(images())
    assert seen == [(6, 3, 9, 11)]
    assert torch.equal(torch.get_rng_state(), state)


def test_random_apply_around_a_stage() -> None:
    chain = bk.RandomApply([CROP, bk.Stage(darker), half_size], 0.5)
    ids = range(9)
    result = chain(images(9), seeded(), ids)
    active = chain.sample([(17, 22)] * 9, seeded(), ids)[0].active
    assert 0 < active.sum() < 9
    for i, (image, got, applied) in enumerate(zip(images(9), result, active, strict=True)):
        assert got.shape == ((3, 6, 6) if applied else image.shape)
        assert torch.equal(chain(image, seeded(), [i]), got)
        if not applied:
            assert torch.equal(got, image)
    assert chain.explain() == (
        "1. folded: RandomCrop (p=0.5)\n"
        "2. tensor stage: darker (p=0.5)\n"
        "3. tensor stage: half_size (p=0.5)"
    )
    bk.RandomApply([lambda x: 1 / 0], 0.0)(images())  # not for no images
    with pytest.raises(ValueError, match="as the images that it is not applied to"):
        bk.RandomApply([lambda x: x.float()], 0.5)(images(9), seeded(), ids)


def test_ragged_lists() -> None:
    ragged = [images(1, 12 + i % 3, 20 - i % 2, seed=i)[0] for i in range(7)]
    for chain in (
        bk.Compose([bk.Pad(1), bk.Stage(darker), FLIP]),
        bk.Compose([stage("GaussianBlur"), bk.Resize((8, 9))]),
        bk.Compose([half_size, stage("RandomErasing")]),
    ):
        result = chain(ragged, seeded(), range(7))
        assert isinstance(result, Tensor) == ("Resize" in str(chain))
        for i, image in enumerate(ragged):
            assert torch.equal(chain(image, seeded(), [i]), result[i])


def test_results_of_several_sizes() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    chain = bk.Compose([v2.RandomResize(8, 14), bk.Pad(1)])
    result = chain(images(), seeded(), range(6))
    assert len({image.shape for image in result}) > 1
    assert torch.equal(chain(images()[2], seeded(), [2]), result[2])
    fixed = bk.Compose([v2.RandomResize(8, 14), bk.Resize((5, 6))])(images(), seeded(), range(6))
    assert fixed.shape == (6, 3, 5, 6)


@pytest.mark.parametrize("name", ["Stage", "GaussianBlur", "function"])
def test_layouts_pictures_and_subclasses(name: str) -> None:
    image_module = pytest.importorskip("PIL.Image")
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    chain = bk.Compose([FLIP, stage(name)])
    ends = bk.Compose([stage(name), FLIP])
    for c in (chain, ends):
        expected = c(images(), seeded(), range(6))
        last = images().movedim(1, -1).contiguous()
        result = c(last, seeded(), range(6))
        assert result.is_contiguous()
        assert torch.equal(result.movedim(-1, 1), expected)
        pictures = [image_module.fromarray(x.numpy()) for x in last]
        result = c(pictures, seeded(), range(6))
        assert all(isinstance(picture, image_module.Image) for picture in result)
        assert torch.equal(torch.stack([as_first(picture) for picture in result]), expected)
        tensors = bk.Compose([bk.ToImage(), c])(pictures[:2], seeded(), range(2))
        assert isinstance(tensors, Tensor)
        one = c(pictures[1], seeded(), [1])
        assert torch.equal(as_first(one), expected[1])
        wrapped = c(tv_tensors.Image(images()), seeded(), range(6))
        assert type(wrapped) is tv_tensors.Image
        assert torch.equal(wrapped.as_subclass(Tensor), expected)
        assert torch.equal(c(last[0].numpy(), seeded(), [0]).movedim(-1, 0), expected[0])


def test_pictures_come_back_as_they_can() -> None:
    image_module = pytest.importorskip("PIL.Image")
    rgb, palette = image_module.new("RGB", (8, 9)), image_module.new("P", (8, 9))
    with pytest.raises(ValueError, match=r"results of transforms\[0\] .*Put ToImage\(\) before"):
        bk.Compose([lambda x: x.float()])(rgb)
    with pytest.raises(ValueError, match=r"results of transforms\[0\] .*with 1\. Put ToImage"):
        bk.Compose([lambda x: x[:, :1]])(rgb)
    with pytest.raises(ValueError, match=r"without a palette for Stage\(darker\).*mode P"):
        bk.Compose([bk.Stage(darker)])(palette)
    assert bk.Compose([bk.ToImage(), lambda x: x.float()])(palette).dtype == torch.float32


def test_frames_of_a_clip_share_their_draws() -> None:
    clips = images(6).view(2, 3, 3, 17, 22)
    for name in ("Stage", "GaussianBlur", "RandomErasing", "python-random", "ids", "function"):
        chain = bk.Compose([CROP, FLOATS, stage(name), FLIP])
        result = chain(clips, seeded(), [5, 9])
        assert result.shape[:3] == (2, 3, 3)
        for clip, got, number in zip(clips, result, (5, 9), strict=True):
            torch.testing.assert_close(chain(clip[None], seeded(), [number])[0], got)
            if name != "ids":
                alone = chain(clip[1], seeded(), [number])
                torch.testing.assert_close(alone, got[1])


@pytest.mark.filterwarnings("ignore:bigkernel.augment runs in plain PyTorch")
@pytest.mark.parametrize("name", ["module", "torch-random", "GaussianBlur", "Stage"])
def test_gradients_flow_through_stages(name: str) -> None:
    given = torch.rand(2, 3, 7, 8, dtype=torch.float64, requires_grad=True)
    chain = bk.Compose([bk.RandomCrop(6), bk.RandomApply([stage(name)], 1.0), FLIP])

    def loss(x: Tensor) -> Tensor:
        return (chain(x, seeded(), range(2)) ** 2).sum()

    assert torch.autograd.gradcheck(loss, given, fast_mode=True)
    layer = nn.Conv2d(3, 4, 3).double()
    bk.Compose([FLIP, layer])(given, seeded(), range(2)).sum().backward()
    assert layer.weight.grad is not None
    assert given.grad is not None


def test_stages_get_memory_of_their_own() -> None:
    given = images()
    before = given.clone()
    for chain in (
        bk.Compose([lambda x: x.zero_()]),
        bk.Compose([lambda x: x.add_(torch.randint(0, 9, (), dtype=torch.uint8))]),
        bk.RandomApply([lambda x: x], 0.0),
        bk.Compose([lambda x: x]),
        bk.Compose([lambda x: x, FLIP]),
    ):
        for form in (given, list(given), given[0], given.movedim(1, -1)):
            result = chain(form)
            for image in result:
                image.zero_()
            assert torch.equal(given, before)
    added = bk.Compose([lambda x: x.add_(torch.rand(()))])
    flat = added(torch.zeros(4, 3, 5, 5), seeded(), range(4))
    assert flat.max() < 1  # once, though a function that draws is called twice


def test_no_images() -> None:
    chain = bk.Compose([CROP, FLOATS, bk.Stage(darker), half_size])
    empty = chain(images(0))
    assert (empty.shape, empty.dtype) == ((0, 3, 6, 6), torch.float32)
    assert chain(images(0).movedim(1, -1), layout="channels_last").shape == (0, 6, 6, 3)
    assert chain([]) == []


@pytest.mark.parametrize(
    ("function", "words"),
    [
        pytest.param(lambda x: None, "got None", id="none"),
        pytest.param(lambda x: [x], "got a list", id="list"),
        pytest.param(lambda x: x[:2], r"one image for each of the 6 .*\(2, 3, 17, 22\)", id="few"),
        pytest.param(lambda x: torch.cat([x, x]), "one image for each of the 6", id="many"),
        pytest.param(lambda x: x[0], r"\[N, C, H, W\]", id="rank"),
        pytest.param(lambda x: x[:, :0], "not empty", id="empty"),
        pytest.param(lambda x: x * 1j, "whole-number or bool dtype", id="complex"),
        pytest.param(lambda x: x.to_sparse(), "dense", id="sparse"),
        pytest.param(
            lambda x: x[: 1 + (torch.rand(()) > 2)].expand(2, -1, -1, -1),
            "for each of the",
            id="random",
        ),
    ],
)
def test_bad_results_of_stages(function: Any, words: str) -> None:
    for chain, name in (
        (bk.Compose([FLIP, function]), r"transforms\[1\] \(<lambda>\)"),
        (bk.Compose([FLIP, bk.Stage(lambda x, u: function(x))]), r"Stage\(<lambda>\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"the result of {name} must be.*{words}"):
            chain(images())


def test_errors_of_others_say_where() -> None:
    class Forgot(Shift):
        blocks = 0

    class Few(Noise):
        blocks = 0

    for transform, what in ((Forgot(), "Forgot"), (Few(), "Few")):
        with pytest.raises(IndexError) as caught:
            bk.Compose([FLIP, transform])(images())
        assert f"{what} was given u [0, N, 4]. The attribute blocks" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError) as raised:
        bk.Compose([FLIP, nn.Conv2d(3, 3, 1)])(images())
    note = "bigkernel: in transforms[1] (Conv2d), for images [6, 3, 17, 22] of torch.uint8"
    assert raised.value.__notes__ == [note]


def test_sizes_are_checked_against_what_is_said() -> None:
    class Enlarge(bk.Transform):
        def transform(self, images: Tensor, u: Tensor) -> Tensor:
            return images.repeat_interleave(2, -1)

    said = r"its sizes\(height, width\) says, \(17, 22\) for image 0, got \(17, 44\)\. Define"
    with pytest.raises(ValueError, match=said):
        Enlarge()(images())

    class Said(Enlarge):
        def sizes(self, height: Any, width: Any) -> Any:
            return height, 2 * width

    chain = bk.Compose([bk.RandomApply([Said()]), bk.RandomCrop(4)])
    applied, _, crop = chain.sample([(17, 22)] * 99, seeded(), range(99))
    assert crop.left[~applied.active].max() <= 18 < crop.left[applied.active].max()
    assert chain(images(), seeded(), range(6)).shape == (6, 3, 4, 4)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(lambda h, w: w, id="one"),
        pytest.param(lambda h, w: 17, id="number"),
        pytest.param(lambda h, w: (h, w + 0.5), id="half"),
        pytest.param(lambda h, w: (h, w[:2]), id="few"),
    ],
)
def test_bad_sizes(said: Any) -> None:
    class Told(Noise):
        def sizes(self, height: Any, width: Any) -> Any:
            return said(height, width)

    for call in (lambda: Told()(images()), lambda: Told().sample([(17, 22)] * 6)):
        with pytest.raises(ValueError, match=r"what sizes of Told returns must be \(heights, wid"):
            call()


def test_sample_goes_as_far_as_sizes_are_known() -> None:
    chain = bk.Compose([CROP, half_size, FLIP, FLOATS, bk.ColorJitter(0.5)])
    params = chain.sample([(17, 22)] * 6, seeded(), range(6))
    assert [type(p).__name__ for p in params] == [
        *("CropParams", "Params", "Params", "Params", "ColorJitterParams")
    ]
    after = bk.Compose([CROP, half_size, bk.RandomCrop(4)])
    with pytest.raises(ValueError, match=r"after transforms\[1\] \(half_size\), whose result"):
        after.sample([(17, 22)], seeded(), [0])
    assert after(images()).shape == (6, 3, 4, 4)
    assert len(bk.Compose([Noise(), bk.RandomCrop(4)]).sample([(17, 22)])) == 2


def test_the_trainers_augmentation_is_keyed() -> None:
    chain = bk.Compose([CROP, FLOATS, stage("GaussianBlur"), bk.Normalize([0.5], [0.5])])
    ids = torch.tensor([3, 1, 8, 5, 2, 4])
    whole = BatchAugmentation(3)(chain, images(), ids, 0)
    part = BatchAugmentation(3)(chain, images()[2:5], ids[2:5], 0)
    torch.testing.assert_close(part, whole[2:5])
    assert not torch.allclose(BatchAugmentation(3)(chain, images(), ids, 1), whole)
    for other, name in ((half_size, "half_size"), (nn.AvgPool2d(2), "AvgPool2d"), (bk.Pad, "Pad")):
        with pytest.raises(TypeError, match=rf"got {name} \(.*Compose\(\[{name}, \.\.\.\]\)"):
            BatchAugmentation(3)(other, images(), ids, 0)


def test_copies_pickles_and_what_is_printed() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    chain = bk.Compose([CROP, bk.Stage(darker), Shift(), half_size, v2.GaussianBlur(3), Noise(0.2)])
    expected = chain(images(), seeded(), range(6))
    for other in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert torch.equal(other(images(), seeded(), range(6)), expected)
    printed = repr(chain)
    for words in ("Stage(darker, blocks=1)", "Shift()", "GaussianBlur(", "Noise(most=0.2)"):
        assert words in printed
    assert chain.explain().splitlines()[-1] == "6. tensor stage: Noise"
    assert chain.state_dict() == {}
    modules = bk.Compose(nn.ModuleList([CROP, nn.AvgPool2d(2)]))
    assert modules(images().float()).shape == (6, 3, 6, 6)


class Items(torch.utils.data.Dataset):
    def __init__(self) -> None:
        v2 = pytest.importorskip("torchvision.transforms.v2")
        self.chain = bk.Compose([CROP, FLOATS, Noise(), v2.GaussianBlur(3), half_size])

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return self.chain(images()[index], seeded(), [index])


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_make_what_one_process_makes(start: str) -> None:
    items = Items()
    loader = torch.utils.data.DataLoader(
        items, batch_size=3, num_workers=2, multiprocessing_context=start
    )
    assert torch.equal(torch.cat(list(loader)), torch.stack([items[i] for i in range(6)]))


def test_threads_make_what_one_makes() -> None:
    def draws(x: Tensor) -> Tensor:
        time.sleep(0.002)  # which lets the others run, between its seeds and its draws
        return x + torch.rand(()) + float(np.random.rand())

    chain, given = bk.Compose([CROP, FLOATS, draws, Shift()]), images()
    expected = chain(given, seeded(), range(6))
    with ThreadPoolExecutor(4) as threads:
        ones = list(threads.map(lambda i: chain(given[i], seeded(), i), range(6)))
    assert torch.equal(torch.stack(ones), expected)


def test_a_fork_during_a_stage_does_not_wait_for_it() -> None:
    inside, leave = threading.Event(), threading.Event()

    def waits(x: Tensor) -> Tensor:
        inside.set()
        assert leave.wait(60)
        return x

    thread = threading.Thread(target=bk.Compose([waits]), args=[images()])
    thread.start()
    assert inside.wait(60)
    child = multiprocessing.get_context("fork").Process(target=bk.Stage(darker), args=[images()])
    try:
        child.start()
        child.join(60)
    finally:
        leave.set()
        thread.join()
        child.kill()
    assert child.exitcode == 0


def test_inside_a_compiled_function() -> None:
    chain = bk.Compose([CROP, FLOATS, Noise(), half_size])

    @torch.compile(backend="aot_eager")
    def compiled(x: Tensor) -> Tensor:
        return chain(x, seeded(), range(6)) * 2

    assert torch.equal(compiled(images()), chain(images(), seeded(), range(6)) * 2)


def test_on_every_backend_the_same_stages() -> None:
    chain = bk.Compose([CROP, stage("GaussianBlur"), FLIP])
    with bigkernel.use_backend("torch"):
        expected = chain(images(), seeded(), range(6))
    assert torch.equal(chain(images(), seeded(), range(6)), expected)


def test_every_step_of_the_package_is_public() -> None:
    """What one needs for a transform of one's own has a name without an underscore."""
    for name in ("Transform", "Params", "ImageInfo", "Stage", "steps"):
        assert name in bk.__all__
    known = {name for name in steps.__all__ if isinstance(getattr(steps, name), type)}
    defined = {
        cls.__name__ for cls in steps.Step.__subclasses__() if cls.__module__ == steps.__name__
    }
    assert defined < known
    for name in defined:
        step = getattr(steps, name)
        arrays = {f.name for f in fields(step) if f.type in ("Ints", "Floats", "Bools")}
        assert arrays == {"active", *step.arrays}
