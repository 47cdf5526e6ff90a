"""The drawn parameters: how they are distributed, and what decides them.

With ids that is seed, id and place in the chain; without, the state of the generator.

A mean of n draws is compared with the exact one at five standard errors, a whole distribution with
torchvision's by a two-sample Kolmogorov-Smirnov distance, whose bound is passed by chance once in
a thousand; seeds are pinned, so the outcome is not left to chance.
"""

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import bigkernel
from bigkernel import transforms as bk
from bigkernel.data.augmentation import BatchAugmentation
from bigkernel.random import philox4x32, uniform01

N = 4000


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Kolmogorov-Smirnov against the uniform distribution on [low, high]."""
    assert values.min() >= low - 1e-6
    assert values.max() <= high + 1e-6
    place = (np.sort(values) - low) / (high - low)
    distance = np.abs(place - (np.arange(len(values)) + 0.5) / len(values)).max()
    assert distance <= 1.95 / np.sqrt(len(values))


def assert_same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    both = np.sort(np.concatenate([ours, theirs]))
    distance = np.abs(
        np.searchsorted(np.sort(ours), both, side="right") / len(ours)
        - np.searchsorted(np.sort(theirs), both, side="right") / len(theirs)
    ).max()
    assert distance <= 1.95 * np.sqrt(1 / len(ours) + 1 / len(theirs))


def assert_rate(hits: np.ndarray, p: float) -> None:
    assert abs(hits.mean() - p) <= 5 * np.sqrt(p * (1 - p) / hits.size)


@pytest.mark.parametrize(
    "transform",
    [
        bk.RandomHorizontalFlip(0.3),
        bk.RandomVerticalFlip(0.3),
        bk.RandomGrayscale(0.3),
        bk.RandomApply([bk.Pad(1)], 0.3),
    ],
    ids=lambda t: type(t).__name__,
)
def test_probabilities(transform: bk.Transform) -> None:
    params = transform.sample([(8, 8)] * N, seeded(1))
    assert_rate((params[0] if isinstance(params, list) else params).active, 0.3)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_probabilities_at_the_ends(p: float) -> None:
    active = bk.RandomHorizontalFlip(p).sample([(8, 8)] * 200, seeded(1)).active
    assert active.all() if p else not active.any()


@pytest.mark.parametrize(
    ("size", "options"),
    [
        pytest.param((256, 200), {}, id="defaults"),
        pytest.param((60, 200), {"ratio": (0.9, 1.1), "scale": (0.6, 1.0)}, id="mostly-fallback"),
        pytest.param((7, 9), {}, id="tiny"),
        pytest.param((300, 40), {}, id="tall"),
    ],
)
def test_resized_crop_boxes_are_distributed_as_torchvisions(
    size: tuple[int, int], options: dict[str, Any]
) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    theirs_transform = v2.RandomResizedCrop(8, **options)
    torch.manual_seed(4)
    image = torch.zeros(1, *size)
    drawn = [theirs_transform.make_params([image]) for _ in range(N // 2)]
    ours = bk.RandomResizedCrop(8, **options).sample([size] * N, seeded(2))
    for name in ("top", "left", "height", "width"):
        assert_same_distribution(getattr(ours, name), np.asarray([d[name] for d in drawn]))
    theirs_area = np.asarray([d["height"] * d["width"] for d in drawn])
    assert_same_distribution(ours.height * ours.width, theirs_area)
    assert ((ours.top >= 0) & (ours.top + ours.height <= size[0])).all()
    assert ((ours.left >= 0) & (ours.left + ours.width <= size[1])).all()


def test_crop_corners_are_uniform() -> None:
    params = bk.RandomCrop((5, 8)).sample([(10, 8)] * N, seeded(3))
    for top in range(6):
        assert_rate(params.top == top, 1 / 6)
    assert (params.left == 0).all()


def test_rotation_angles_are_uniform() -> None:
    assert_uniform(bk.RandomRotation((-20, 50)).sample([(8, 8)] * N, seeded(4)).angle, -20, 50)


def test_affine_parameters_are_distributed_as_torchvisions() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    options = {"degrees": 30, "translate": (0.2, 0.4), "scale": (0.5, 1.5), "shear": (-9, 1, 2, 4)}
    torch.manual_seed(6)
    theirs_transform = v2.RandomAffine(**options)
    drawn = [theirs_transform.make_params([torch.zeros(1, 50, 30)]) for _ in range(N // 2)]
    ours = bk.RandomAffine(**options).sample([(50, 30)] * N, seeded(5))
    assert_same_distribution(ours.angle, np.asarray([d["angle"] for d in drawn]))
    assert_same_distribution(ours.scale, np.asarray([d["scale"] for d in drawn]))
    for k in range(2):
        assert_same_distribution(
            ours.translate[:, k], np.asarray([d["translate"][k] for d in drawn])
        )
        assert_same_distribution(ours.shear[:, k], np.asarray([d["shear"][k] for d in drawn]))


def test_jitter_factors_are_uniform_and_orders_equally_likely() -> None:
    params = bk.ColorJitter(0.4, (0.5, 3), 1.5, 0.2).sample([(8, 8)] * N, seeded(6))
    assert_uniform(params.brightness, 0.6, 1.4)
    assert_uniform(params.contrast, 0.5, 3.0)
    assert_uniform(params.saturation, 0.0, 2.5)
    assert_uniform(params.hue, -0.2, 0.2)
    orders, counts = np.unique(params.order, axis=0, return_counts=True)
    assert len(orders) == 24
    for count in counts:
        assert abs(count / N - 1 / 24) <= 5 * np.sqrt(1 / 24 * 23 / 24 / N)


def test_parameters_are_independent_of_each_other() -> None:
    params = bk.Compose([bk.RandomRotation(1), bk.RandomRotation(1)]).sample(
        [(8, 8)] * N, seeded(7)
    )
    affine = bk.RandomAffine(1, (1, 1), (1, 2), (0, 1, 0, 1)).sample([(900, 900)] * N, seeded(7))
    columns = [params[0].angle, params[1].angle, affine.translate[:, 0], affine.translate[:, 1]]
    columns += [affine.scale, affine.shear[:, 0], affine.shear[:, 1]]
    off_diagonal = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(off_diagonal).max() <= 5 / np.sqrt(N)
    for column in columns:  # nor of the neighbouring id
        assert abs(np.corrcoef(column[1:], column[:-1])[0, 1]) <= 5 / np.sqrt(N)


def test_draws_are_philox_of_seed_block_transform_and_id() -> None:
    seed, ids = 2**63 + 12345, torch.tensor([0, 3, 2**40 + 7])
    chain = bk.Compose([bk.RandomHorizontalFlip(), bk.RandomResizedCrop(4), bk.RandomRotation(9)])
    params = chain.sample([(8, 8)] * 3, torch.Generator().manual_seed(seed), ids)
    word = philox4x32(seed, 0, 2, ids & 0xFFFFFFFF, ids >> 32)[0]
    expected = -9 + 18 * uniform01(word).double().numpy()
    np.testing.assert_allclose(params[2].angle, expected, rtol=1e-12)


def everything() -> bk.Compose:
    return bk.Compose(
        [
            bk.RandomApply([bk.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), 5, "bilinear")], 0.5),
            bk.RandomHorizontalFlip(),
            bk.ColorJitter(0.4, 0.4, 0.4, 0.1),
            bk.RandomGrayscale(),
            bk.RandomCrop(12, padding=2),
        ]
    )


def images(n: int = 12) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 14, 16), dtype=torch.uint8, generator=seeded(9))


def test_results_do_not_depend_on_batch_size() -> None:
    whole = everything()(images(), seeded(1), ids=range(12))
    chain, ids = everything(), torch.arange(12)
    parts = [
        chain(part, seeded(1), ids=some)
        for part, some in zip(images().split([1, 4, 7]), ids.split([1, 4, 7]), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_results_do_not_depend_on_order() -> None:
    chain, order = everything(), torch.randperm(12, generator=seeded(3))
    whole = chain(images(), seeded(1), ids=torch.arange(100, 112))
    shuffled = chain(images()[order], seeded(1), ids=torch.arange(100, 112)[order])
    assert torch.equal(shuffled, whole[order])


def test_ids_and_seeds_matter() -> None:
    rotation, sizes = bk.RandomRotation(90), [(8, 8)] * 4
    angles = rotation.sample(sizes, seeded(1), range(4)).angle
    assert len(set(angles)) == 4
    assert (rotation.sample(sizes, seeded(1), [0, 1, 2, 3]).angle == angles).all()
    assert (rotation.sample(sizes, seeded(1), range(4, 8)).angle != angles).all()
    assert (rotation.sample(sizes, seeded(2), range(4)).angle != angles).all()


def test_with_ids_the_default_generator_gives_the_seed_and_is_not_advanced() -> None:
    rotation, sizes = bk.RandomRotation(90), [(8, 8)] * 4
    torch.manual_seed(5)
    state = torch.get_rng_state()
    angles = rotation.sample(sizes, ids=range(4)).angle
    rotation(images(4), ids=range(4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)  # what others draw makes no difference
    assert (rotation.sample(sizes, ids=range(4)).angle == angles).all()
    assert (rotation.sample(sizes, seeded(5), range(4)).angle == angles).all()


def test_the_same_on_every_backend() -> None:
    reference = everything()
    with bigkernel.use_backend("torch"):
        expected = reference(images(), seeded(1))
    result = everything()(images(), seeded(1))
    # Other parameters would move pixels; the backends' arithmetic differs in the last bits.
    off = (result.int() - expected.int()).abs()
    assert off.max() <= 2
    assert (off > 1).double().mean() <= 1e-3


# Without ids


class Outcomes:
    """Which of two outcomes, about equally likely, each random transform had for each image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[np.ndarray] = []
        go = bk.Transform._walk

        def record(transform: bk.Transform, walk: Any) -> Any:
            go(transform, walk)
            self.seen += [half(p) for p in walk.params if not isinstance(p, bk.ResizeParams)]
            return walk

        monkeypatch.setattr(bk.Transform, "_walk", record)
        # One image's parameters are the same (tests/test_transforms_one.py), but nobody keeps them.
        monkeypatch.setattr("bigkernel.transforms.transform.is_usual", lambda *_: False)

    def of(self, call: Any) -> list[np.ndarray]:
        self.seen.clear()
        call()
        return list(self.seen)


def half(params: bk.Params) -> np.ndarray:
    for name in ("angle", "top", "brightness"):
        if hasattr(params, name):
            values = getattr(params, name)
            return values > np.median(values) if len(values) > 1 else values > MIDDLE[name]
    return params.active


MIDDLE = {"angle": 0.0, "top": 2.5, "brightness": 1.0}
RANDOM = {
    "flip": lambda: bk.RandomHorizontalFlip(),
    "vertical-flip": lambda: bk.RandomVerticalFlip(),
    "grey": lambda: bk.RandomGrayscale(0.5),
    "apply": lambda: bk.RandomApply([bk.Resize((8, 8))], 0.5),
    "crop": lambda: bk.RandomCrop(8, padding=3),
    "resized-crop": lambda: bk.RandomResizedCrop(8),
    "rotation": lambda: bk.RandomRotation(20),
    "affine": lambda: bk.RandomAffine(20),
    "jitter": lambda: bk.ColorJitter(0.5),
}


def in_torchvisions_compose(first: bk.Transform, second: bk.Transform) -> Any:
    return pytest.importorskip("torchvision.transforms.v2").Compose([first, second])


def two_objects(first: bk.Transform, second: bk.Transform) -> Any:
    return lambda images: second(first(images))


CONTAINERS = {
    "nn.Sequential": torch.nn.Sequential,
    "v2.Compose": in_torchvisions_compose,
    "two-objects": two_objects,
    "Compose": lambda first, second: bk.Compose([first, second]),
    "nested": lambda first, second: bk.Compose([bk.Compose([first]), bk.Compose([second])]),
    "sequential-of-chains": lambda first, second: torch.nn.Sequential(
        bk.Compose([first]), bk.RandomApply([second], 1.0)
    ),
}


def assert_independent(first: np.ndarray, second: np.ndarray, what: Any) -> None:
    """Chi-square of the four joint outcomes against the product of each one's: one degree of
    freedom, passed by chance once in 20,000 (seeds are pinned)."""
    joint = np.bincount(2 * first + second, minlength=4).reshape(2, 2)
    expected = np.outer(joint.sum(axis=1), joint.sum(axis=0)) / joint.sum()
    chi_square = float(((joint - expected) ** 2 / expected).sum())
    assert expected.min() > 50, (what, joint.tolist())  # each is drawn at all
    assert chi_square <= 16.4, (what, joint.tolist())


@pytest.mark.parametrize("container", CONTAINERS)
def test_any_two_transforms_draw_independently(
    container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes, blank = Outcomes(monkeypatch), torch.zeros(600, 3, 8, 8, dtype=torch.uint8)
    torch.manual_seed(0)
    for first, second in itertools.combinations_with_replacement(RANDOM, 2):
        chain = CONTAINERS[container](RANDOM[first](), RANDOM[second]())
        seen = outcomes.of(lambda chain=chain: chain(blank))
        # A RandomApply that was put around a transform is an outcome of its own: always applied.
        drawn = [o for o in seen if not o.all()]
        assert len(drawn) == 2, (first, second)
        assert_independent(*drawn, (first, second))


@pytest.mark.parametrize("container", CONTAINERS)
def test_one_image_after_another_draws_independently(
    container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a data set calls its transform: each call has one image."""
    outcomes, blank = Outcomes(monkeypatch), torch.zeros(3, 8, 8, dtype=torch.uint8)
    torch.manual_seed(0)
    for pair in (("flip", "vertical-flip"), ("rotation", "grey"), ("flip", "flip")):
        chain = CONTAINERS[container](*(RANDOM[name]() for name in pair))
        calls = [outcomes.of(lambda chain=chain: chain(blank)) for _ in range(400)]
        drawn = [o for o in np.asarray(calls)[:, :, 0].T if not o.all()]
        assert len(drawn) == 2
        assert_independent(*drawn, pair)
        for outcome in drawn:  # nor does a call tell of the next
            assert_independent(outcome[1:], outcome[:-1], pair)


def test_flips_in_nn_sequential_have_all_four_outcomes() -> None:
    picture = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).expand(400, 1, 2, 2)
    flips = torch.nn.Sequential(bk.RandomHorizontalFlip(), bk.RandomVerticalFlip())
    torch.manual_seed(3)
    corners = flips(picture)[:, 0, 0, 0]  # 1 none, 2 left-right, 3 top-bottom, 4 both
    counts = torch.bincount(corners.long(), minlength=5)[1:]
    assert (counts > 70).all(), counts  # 100 expected, 9 the standard deviation


def test_two_views_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """SimCLR, DINO: one recipe twice, as two objects, a deep copy, or one object called twice."""
    blank = torch.zeros(500, 3, 8, 8, dtype=torch.uint8)

    def recipe() -> bk.Compose:
        return bk.Compose([RANDOM["resized-crop"](), RANDOM["flip"](), RANDOM["jitter"]()])

    outcomes, one = Outcomes(monkeypatch), recipe()
    one(blank[:3])
    torch.manual_seed(1)
    for other in (recipe(), copy.deepcopy(one), pickle.loads(pickle.dumps(one)), one):
        views = outcomes.of(lambda other=other: (one(blank), other(blank)))
        for first, second in itertools.product(views[:3], views[3:]):
            assert_independent(first, second, other)


def test_the_same_seed_again_repeats() -> None:
    """The idiom for an image and its mask, with the default generator or one that is given."""
    for draw in (lambda: everything(), lambda: torch.nn.Sequential(everything(), everything())):
        first, second, pictures = draw(), draw(), images()
        torch.manual_seed(8)
        expected = first(pictures)
        after = torch.rand(3)
        assert not torch.equal(first(pictures), expected)
        torch.manual_seed(8)
        assert torch.equal(second(pictures), expected)
        assert torch.equal(torch.rand(3), after)
    chain = everything()
    expected = chain(images(), seeded(1))
    assert torch.equal(chain(images(), seeded(1)), expected)
    generator = seeded(1)
    assert torch.equal(everything()(images(), generator), expected)
    assert not torch.equal(everything()(images(), generator), expected)
    sizes = [(14, 16)] * 12
    angles = bk.RandomRotation(9).sample(sizes, seeded(4)).angle
    assert (bk.Compose([bk.RandomRotation(9)]).sample(sizes, seeded(4))[0].angle == angles).all()


def test_other_random_numbers_are_not_touched_by_what_draws_none() -> None:
    """A chain for evaluation leaves the generator as it was; one that draws leaves others'."""
    torch.manual_seed(2)
    state = torch.get_rng_state()
    bk.Compose([bk.Resize(9), bk.CenterCrop(8), bk.Normalize([0.5], [0.5])])(images())
    everything()(images(), seeded(1))
    everything()(images()[:0])
    assert torch.equal(torch.get_rng_state(), state)
    everything()(images())
    assert not torch.equal(torch.get_rng_state(), state)


def test_nothing_is_counted() -> None:
    chain = everything()
    fresh = pickle.dumps(chain)
    chain(images())
    assert pickle.dumps(chain) == fresh
    assert chain.state_dict() == {}
    everything().load_state_dict(chain.state_dict())


class Drawn(torch.utils.data.Dataset):
    """Each item: the pixels that a transform made of a picture whose pixels are all different."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.transform = bk.RandomCrop(8)
        self.generator = generator

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(torch.arange(160.0 * 160).view(1, 160, 160), self.generator)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_loader_workers_draw_different_numbers_and_repeat_by_seed(start: str) -> None:
    """As torch seeds the workers' default generators, anew in each epoch."""

    def epochs(seed: int, persistent: bool = False, start: str = start) -> list[list[float]]:
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(
            Drawn(),
            batch_size=4,
            num_workers=2,
            multiprocessing_context=start,
            persistent_workers=persistent,
        )
        return [[x for batch in loader for x in batch[:, 0, 0, 0].tolist()] for _ in range(2)]

    one = epochs(0)
    # 48 of 23,409 corners: two alike would be seen in one of 20 seeds.
    assert len({x for epoch in one for x in epoch}) == 48
    if start == "fork":
        assert epochs(1) != one
        assert epochs(0) == one
        assert epochs(0, persistent=True)[0] == one[0]
    else:  # a process that is spawned takes seconds to import torch: once is enough
        assert one == epochs(0, start="fork")


def test_the_trainers_draws_are_those_recorded() -> None:
    """A run that was begun with an earlier version goes on with the same augmentation."""
    chain = bk.Compose(
        [
            bk.RandomApply([bk.RandomRotation(10)], 0.5),
            bk.RandomHorizontalFlip(),
            bk.RandomResizedCrop(8),
            bk.ColorJitter(0.4, hue=0.1),
        ]
    )
    drawn: list[Any] = []

    def record(images: Any, generator: Any = None, ids: Any = None) -> torch.Tensor:
        drawn.append(chain.sample([(20, 24)] * len(images), generator, ids))
        return chain(torch.zeros(len(images), 3, 20, 24), generator, ids)

    augmentation = BatchAugmentation(3)
    ids = torch.tensor([5, 0, 2**40])
    pictures = torch.zeros(3, 3, 20, 24)
    for some, epoch in ((ids, 0), (ids, 1), (None, 0), (None, 1), (ids[:1], None)):
        augmentation(record, pictures[: 3 if some is None else len(some)], some, epoch)
    for (apply, rotation, flip, crop, jitter), recorded in zip(drawn, RECORDED, strict=True):
        active, angle, flipped, box, order, hue = recorded
        assert apply.active.tolist() == active
        assert flip.active.tolist() == flipped
        assert [crop.top.tolist(), crop.left.tolist()] == box[:2]
        assert [crop.height.tolist(), crop.width.tolist()] == box[2:]
        assert jitter.order.tolist() == order
        np.testing.assert_allclose(rotation.angle, angle, atol=1e-6)
        np.testing.assert_allclose(jitter.hue, hue, atol=1e-6)


RECORDED: list[Any] = [
    (
        [True, False, False],
        [-9.642147, -9.657501, 3.756937],
        [False, True, True],
        [[0, 1, 1], [2, 8, 4], [20, 14, 19], [19, 11, 18]],
        [[0, 3, 2, 1], [1, 2, 3, 0], [1, 0, 3, 2]],
        [0.076481, -0.024491, 0.041722],
    ),
    (
        [True, False, True],
        [-1.092397, 2.653588, 6.534549],
        [True, False, False],
        [[4, 0, 0], [4, 0, 2], [12, 18, 13], [11, 18, 10]],
        [[3, 0, 1, 2], [3, 1, 2, 0], [3, 2, 1, 0]],
        [0.043812, 0.02103, -0.039536],
    ),
    (
        [True, True, False],
        [-9.470409, 3.281825, -4.845371],
        [False, True, True],
        [[1, 1, 9], [8, 16, 12], [13, 6, 10], [16, 7, 8]],
        [[1, 3, 2, 0], [2, 0, 3, 1], [1, 2, 3, 0]],
        [0.099429, 0.038356, -0.025446],
    ),
    (
        [False, False, False],
        [-3.298094, 0.360234, -7.024124],
        [False, True, False],
        [[2, 5, 0], [5, 10, 2], [13, 15, 19], [10, 13, 18]],
        [[2, 3, 1, 0], [0, 2, 1, 3], [1, 2, 3, 0]],
        [-0.022913, -0.059717, -0.033161],
    ),
    ([False], [-8.980665], [True], [[1], [0], [13], [17]], [[0, 2, 3, 1]], [-0.064039]),
]


def test_a_single_transform_draws_as_a_chain_of_one() -> None:
    alone = bk.RandomRotation(90).sample([(8, 8)] * 3, seeded(1)).angle
    chain = bk.Compose([bk.Compose([bk.RandomRotation(90)])]).sample([(8, 8)] * 3, seeded(1))
    assert (chain[0].angle == alone).all()
