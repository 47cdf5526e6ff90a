"""The drawn parameters: how they are distributed, and that only seed, id and place decide them.

A mean of n draws is compared with the exact one at five standard errors, a whole distribution with
torchvision's by a two-sample Kolmogorov-Smirnov distance, whose bound is passed by chance once in
a thousand; seeds are pinned, so the outcome is not left to chance.
"""

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import bigkernel
from bigkernel import transforms as bk
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
    whole = everything()(images(), seeded(1))
    chain = everything()
    parts = [chain(part, seeded(1)) for part in images().split([1, 4, 7])]
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


def test_the_default_generator_gives_the_seed_and_is_not_advanced() -> None:
    rotation, sizes = bk.RandomRotation(90), [(8, 8)] * 4
    torch.manual_seed(5)
    state = torch.get_rng_state()
    angles = rotation.sample(sizes).angle
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)  # what others draw makes no difference
    assert (rotation.sample(sizes).angle == angles).all()
    assert (rotation.sample(sizes, seeded(5)).angle == angles).all()


def test_the_same_on_every_backend() -> None:
    reference = everything()
    with bigkernel.use_backend("torch"):
        expected = reference(images(), seeded(1))
    result = everything()(images(), seeded(1))
    # Other parameters would move pixels; the backends' arithmetic differs in the last bits.
    off = (result.int() - expected.int()).abs()
    assert off.max() <= 2
    assert (off > 1).double().mean() <= 1e-3


def test_ids_count_on_from_call_to_call() -> None:
    chain, sizes = bk.RandomRotation(90), [(8, 8)] * 3
    blank = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    first = chain.sample(sizes, seeded(1)).angle
    assert (chain.sample(sizes, seeded(1)).angle == first).all(), "sampling must not count"
    chain(blank, seeded(1))
    chain(blank, seeded(1), ids=[7, 8, 9])  # given ids do not count
    expected = bk.RandomRotation(90).sample(sizes, seeded(1), [3, 4, 5]).angle
    assert (chain.sample(sizes, seeded(1)).angle == expected).all()


def resumed_by_state_dict(chain: bk.Compose) -> bk.Compose:
    buffer = io.BytesIO()
    torch.save(chain.state_dict(), buffer)
    fresh = everything()
    fresh.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "resume",
    [resumed_by_state_dict, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))],
    ids=["state_dict", "deepcopy", "pickle"],
)
def test_a_resumed_run_goes_on_with_the_next_image(resume: Any) -> None:
    chain = everything()
    whole = chain(images(), seeded(1))
    interrupted = everything()
    interrupted(images()[:5], seeded(1))
    rest = resume(interrupted)(images()[5:], seeded(1))
    assert torch.equal(rest, whole[5:])


def test_a_single_transform_draws_as_a_chain_of_one() -> None:
    alone = bk.RandomRotation(90).sample([(8, 8)] * 3, seeded(1)).angle
    chain = bk.Compose([bk.Compose([bk.RandomRotation(90)])]).sample([(8, 8)] * 3, seeded(1))
    assert (chain[0].angle == alone).all()
