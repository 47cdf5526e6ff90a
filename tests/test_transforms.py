"""Every transform against torchvision's functional result for the same drawn parameters.

Bounds are those of the package: 1 level of uint8, 2 for hue. Nearest sampling, crops, flips,
padding, and brightness, contrast and saturation one after another have to be equal.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bigkernel
from bigkernel import transforms as bk

v2 = pytest.importorskip("torchvision.transforms.v2")
functional = v2.functional

Reference = Callable[[Tensor, Any, int], Tensor]


def pictures(n: int = 4, height: int = 47, width: int = 61, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(
        0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator
    )


def compare(transform: bk.Transform, reference: Reference, images: Any, bound: int) -> None:
    """The transform's images are within ``bound`` of reference(image, parameters, number)."""
    torch.manual_seed(11)
    params = transform.sample([tuple(i.shape[-2:]) for i in images])
    torch.manual_seed(11)
    for i, result in enumerate(transform(images)):
        expected = reference(images[i], params, i)
        assert result.dtype == expected.dtype
        assert result.shape == expected.shape
        assert (result.int() - expected.int()).abs().max() <= bound, f"image {i}"


def box(params: Any, i: int) -> tuple[int, int, int, int]:
    return int(params.top[i]), int(params.left[i]), int(params.height[i]), int(params.width[i])


def test_horizontal_flip_matches_torchvision() -> None:
    def reference(image: Tensor, params: Any, i: int) -> Tensor:
        return functional.horizontal_flip(image) if params.active[i] else image

    compare(bk.RandomHorizontalFlip(), reference, pictures(), 0)


def test_vertical_flip_matches_torchvision() -> None:
    def reference(image: Tensor, params: Any, i: int) -> Tensor:
        return functional.vertical_flip(image) if params.active[i] else image

    compare(bk.RandomVerticalFlip(), reference, pictures(), 0)


SAMPLING = [
    pytest.param({}, 1, id="bilinear-antialias"),
    pytest.param({"antialias": False}, 1, id="bilinear"),
    pytest.param({"interpolation": "nearest"}, 0, id="nearest"),
    pytest.param({"interpolation": "nearest-exact"}, 0, id="nearest-exact"),
]


@pytest.mark.parametrize(("options", "bound"), SAMPLING)
@pytest.mark.parametrize("size", [(20, 30), (90, 70)], ids=["shrink", "grow"])
def test_resized_crop_matches_torchvision(
    size: tuple[int, int], options: dict[str, Any], bound: int
) -> None:
    def reference(image: Tensor, params: Any, i: int) -> Tensor:
        return functional.resized_crop(image, *box(params, i), size, **options)

    compare(bk.RandomResizedCrop(size, **options), reference, pictures(), bound)


@pytest.mark.parametrize(("options", "bound"), SAMPLING)
@pytest.mark.parametrize(
    "size",
    [
        pytest.param({"size": 33}, id="shorter-edge"),
        pytest.param({"size": [33]}, id="sequence-of-one"),
        pytest.param({"size": (70, 31)}, id="both"),
        pytest.param({"size": 33, "max_size": 40}, id="max"),
        pytest.param({"size": None, "max_size": 40}, id="longer-edge"),
        pytest.param({"size": (47, 61)}, id="unchanged"),
    ],
)
def test_resize_matches_torchvision(
    size: dict[str, Any], options: dict[str, Any], bound: int
) -> None:
    arguments = size | ({"size": [size["size"]]} if isinstance(size["size"], int) else {})

    def reference(image: Tensor, params: Any, i: int) -> Tensor:
        return functional.resize(image, **arguments, **options)

    compare(bk.Resize(**size, **options), reference, pictures(2), bound)
    sideways = [image.mT.contiguous() for image in pictures(2)]
    compare(bk.Resize(**size, **options), reference, sideways, bound)


@pytest.mark.parametrize(
    "size", [20, (20, 31), (21, 30), (47, 61), (52, 20), (52, 80), (60, 61)], ids=str
)
def test_center_crop_matches_torchvision(size: Any) -> None:
    sides = [size, size] if isinstance(size, int) else list(size)
    compare(bk.CenterCrop(size), lambda x, p, i: functional.center_crop(x, sides), pictures(2), 0)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"size": (40, 33)}, id="inside"),
        pytest.param({"size": (40, 40), "padding": 4}, id="padded"),
        pytest.param({"size": 40, "padding": (1, 2, 3, 4), "fill": (3, 4, 5)}, id="fill-rgb"),
        pytest.param({"size": 70, "pad_if_needed": True, "fill": 9}, id="if-needed"),
        pytest.param({"size": 64, "padding": 9, "padding_mode": "edge"}, id="edge"),
        pytest.param({"size": (47, 61)}, id="all"),
    ],
)
def test_random_crop_matches_torchvision(options: dict[str, Any]) -> None:
    def reference(image: Tensor, params: Any, i: int) -> Tensor:
        fill = options.get("fill", 0)
        fill = list(fill) if isinstance(fill, tuple) else fill
        mode = options.get("padding_mode", "constant")
        padded = functional.pad(image, params.padding[i].tolist(), fill, mode)
        return functional.crop(padded, *box(params, i))

    compare(bk.RandomCrop(**options), reference, pictures(), 0)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"padding": 3}, id="all"),
        pytest.param({"padding": (2, 5), "fill": 200}, id="xy"),
        pytest.param({"padding": (0, 1, 2, 3), "fill": (1.0, 2.0, 3.0)}, id="ltrb"),
        pytest.param({"padding": (0, 1, 2, 3), "padding_mode": "edge"}, id="edge"),
        pytest.param({"padding": 0}, id="none"),
    ],
)
def test_pad_matches_torchvision(options: dict[str, Any]) -> None:
    def reference(image: Tensor, params: Any, i: int) -> Tensor:
        fill = options.get("fill", 0)
        sides = options["padding"]
        sides = [sides] if isinstance(sides, int) else list(sides)
        mode = options.get("padding_mode", "constant")
        return functional.pad(image, sides, list(fill) if isinstance(fill, tuple) else fill, mode)

    compare(bk.Pad(**options), reference, pictures(2), 0)


WARPS = [pytest.param("nearest", 0, id="nearest"), pytest.param("bilinear", 1, id="bilinear")]


@pytest.mark.parametrize(("interpolation", "bound"), WARPS)
@pytest.mark.parametrize("fill", [0, 77, None, (1, 2, 3)], ids=str)
@pytest.mark.parametrize("center", [None, (10, 12)], ids=["middle", "center"])
@pytest.mark.parametrize("expand", [False, True], ids=["cut", "expand"])
def test_rotation_matches_torchvision(
    interpolation: str, bound: int, fill: Any, center: Any, expand: bool
) -> None:
    def reference(image: Tensor, params: Any, i: int) -> Tensor:
        angle = float(params.angle[i])
        return functional.rotate(image, angle, interpolation, expand, center, fill)

    compare(
        bk.RandomRotation(40, interpolation, expand, center, fill), reference, pictures(), bound
    )


@pytest.mark.parametrize("expand", [False, True], ids=["cut", "expand"])
@pytest.mark.parametrize("angle", [0, 90, 180, 270, -90, 360])
@pytest.mark.parametrize("shape", [(20, 20), (20, 26)], ids=["square", "oblong"])
def test_rotation_by_quarter_turns_is_exact(
    angle: int, expand: bool, shape: tuple[int, int]
) -> None:
    def reference(image: Tensor, params: Any, i: int) -> Tensor:
        return functional.rotate(image, float(angle), "bilinear", expand)

    transform = bk.RandomRotation((angle, angle), "bilinear", expand)
    compare(transform, reference, pictures(1, *shape), 0)


@pytest.mark.parametrize(("interpolation", "bound"), WARPS)
@pytest.mark.parametrize("fill", [0, 77, None, (1, 2, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"degrees": 0, "translate": (0.1, 0.3)}, id="translate"),
        pytest.param({"degrees": 0, "scale": (0.5, 2.0)}, id="scale"),
        pytest.param({"degrees": (10, 30), "shear": 20}, id="shear-x"),
        pytest.param(
            {
                "degrees": 40,
                "translate": (0.1, 0.2),
                "scale": (0.5, 2),
                "shear": (-10, 10, -5, 5),
                "center": (3.0, 40.0),
            },
            id="all",
        ),
    ],
)
def test_affine_matches_torchvision(
    interpolation: str, bound: int, fill: Any, options: dict[str, Any]
) -> None:
    def reference(image: Tensor, params: Any, i: int) -> Tensor:
        return functional.affine(
            image,
            angle=float(params.angle[i]),
            translate=params.translate[i].tolist(),
            scale=float(params.scale[i]),
            shear=params.shear[i].tolist(),
            interpolation=interpolation,
            fill=fill,
            center=options.get("center"),
        )

    transform = bk.RandomAffine(**options, interpolation=interpolation, fill=fill)
    compare(transform, reference, pictures(), bound)


def jitter(image: Tensor, params: Any, i: int) -> Tensor:
    operations = [
        (functional.adjust_brightness, params.brightness),
        (functional.adjust_contrast, params.contrast),
        (functional.adjust_saturation, params.saturation),
        (functional.adjust_hue, params.hue),
    ]
    for k in params.order[i]:
        operation, factors = operations[k]
        if factors is not None:
            image = operation(image, float(factors[i]))
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        pytest.param({"brightness": 0.5}, 0, id="brightness"),
        pytest.param({"contrast": 0.5}, 0, id="contrast"),
        pytest.param({"saturation": 0.5}, 0, id="saturation"),
        pytest.param({"hue": 0.5}, 2, id="hue"),
        pytest.param({"brightness": (0.5, 2), "saturation": (1.5, 2)}, 0, id="two"),
        pytest.param({"brightness": 0.8, "contrast": 0.8, "saturation": 0.8}, 0, id="all-but-hue"),
        pytest.param(
            {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}, 2, id="all"
        ),
        pytest.param({}, 0, id="none"),
    ],
)
def test_color_jitter_matches_torchvision(
    cpu_isa: str, options: dict[str, Any], bound: int, channels: int
) -> None:
    compare(bk.ColorJitter(**options), jitter, pictures(12, channels=channels), bound)


@pytest.mark.parametrize("channels", [1, 3])
def test_grayscale_matches_torchvision(channels: int) -> None:
    def reference(image: Tensor, params: Any, i: int) -> Tensor:
        return functional.rgb_to_grayscale(image, channels) if params.active[i] else image

    compare(bk.RandomGrayscale(0.5), reference, pictures(channels=channels), 1)


@pytest.mark.parametrize("scale", [False, True], ids=["values", "scale"])
@pytest.mark.parametrize("source", [torch.uint8, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "target", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_to_dtype_matches_torchvision(
    source: torch.dtype, target: torch.dtype, scale: bool
) -> None:
    images = pictures(2) if source == torch.uint8 else pictures(2).to(source) / 255
    expected = functional.to_dtype(images, target, scale)
    # float64 has no native kernel, so that PyTorch runs it is asked for here, not a fallback.
    with bigkernel.use_backend("torch" if torch.float64 in (source, target) else None):
        result = bk.ToDtype(target, scale)(images)
    assert result.dtype == expected.dtype
    if target == torch.uint8:
        # torchvision cuts to whole numbers, this rounds.
        assert (result.int() - expected.int()).abs().max() <= 1
    else:
        # torchvision multiplies by a rounded 1/255 in the target's precision.
        tolerance = 2 * torch.finfo(target).eps if target != torch.float64 else 1e-7
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=0)


def test_normalize_matches_torchvision() -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = pictures(2).float() / 255
    expected = functional.normalize(images, mean, std)
    torch.testing.assert_close(bk.Normalize(mean, std)(images), expected, rtol=1e-5, atol=1e-6)
    # uint8 is scaled to 0..1 first, where torchvision raises.
    result = bk.Normalize(mean, std)(pictures(2))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_random_apply_runs_all_or_nothing() -> None:
    chain = bk.RandomApply([bk.RandomVerticalFlip(1.0), bk.Pad(2, fill=7)], p=0.5)
    images = pictures(16)
    torch.manual_seed(2)
    params = chain.sample([(47, 61)] * 16)
    torch.manual_seed(2)
    active = params[0].active
    assert 0 < active.sum() < 16
    for image, result, applied in zip(images, chain(images), active, strict=True):
        expected = functional.pad(functional.vertical_flip(image), [2], 7) if applied else image
        assert torch.equal(result, expected)


def test_float_images_match_torchvision() -> None:
    images = pictures(4).float() / 255
    chain = bk.RandomAffine(20, scale=(0.8, 1.2), interpolation="bilinear", fill=0.5)
    params = chain.sample([(47, 61)] * 4, torch.Generator().manual_seed(3))
    for i, result in enumerate(chain(images, torch.Generator().manual_seed(3))):
        expected = functional.affine(
            images[i],
            angle=float(params.angle[i]),
            translate=[0, 0],
            scale=float(params.scale[i]),
            shear=[0.0, 0.0],
            interpolation="bilinear",
            fill=0.5,
        )
        torch.testing.assert_close(result, expected, rtol=0, atol=0.5 / 255)


@pytest.mark.parametrize(
    "name",
    [
        "RandomResizedCrop",
        "RandomCrop",
        "CenterCrop",
        "Resize",
        "RandomHorizontalFlip",
        "RandomVerticalFlip",
        "RandomRotation",
        "RandomAffine",
        "ColorJitter",
        "RandomGrayscale",
        "Pad",
        "RandomApply",
        "ToImage",
        "ToDtype",
        "Normalize",
        "Compose",
    ],
)
def test_signatures_are_torchvisions(name: str) -> None:
    import inspect

    ours = inspect.signature(getattr(bk, name).__init__).parameters
    theirs = inspect.signature(getattr(v2, name).__init__).parameters
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("backend", ["torch", None])
def test_turning_the_hue_leaves_every_grey_as_it_is(backend: str | None) -> None:
    grey = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    assert torch.equal(functional.adjust_hue(grey, 0.3), grey)
    with bigkernel.use_backend(backend):
        assert torch.equal(bk.ColorJitter(hue=(0.3, 0.3))(grey, layout="channels_first"), grey)


@pytest.mark.parametrize("backend", ["torch", None])
def test_hue_is_not_darker_or_lighter_than_torchvisions(backend: str | None) -> None:
    images = pictures()
    with bigkernel.use_backend(backend):
        turned = bk.ColorJitter(hue=(0.3, 0.3))(images)
    apart = turned.double() - functional.adjust_hue(images, 0.3).double()
    assert apart.mean().abs() < 0.02


@pytest.mark.parametrize("backend", ["torch", None])
def test_nan_becomes_the_byte_0(backend: str | None) -> None:
    image = torch.full((3, 4, 4), torch.nan)
    with bigkernel.use_backend(backend):
        result = bk.ToDtype(torch.uint8, scale=True)(image, layout="channels_first")
    assert torch.equal(result, torch.zeros(3, 4, 4, dtype=torch.uint8))
