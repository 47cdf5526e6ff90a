"""The augment op: native kernel and torch backend against float64 and against torchvision.

Feature -> test
  resized crop: bilinear, antialias, nearest     test_augment_resized_crop_equals_torchvision
  crop with padding, fill                        test_augment_crop_with_padding_equals_torchvision
  horizontal and vertical flip                   test_augment_flips_equal_torchvision
  rotation: fill, centre, expand                 test_augment_rotate_equals_torchvision,
                                                 test_augment_right_angles_equal_torchvision
  nearest between two pixels                     tests/test_transforms_ties.py
  affine: rotate, translate, scale, shear        test_augment_affine_equals_torchvision
  brightness, contrast, saturation, hue, grey    test_augment_colour_equals_torchvision
  colours in any order                           test_augment_jitter_in_any_order_equals_torchvision
  normalise, conversion of dtype                 test_augment_normalises_as_torchvision
  layouts in and out, ragged sizes, strides      test_augment_layouts, test_augment_ragged,
                                                 test_augment_noncontiguous
  a chain folded into one call                   test_augment_folded_chain_stays_close
  accuracy of every path, dtype, border          test_augment_matches_reference
  antialias for maps that are not axis-aligned   test_augment_matches_reference[rotated-shrink-...]
  several contrasts                              test_augment_several_contrasts
  determinism, independence of threads, batch    test_augment_is_deterministic
  wild tables, zero sizes                        test_augment_wild_tables, test_augment_zero_sizes
  nothing read outside box and image             test_augment_reads_nothing_outside
  any table, any size                            test_augment_any_table (hypothesis)
  NaN and infinities                             test_augment_not_finite_*, test_augment_fill_that_*
  halves and NaN as bytes                        test_augment_rounds_to_bytes
  derivatives of every kind                      test_augment_derivatives_are_right_or_refused
  tensor subclasses                              test_augment_refuses_what_is_no_plain_tensor
"""

import inspect
import itertools
import math
import re
from pathlib import Path

import augment_ptx
import augment_tables as tables
import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torchvision.transforms import InterpolationMode

import bigkernel
from bigkernel import registry, transforms
from bigkernel.ops.augment import augment, reference, table
from bigkernel.testing import ptx
from bigkernel.testing.tolerance import assert_as_accurate

MODES = {"nearest": InterpolationMode.NEAREST, "bilinear": InterpolationMode.BILINEAR}
DTYPES = {
    "uint8": torch.uint8,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@pytest.fixture(
    params=[
        *(f"cpu-{isa}" for isa in bigkernel.cpu_isas() or ["none"]),
        "ptx",
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def native(request: pytest.FixtureRequest):
    """Runs the test under every instruction set of the CPU, on the compiled CUDA kernels in the
    emulator, and on a GPU where there is one."""
    kind, _, isa = request.param.partition("-")
    if kind == "ptx":
        if ptx.nvcc() is None:
            pytest.skip("nvcc is not on the path")
        with augment_ptx.emulated():
            yield kind
    elif kind == "cuda":
        with augment_ptx.on_gpu():
            yield kind
    else:
        if isa == "none":
            pytest.skip("the native library is not built")
        with bigkernel.use_cpu_isa(isa):
            yield kind


def picture(*shape, dtype=torch.uint8, seed=0):
    values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(torch.uint8) if dtype == torch.uint8 else (values / 255).to(dtype)


def run(image, geometry, color=None, **options):
    """augment for one image and one row of each table."""
    return augment(image[None], geometry[None], color, **options)[0]


def assert_close_to_torchvision(image, actual, expected, bytes_apart=1):
    """Within 1 LSB for uint8, at the rounding of fp32 positions for floats."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == image.dtype
    far = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0
    assert far <= (bytes_apart if image.dtype == torch.uint8 else 2e-5)


both = pytest.mark.parametrize("dtype", ["uint8", "fp32"])


@both
@pytest.mark.parametrize("mode", ["bilinear", "antialias", "nearest"])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((3, 5, 30, 40), (24, 24)),  # shrink both
        ((3, 5, 20, 22), (50, 61)),  # grow both
        ((0, 0, 40, 52), (7, 130)),  # shrink one, grow the other
        ((39, 51, 1, 1), (5, 9)),  # one pixel
        ((0, 0, 40, 52), (40, 52)),  # unchanged
        ((2, 0, 4, 41), (164, 82)),  # fp32 products on either side of a whole number
    ],
)
def test_augment_resized_crop_equals_torchvision(native, dtype, mode, box, size):
    image = picture(3, 40, 52, dtype=DTYPES[dtype])
    interpolation = "nearest" if mode == "nearest" else "bilinear"
    options = {"interpolation": interpolation, "antialias": mode == "antialias"}
    actual = run(image, tables.resized_crop(*box, size), size=size, **options)
    expected = F.resized_crop(
        image, *box, list(size), interpolation=MODES[interpolation], antialias=mode == "antialias"
    )
    assert_close_to_torchvision(image, actual, expected, 0 if mode == "nearest" else 1)


@both
@pytest.mark.parametrize("corner", [(0, 0), (-3, 4), (30, 45), (-60, -60), (5, -9)])
def test_augment_crop_with_padding_equals_torchvision(native, dtype, corner):
    image = picture(3, 40, 52, dtype=DTYPES[dtype])
    top, left = corner
    fill = [7.0, 0.0, 250.0] if dtype == "uint8" else [0.1, 0.0, 0.9]
    padded = F.pad(image, [64, 64, 64, 64], fill=fill)
    expected = F.crop(padded, top + 64, left + 64, 24, 33)
    geometry = tables.crop(top, left, (24, 33), (40, 52))
    for interpolation in ("bilinear", "nearest"):
        actual = run(image, geometry, size=(24, 33), fill=fill, interpolation=interpolation)
        assert torch.equal(actual, expected)


@both
@pytest.mark.parametrize("flips", [(True, False), (False, True), (True, True)])
def test_augment_flips_equal_torchvision(native, dtype, flips):
    image = picture(3, 21, 34, dtype=DTYPES[dtype])
    expected = F.horizontal_flip(image) if flips[0] else image
    expected = F.vertical_flip(expected) if flips[1] else expected
    geometry = tables.resized_crop(0, 0, 21, 34, (21, 34), *flips)
    for interpolation in ("bilinear", "nearest"):
        actual = run(image, geometry, size=(21, 34), interpolation=interpolation)
        assert torch.equal(actual, expected)


@both
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("fill", [None, 0.0, [0.1, 0.9, 0.4]], ids=["none", "zero", "channels"])
@pytest.mark.parametrize("angle", [-15.0, 33.0, 180.0, 251.5])
def test_augment_rotate_equals_torchvision(native, dtype, interpolation, fill, angle):
    image = picture(3, 40, 52, dtype=DTYPES[dtype])
    scale = 255 if dtype == "uint8" else 1
    fill = [scale * x for x in fill] if isinstance(fill, list) else fill
    for center, expand in ((None, False), ([11.0, 4.5], False), (None, True)):
        expected = F.rotate(
            image, angle, MODES[interpolation], expand=expand, center=center, fill=fill
        )
        size = tuple(expected.shape[-2:])
        geometry = tables.affine(
            -angle, [0, 0], 1.0, [0, 0], (40, 52), size, center, fill is not None
        )
        options = {"interpolation": interpolation, "antialias": False, "fill": fill or 0.0}
        actual = run(image, geometry, size=size, **options)
        assert_close_to_torchvision(image, actual, expected)


@both
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("fill", [None, 0.7])
@pytest.mark.parametrize(
    "parameters",
    [(20.0, [3, -4], 0.8, [5.0, 9.0]), (-71.0, [0, 11], 2.3, [0.0, -20.0])],
)
def test_augment_affine_equals_torchvision(native, dtype, interpolation, fill, parameters):
    image = picture(3, 40, 52, dtype=DTYPES[dtype])
    geometry = tables.affine(*parameters, (40, 52), fill=fill is not None)
    options = {"interpolation": interpolation, "antialias": False, "fill": fill or 0.0}
    actual = run(image, geometry, size=(40, 52), **options)
    expected = F.affine(image, *parameters, interpolation=MODES[interpolation], fill=fill)
    assert_close_to_torchvision(image, actual, expected, 0 if interpolation == "nearest" else 1)


@both
@pytest.mark.parametrize("angle", [90.0, 270.0])
def test_augment_right_angles_equal_torchvision(native, dtype, angle):
    """Every position lies on a pixel's centre, or on a corner: halves go to the even pixel."""
    for center in (None, [11.0, 4.5]):
        image = picture(3, 64, 64, dtype=DTYPES[dtype])  # a power of two: exact in fp32 too
        for interpolation in MODES:
            expected = F.rotate(image, angle, MODES[interpolation], center=center)
            geometry = tables.affine(-angle, [0, 0], 1.0, [0, 0], (64, 64), None, center, False)
            options = {"interpolation": interpolation, "antialias": False}
            actual = run(image, geometry, size=(64, 64), **options)
            assert_close_to_torchvision(image, actual, expected)


COLOURS = {
    "brightness": (F.adjust_brightness, (0.0, 0.4, 1.0, 1.9)),
    "contrast": (F.adjust_contrast, (0.0, 0.4, 1.0, 1.9)),
    "saturation": (F.adjust_saturation, (0.0, 0.4, 1.0, 1.9)),
    "hue": (F.adjust_hue, (-0.5, -0.21, 0.0, 0.37)),
    "greyscale": (lambda image, _: F.rgb_to_grayscale(image, 3), (0.0,)),
}
UNCHANGED = tables.resized_crop(0, 0, 40, 52, (40, 52))


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("dtype", ["uint8", "uint8-whole", "fp32"])
@pytest.mark.parametrize("channels", [3, 1])
def test_augment_colour_equals_torchvision(native, name, dtype, channels):
    dtype, _, whole = dtype.partition("-")
    image = picture(channels, 40, 52, dtype=DTYPES[dtype])
    image[:, :4, :4] = image[:1, :4, :4]  # greys, where hue has no direction
    function, factors = COLOURS[name]
    for factor in factors:
        grey_already = channels == 1 and name == "greyscale"
        expected = image if grey_already else function(image, factor)
        actual = run(
            image, UNCHANGED, tables.chain((name, factor), whole=bool(whole)), size=(40, 52)
        )
        # Without whole numbers torchvision's cut grey and cut result add up to nearly 2.
        apart = 2 if name == "hue" or (name == "saturation" and not whole) else 1
        assert_close_to_torchvision(image, actual, expected, apart)


def test_augment_jitter_in_any_order_equals_torchvision(native):
    image = picture(3, 40, 52)
    factors = {"brightness": 0.8, "contrast": 1.3, "saturation": 0.6, "hue": -0.1}
    for order in itertools.islice(itertools.permutations(factors), 0, None, 2):
        expected = image
        for name in order:
            expected = COLOURS[name][0](expected, factors[name])
        pairs = [(name, factors[name]) for name in order]
        actual = run(image, UNCHANGED, tables.chain(*pairs, whole=True), size=(40, 52))
        # All but a few pixels are equal; where fp32 falls on the other side of a cut, the 1 of
        # difference is multiplied by what follows, contrast's 1.3 here, and hue adds its own.
        assert_close_to_torchvision(image, actual, expected, 3)
        assert (actual != expected).float().mean() < 0.06


@pytest.mark.parametrize("out", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", ["uint8", "fp32"])
def test_augment_normalises_as_torchvision(native, dtype, out):
    image = picture(3, 40, 52, dtype=DTYPES[dtype])
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    actual = run(image, UNCHANGED, size=(40, 52), mean=mean, std=std, dtype=DTYPES[out])
    exact = (image.double() / (255 if dtype == "uint8" else 1)).sub(
        torch.tensor(mean, dtype=torch.float32).double().view(3, 1, 1)
    ) / torch.tensor(std, dtype=torch.float32).double().view(3, 1, 1)
    theirs = F.normalize(F.to_dtype(image, torch.float32, scale=True), mean, std)
    assert_as_accurate(actual, exact, theirs.to(DTYPES[out]))


def test_augment_converts_between_bytes_and_floats(native):
    image = picture(3, 40, 52)
    as_float = run(image, UNCHANGED, size=(40, 52), dtype=torch.float32)
    torch.testing.assert_close(as_float, F.to_dtype(image, torch.float32, scale=True))
    assert torch.equal(run(as_float, UNCHANGED, size=(40, 52), dtype=torch.uint8), image)
    kept = run(image, UNCHANGED, size=(40, 52), dtype=torch.float32, in_scale=1.0)
    assert torch.equal(kept, image.float())


def test_augment_rounds_to_bytes(native):
    """Halves to the even neighbour, what lies beyond to the ends, NaN to 0."""
    image = torch.arange(-2, 258, 0.5).repeat(12).view(3, 40, 52)
    expected = image.round().clamp(0, 255).to(torch.uint8)
    image[1, 15, 16], expected[1, 15, 16] = math.nan, 0
    actual = run(image, UNCHANGED, size=(40, 52), dtype=torch.uint8, in_scale=1.0)
    assert torch.equal(actual, expected)


PATHS = {  # which sampler a case walks through
    "shrink": tables.resized_crop(3, 2, 35, 48, (24, 19)),
    "grow": tables.resized_crop(3, 2, 15, 18, (24, 19), flip_x=True),
    "sparse": tables.row((8.0, 0, 10, 0, 2, 1), (0, 0, 170, 50), (24, 19)),  # gathers, no filter
    "shift": tables.crop(-4, 7, (24, 19), (40, 52)),
    "rotate": tables.affine(25, [0, 0], 1.0, [0, 0], (40, 52), (24, 19)),
    "rotated-shrink": tables.affine(-40, [1, 0], 0.4, [0, 3], (40, 52), (24, 19)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("border", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_augment_matches_reference(native, path, border, dtype):
    """The project's rule: at most twice the error of PyTorch at that dtype, both against fp64."""
    shape = (3, 50, 170) if path == "sparse" else (3, 40, 52)
    image = picture(*shape, dtype=DTYPES[dtype])
    geometry = PATHS[path].clone()
    geometry[14] = border
    color = tables.chain(("brightness", 1.1), ("hue", 0.1), ("contrast", 0.7), ("saturation", 1.2))
    unit = 255.0 if dtype == "uint8" else 1.0
    options = {"size": (24, 19), "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    fill = [0.2 * unit, 0.5 * unit, 0.7 * unit]
    out = torch.float32 if dtype == "uint8" else DTYPES[dtype]
    for colors, antialias in ((None, False), (None, True), (color, True)):
        options |= {"antialias": antialias, "interpolation": "bilinear"}
        actual = run(image, geometry, colors, fill=fill, dtype=out, **options)
        with bigkernel.use_backend("torch"):
            same = run(image, geometry, colors, fill=fill, dtype=out, **options)
            unit_fill = (torch.tensor(fill).double() / unit).tolist()
            exact = run(image.double() / unit, geometry, colors, fill=unit_fill, **options)
        assert_as_accurate(actual, exact, same)


def test_augment_several_contrasts(native):
    image = picture(3, 40, 52, dtype=torch.float32)
    pairs = [("contrast", 1.5), ("hue", 0.2), ("contrast", 0.3), ("contrast", 1.2), ("hue", 0.1)]
    expected = image
    for name, factor in pairs:
        expected = COLOURS[name][0](expected, factor)
    actual = run(image, UNCHANGED, tables.chain(*pairs), size=(40, 52))
    assert_close_to_torchvision(image, actual, expected)


def sample_tables(n, size=(23, 37)):
    """A mixture of rows and colours for n images of 40 x 52."""
    rows, colors = [], []
    for i in range(n):
        rows.append(
            tables.affine(11.0 * i, [i, 0], 0.7, [0, 0], (40, 52), size)
            if i % 2
            else tables.resized_crop(i % 5, i % 7, 30, 40, size, flip_x=i % 3 == 0)
        )
        colors.append(tables.chain(("contrast", 0.5 + i % 4 / 4), ("hue", i % 5 / 10)))
    return torch.stack(rows), torch.cat(colors)


@pytest.mark.parametrize("channels_last_in", [False, True])
@pytest.mark.parametrize("channels_last_out", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_augment_layouts(native, channels_last_in, channels_last_out, dtype, channels):
    images = picture(6, channels, 40, 52, dtype=DTYPES[dtype])
    geometry, color = sample_tables(6)
    options = {"size": (23, 37), "fill": 0.25}
    plain = augment(images, geometry, None if channels == 4 else color, **options)
    given_images = images.permute(0, 2, 3, 1).contiguous() if channels_last_in else images
    actual = augment(
        given_images,
        geometry,
        None if channels == 4 else color,
        channels_last_in=channels_last_in,
        channels_last_out=channels_last_out,
        **options,
    )
    assert actual.is_contiguous()
    actual = actual.permute(0, 3, 1, 2) if channels_last_out else actual
    assert torch.equal(actual, plain)


def test_augment_ragged(native):
    images = [picture(3, h, w, seed=h) for h, w in [(40, 52), (1, 1), (17, 200), (90, 3), (8, 8)]]
    rows = [tables.resized_crop(0, 0, *image.shape[1:], (16, 20)) for image in images]
    actual = augment(images, torch.stack(rows), size=(16, 20))
    for image, got in zip(images, actual, strict=True):
        assert_close_to_torchvision(image, got, F.resize(image, [16, 20]))


def test_augment_noncontiguous(native):
    images = picture(4, 3, 40, 52)
    geometry, color = sample_tables(4)
    plain = augment(images, geometry, color, size=(23, 37))
    wide = torch.zeros(4, 3, 80, 104, dtype=torch.uint8)
    wide[:, :, 5:45, 7:59] = images
    every_second = torch.zeros(4, 3, 40, 104, dtype=torch.uint8)
    every_second[..., ::2] = images
    for layout in (
        images.contiguous(memory_format=torch.channels_last),
        wide[:, :, 5:45, 7:59],
        every_second[..., ::2],
        images.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert torch.equal(augment(layout, geometry, color, size=(23, 37)), plain)
    assert torch.equal(
        augment(images, geometry.T.contiguous().T, color, size=(23, 37), fill=0.0), plain
    )
    one = picture(1, 1, 40, 52).expand(4, 3, 40, 52)
    assert torch.equal(
        augment(one, geometry, color, size=(23, 37)),
        augment(one.contiguous(), geometry, color, size=(23, 37)),
    )


def test_augment_folded_chain_stays_close(native):
    """Crop, resize and rotation in one resampling against torchvision's two, jitter included.

    One resampling is the sharper: this picture differs by 0.7 on average, by 6 at most. Along the
    fill's edge the two are not comparable.
    """
    size = (64, 64)
    coarse = picture(1, 3, 12, 12).float()
    image = torch.nn.functional.interpolate(coarse, (96, 96), mode="bicubic")[0]
    image = image.clamp(0, 255).to(torch.uint8)
    expected = F.resized_crop(image, 10, 5, 70, 80, list(size), antialias=True)
    expected = F.rotate(F.horizontal_flip(expected), 12.0, InterpolationMode.BILINEAR, fill=0)
    expected = F.adjust_contrast(F.adjust_brightness(expected, 1.2), 0.8)

    def homogeneous(r):
        return torch.cat([r[:6].view(2, 3), torch.tensor([[0.0, 0.0, 1.0]])]).double()

    crop = tables.resized_crop(10, 5, 70, 80, size, flip_x=True)
    turn = tables.affine(-12.0, [0, 0], 1.0, [0, 0], size)
    geometry = crop.clone()
    geometry[:6] = (homogeneous(crop) @ homogeneous(turn))[:2].flatten()
    geometry[14] = tables.FILL_BLEND
    color = tables.chain(("brightness", 1.2), ("contrast", 0.8), whole=True)
    actual = run(image, geometry, color, size=size)
    apart = (actual.double() - expected.double()).abs()
    edge = F.rotate(torch.ones(1, *size), 12.0, InterpolationMode.BILINEAR, fill=0)[0]
    inside = -torch.nn.functional.max_pool2d(-edge[None], 5, 1, 2)[0] == 1
    assert apart[:, inside].mean() < 1
    assert apart[:, inside].max() <= 8


@pytest.mark.parametrize("n", [3, 12])
def test_augment_is_deterministic(native, n):
    """Bit-equal over runs, thread counts and batch sizes."""
    images = picture(n, 3, 40, 52)
    geometry, color = sample_tables(n)
    options = {"size": (23, 37), "dtype": torch.float32}
    expected = augment(images, geometry, color, **options)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(augment(images, geometry, color, **options), expected)
    finally:
        torch.set_num_threads(threads)
    for i in range(n):
        alone = augment(images[i : i + 1], geometry[i : i + 1], color[i : i + 1], **options)
        assert torch.equal(alone[0], expected[i])


WILD = [math.nan, math.inf, -math.inf, 1e300, -1e300, 1e18, 3e9, -3e9, 1e6, 0.0, 1e-300]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("border", [0, 1, 2])
def test_augment_wild_tables(native, interpolation, border):
    """NaN, infinite and huge coordinates are fill, and so is an empty source box."""
    image = picture(3, 9, 11)
    rows = []
    for value in WILD:
        for place in range(14):
            wild = tables.affine(30.0, [0, 0], 1.0, [0, 0], (9, 11))
            if place % 2:
                wild = tables.resized_crop(1, 1, 7, 9, (9, 11))
            wild[place] = value
            wild[14], wild[15] = border, (place // 2) % 4
            rows.append(wild)
    geometry = torch.stack(rows)
    images = image.expand(len(rows), 3, 9, 11)
    options = {"size": (9, 11), "fill": 77.0, "interpolation": interpolation}
    actual = augment(images, geometry, **options)
    with bigkernel.use_backend("torch"):
        expected = augment(images, geometry, **options)
    assert (actual.int() - expected.int()).abs().max() <= 1
    nowhere = [r[:6].isnan().any() or r[6:10].isnan().any() for r in rows]
    assert (actual[torch.tensor(nowhere)] == 77).all()


def test_augment_zero_sizes(native):
    none = torch.zeros(0, 16, dtype=torch.float64)
    assert augment(picture(0, 3, 8, 8), none, size=(4, 5)).shape == (0, 3, 4, 5)
    assert augment([], none, size=(4, 5), fill=[0.0, 0.0, 0.0]).shape == (0, 3, 4, 5)
    geometry = UNCHANGED[None]
    for h, w in ((0, 8), (8, 0), (0, 0)):
        empty = torch.zeros(1, 3, h, w, dtype=torch.uint8)
        assert (augment(empty, geometry, size=(4, 5), fill=9.0) == 9).all()
    image = picture(1, 3, 8, 8)
    assert augment(image, geometry, size=(0, 5)).shape == (1, 3, 0, 5)
    assert augment(image, geometry, size=(4, 0), channels_last_out=True).shape == (1, 4, 0, 3)
    assert augment(image[:, :0], geometry, size=(4, 5)).shape == (1, 0, 4, 5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("path", ["shrink", "grow", "shift", "rotate", "rotated-shrink"])
def test_augment_reads_nothing_outside(native, dtype, channels_last, path):
    """With NaN around the image in memory, and around the source box in the image."""
    clean = picture(3, 40, 52, dtype=DTYPES[dtype])
    geometry = PATHS[path].clone()
    x0, y0, x1, y1 = geometry[6:10].int().tolist()
    for border in (0, 1, 2):
        geometry[14] = border
        for box in ((x0, y0, x1, y1), (9, 10, 31, 30)):
            geometry[6:10] = torch.tensor(box)
            surrounded = torch.full((3, 60, 70), math.nan, dtype=DTYPES[dtype])
            if channels_last:
                surrounded = surrounded.permute(1, 2, 0).contiguous().permute(2, 0, 1)
            inner = surrounded[:, 11:51, 9:61]
            rows, columns = slice(box[1], box[3]), slice(box[0], box[2])
            inner[:, rows, columns] = clean[:, rows, columns]
            expected = run(clean, geometry, size=(24, 19), fill=0.5)
            actual = run(inner, geometry, size=(24, 19), fill=0.5)
            assert torch.equal(actual, expected)
    # A pixel that is taken as it is does not see its neighbours.
    dotted = clean.clone()
    dotted[:, ::2, ::2] = math.nan
    same = run(dotted, UNCHANGED, size=(40, 52))
    assert torch.equal(same.nan_to_num(nan=9.0), dotted.nan_to_num(nan=9.0))


number = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0]), st.floats(-4, 4).map(lambda x: round(x, 3))
)


@st.composite
def cases(draw):
    h, w, oh, ow = (draw(st.integers(1, 20)) for _ in range(4))
    box = [draw(st.integers(-2, w)), draw(st.integers(-2, h))]
    box += [draw(st.integers(box[0], w + 3)), draw(st.integers(box[1], h + 3))]
    out_box = [draw(st.integers(-1, ow)), draw(st.integers(-1, oh)), ow, oh]
    matrix = [draw(number), 0.0, draw(number) * 4, 0.0, draw(number), draw(number) * 4]
    if draw(st.booleans()):
        matrix[1], matrix[3] = draw(number), draw(number)
    border, rule = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    geometry = tables.row(matrix, box, (oh, ow), border, rule, out_box)
    options = {
        "size": (oh, ow),
        "interpolation": draw(st.sampled_from(["nearest", "bilinear"])),
        "antialias": draw(st.booleans()),
        "fill": [0.1, 0.5, 0.9],
        "dtype": draw(st.sampled_from([torch.float32, torch.uint8])),
    }
    code = st.tuples(st.integers(0, 5), st.floats(0, 2, width=32))
    color = torch.tensor([draw(st.lists(code, min_size=1, max_size=4))], dtype=torch.float32)
    dtype = draw(st.sampled_from([torch.uint8, torch.float32, torch.bfloat16, torch.float16]))
    image = picture(3, h, w, dtype=dtype, seed=draw(st.integers(0, 99)))
    if draw(st.booleans()):
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return image, geometry, color, options


@pytest.mark.parametrize("brightness", [0.0, 1e-45, 1e-42, 1e-38])
def test_augment_hue_of_what_is_nearly_black(native, brightness):
    """Where the largest channel is next to the smallest, one divided by the difference is inf."""
    image = torch.tensor([172, 47, 117], dtype=torch.uint8).view(3, 1, 1)
    color = tables.chain(("brightness", brightness), ("hue", 0.2))
    geometry = tables.resized_crop(0, 0, 1, 1, (1, 1))
    out = run(image, geometry, color, size=(1, 1), dtype=torch.float32)
    assert ((out >= 0) & (out <= brightness)).all()


SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=60, derandomize=True, **SETTINGS)
@given(case=cases())
def test_augment_any_table(native, case):
    assert_backends_agree(*case)


@pytest.mark.slow
@settings(max_examples=2000, **SETTINGS)
@given(case=cases())
def test_augment_any_table_at_random(native, case):
    """Others each time, so not for a run that must not fail for something old."""
    assert_backends_agree(*case)


def assert_backends_agree(image, geometry, color, options):
    actual = run(image, geometry, color, **options)
    with bigkernel.use_backend("torch"):
        expected = run(image, geometry, color, **options)
    apart = (actual.double() - expected.double()).abs().max().item()
    assert apart <= (1 if options["dtype"] == torch.uint8 else 3e-5)


def op_arguments(images, geometry, color, **changes):
    arguments = {
        "images": images,
        "geometry": geometry,
        "color": color,
        "fill": torch.zeros(1, 3),
        "mean": torch.tensor([0.4, 0.5, 0.6]),
        "std": torch.tensor([0.2, 0.3, 0.4]),
        "out_h": 23,
        "out_w": 37,
        "channels_last_in": False,
        "channels_last_out": False,
        "interpolation": 1,
        "antialias": True,
        "in_scale": 1 / 255,
        "out_dtype": 0,
    }
    return tuple((arguments | changes).values())


def test_augment_arguments_are_those_of_the_schema():
    schema = torch.ops.bigkernel.augment.default._schema
    assert tuple(a.name for a in schema.arguments) == reference.Arguments._fields
    assert tuple(inspect.signature(reference.augment).parameters) == reference.Arguments._fields


@pytest.mark.parametrize("namespace", ["bigkernel", "bigkernel_torch"])
def test_augment_opcheck(namespace):
    geometry, color = sample_tables(2)
    op = getattr(torch.ops, namespace).augment.default
    batch, ragged = [picture(2, 3, 40, 52)], [picture(3, 40, 52), picture(3, 40, 60)]
    torch.library.opcheck(op, op_arguments(batch, geometry, color))
    torch.library.opcheck(
        op, op_arguments(ragged, geometry, color, mean=None, channels_last_out=True, out_dtype=3)
    )


def test_augment_compile():
    geometry, color = sample_tables(2)
    images = picture(2, 3, 40, 52)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(images, geometry, color):
        return augment(images, geometry, color, size=(23, 37), dtype=torch.float32, mean=0.5) + 1

    expected = augment(images, geometry, color, size=(23, 37), dtype=torch.float32, mean=0.5) + 1
    assert torch.equal(step(images, geometry, color), expected)


def double(function):
    """jvp of ``function`` at x along t by dual numbers."""

    def run(x, t):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, t))).tangent

    return run


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager")


DERIVATIVES = {  # (function, x, t) -> the derivative of the function along t, or its gradient
    "backward": lambda f, x, t: torch.autograd.grad(f(x.requires_grad_()), x)[0],
    "backward of compiled": lambda f, x, t: torch.autograd.grad(compiled(f)(x.requires_grad_()), x)[
        0
    ],
    "func.grad": lambda f, x, t: torch.func.grad(f)(x),
    "compiled func.grad": lambda f, x, t: compiled(torch.func.grad(f))(x),
    "vjp": lambda f, x, t: torch.func.vjp(f, x)[1](torch.ones(()))[0],
    "dual": lambda f, x, t: double(f)(x, t),
    "dual through compiled": lambda f, x, t: double(compiled(f))(x, t),
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "jvp of compiled": lambda f, x, t: torch.func.jvp(compiled(f), (x,), (t,))[1],
    "compiled jvp": lambda f, x, t: compiled(lambda x: torch.func.jvp(f, (x,), (t,))[1])(x),
    "double backward": lambda f, x, t: torch.autograd.grad(
        torch.autograd.grad(f(x.requires_grad_()), x, create_graph=True)[0].mul(t).sum(), x
    )[0],
    "double backward of compiled": lambda f, x, t: torch.autograd.grad(
        torch.autograd.grad(compiled(f)(x.requires_grad_()), x, create_graph=True)[0].mul(t).sum(),
        x,
    )[0],
    "hessian-vector": lambda f, x, t: torch.func.jvp(torch.func.grad(f), (x,), (t,))[1],
    "vmap": lambda f, x, t: torch.func.vmap(f)(x[None]),
    "compiled vmap": lambda f, x, t: compiled(torch.func.vmap(f))(x[None]),
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x),
}


@pytest.mark.parametrize("below", [False, True], ids=["function", "op"])
@pytest.mark.parametrize("way", DERIVATIVES)
def test_augment_derivatives_are_right_or_refused(monkeypatch, way, below):
    """Never a silent zero: of the public function, and of the op that it calls."""
    monkeypatch.delenv("BIGKERNEL_STRICT")
    x, t = (
        picture(1, 3, 9, 8, dtype=torch.float32),
        picture(1, 3, 9, 8, dtype=torch.float32, seed=1),
    )
    geometry = tables.affine(25, [0, 0], 0.8, [0, 0], (9, 8))[None]
    weights = picture(1, 3, 9, 8, dtype=torch.float32, seed=2)
    color = torch.zeros(1, 0, 2)

    def op(x):
        arguments = op_arguments([x], geometry, color, out_h=9, out_w=8, in_scale=1.0)
        return (torch.ops.bigkernel.augment(*arguments) ** 2 * weights).sum()

    def function(x):
        options = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
        return (augment(x, geometry, size=(9, 8), **options) ** 2 * weights).sum()

    def exact(x):
        arguments = op_arguments([x], geometry, color, out_h=9, out_w=8, in_scale=1.0)
        return (reference.augment(*arguments) ** 2 * weights).sum()

    if "vmap" in way:
        with pytest.raises((NotImplementedError, RuntimeError), match=r"outside of .*vmap"):
            DERIVATIVES[way](op if below else function, x, t)
        return
    eager = {"compiled func.grad": "func.grad", "compiled jvp": "jvp"}
    plain = eager.get(way, way.removesuffix(" of compiled").replace(" through compiled", ""))
    expected = DERIVATIVES[plain](exact, x.clone(), t)
    try:
        actual = DERIVATIVES[way](op if below else function, x.clone(), t)
    except Exception as error:
        said = "torch.func transform" in str(error) or "double backward" in str(error)
        if "compiled" not in way or not said:
            raise
        return
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.1


class Plain(torch.Tensor):
    """A subclass that leaves everything as it is."""


class Lazy(torch.Tensor):
    """One whose data mean nothing, as torch.nn.attention.bias.CausalBias."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def distributed(x):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, init_device_mesh("cpu", (1,)))


def fake(x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


SUBCLASSES = {
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "a nested one"),
    "jagged": (
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        "a nested one",
    ),
    "masked": (lambda x: torch.masked.masked_tensor(x, x > 0.5), "a MaskedTensor"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "quint8"),
    "sparse": (lambda x: x.to_sparse(), "must be dense"),
    "lazy": (lambda x: x.as_subclass(Lazy), "a Lazy"),
    "DTensor": (distributed, "a DTensor.*to_local"),
    "fake": (fake, "FakeTensor outside"),
    "complex": (lambda x: x * 1j, "complex64"),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of its own prototypes
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", SUBCLASSES)
@pytest.mark.parametrize("caller", ["op", "list", "transform", "geometry", "fill"])
def test_augment_refuses_what_is_no_plain_tensor(name, caller):
    make, words = SUBCLASSES[name]
    if name in ("complex", "quantised") and caller in ("list", "geometry"):
        pytest.skip("a matter of dtype, which other tests look at")
    try:
        x = make(picture(2, 3, 8, 8, dtype=torch.float32))
        row = make(UNCHANGED.expand(2, 16).float()).double() if caller == "geometry" else None
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"torch makes none: {error}")
    good = picture(2, 3, 8, 8, dtype=torch.float32)
    rows = tables.resized_crop(0, 0, 8, 8, (8, 8)).expand(2, 16)
    calls = {
        "op": lambda: augment(x, rows, size=(8, 8)),
        "list": lambda: augment([x, x], rows, size=(8, 8)),
        "transform": lambda: transforms.Pad(1)(x),
        "geometry": lambda: augment(good, row, size=(8, 8)),
        "fill": lambda: augment(good, rows, size=(8, 8), fill=x),
    }
    with pytest.raises((TypeError, ValueError), match=words):
        calls[caller]()


def test_augment_understands_subclasses_that_are_their_data():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = picture(2, 3, 8, 8, dtype=torch.float32)
    rows = tables.resized_crop(1, 1, 6, 6, (8, 8)).expand(2, 16)
    expected = augment(x, rows, size=(8, 8))
    for same in (
        x.as_subclass(Plain),
        torch.nn.Parameter(x, requires_grad=False),
        torch._neg_view(-x),
    ):
        result = augment(same, rows, size=(8, 8)).as_subclass(torch.Tensor)
        assert torch.equal(result, expected)
        result = transforms.RandomHorizontalFlip(1.0)(same).as_subclass(torch.Tensor)
        assert torch.equal(result, x.flip(-1))
    with FakeTensorMode() as mode:
        shape = augment(mode.from_tensor(x), mode.from_tensor(rows), size=(4, 5)).shape
    assert shape == (2, 3, 4, 5)


BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("path", ["unchanged", *PATHS])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_augment_not_finite_images(native, dtype, path, interpolation):
    """NaN and infinities in the image arrive where torch's do, and nowhere else."""
    shape = (3, 50, 170) if path == "sparse" else (3, 40, 52)
    geometry = UNCHANGED if path == "unchanged" else PATHS[path]
    size = (40, 52) if path == "unchanged" else (24, 19)
    for value in BAD:
        image = picture(*shape, dtype=DTYPES[dtype])
        image[1, 15, 16] = image[0, 21, 23] = image[2, 8, 32] = value
        assert_as_torch(image, geometry, None, size=size, interpolation=interpolation)


def assert_as_torch(image, geometry, color, **options):
    actual = run(image, geometry, color, **options)
    with bigkernel.use_backend("torch"):
        expected = run(image, geometry, color, **options)
    if actual.dtype == torch.uint8:
        assert (actual.int() - expected.int()).abs().max() <= 1
        return
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=max(3e-5, eps), equal_nan=True)


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("dtype", ["uint8", "uint8-whole", "fp32", "bf16"])
def test_augment_not_finite_colours(native, name, dtype):
    """A factor that is not finite, and such a pixel under each colour operation."""
    dtype, _, whole = dtype.partition("-")
    for value in BAD:
        image = picture(3, 40, 52, dtype=DTYPES[dtype])
        assert_as_torch(
            image, UNCHANGED, tables.chain((name, value), whole=bool(whole)), size=(40, 52)
        )
        if dtype != "uint8":
            image[1, 15, 16] = image[0, 21, 23] = value
            assert_as_torch(image, UNCHANGED, tables.chain((name, 0.3)), size=(40, 52))


@pytest.mark.parametrize("dtype", ["uint8", "fp32", "bf16"])
def test_augment_not_finite_constants(native, dtype):
    """mean, std, in_scale, and fill where pixels are moved; conversion of NaN to bytes."""
    image = picture(3, 40, 52, dtype=DTYPES[dtype])
    for value in BAD:
        for out in (torch.float32, torch.uint8):
            same = {"size": (40, 52), "dtype": out}
            assert_as_torch(image, UNCHANGED, None, mean=[value, 0.5, 0.5], **same)
            assert_as_torch(image, UNCHANGED, None, std=[value, 0.5, 0.5], **same)
            assert_as_torch(image, UNCHANGED, None, in_scale=value, **same)
        for path in ("shift", "rotate"):
            options = {"size": (24, 19), "fill": value, "interpolation": "nearest"}
            for color in (None, tables.chain(("contrast", 0.5), ("hue", 0.2))):
                assert_as_torch(image, PATHS[path], color, **options)
        if dtype != "uint8":
            image[1, 15, 16] = value
            assert_as_torch(image, UNCHANGED, None, size=(40, 52), dtype=torch.uint8)
            image[1, 15, 16] = 0.5


@pytest.mark.filterwarnings("ignore:bigkernel.augment runs in plain PyTorch")
@pytest.mark.parametrize("value", BAD)
def test_augment_fill_that_is_not_finite_stays_outside(monkeypatch, value):
    """Also where pixels are blended: as torchvision's pad around its resize."""
    monkeypatch.delenv("BIGKERNEL_STRICT")
    image = picture(3, 40, 52, dtype=torch.float32)
    expected = F.pad(F.resize(image, [20, 30]), [2], fill=value)
    chain = transforms.Compose([transforms.Resize((20, 30)), transforms.Pad(2, fill=value)])
    torch.testing.assert_close(chain(image), expected, atol=2e-5, rtol=0, equal_nan=True)
    turned = run(image, PATHS["rotate"], size=(24, 19), fill=value)
    plain = run(image, PATHS["rotate"], size=(24, 19), fill=0.5)
    inside = turned.isfinite()
    assert 0.3 < inside.float().mean() <= 1
    torch.testing.assert_close(turned[inside], plain[inside], atol=1e-6, rtol=0)


def test_augment_float64_goes_to_torch_aloud():
    image = picture(3, 40, 52).double() / 255
    with pytest.raises(RuntimeError, match="float64 has no native kernel"):
        run(image, UNCHANGED, size=(40, 52))
    with bigkernel.use_backend("torch"):
        assert torch.equal(run(image, UNCHANGED, size=(40, 52)), image)


GOOD = picture(2, 3, 8, 8)
ROWS = UNCHANGED.expand(2, 16)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((GOOD[0], ROWS), {}, ValueError, r"images must be a batch \[N, C, H, W\].*images\[None\]"),
        ((GOOD * 1j, ROWS), {}, TypeError, "images must be of a floating-point, whole-number"),
        (([GOOD[0], GOOD[1].float()], ROWS), {}, TypeError, r"images\[1\] must be torch.uint8"),
        (([GOOD[0], GOOD[1, :1]], ROWS), {}, ValueError, r"images\[1\] must be of 3 channels"),
        (([GOOD[0], 3], ROWS), {}, TypeError, r"images\[1\] must be a tensor, got int"),
        ((GOOD, ROWS.clone().requires_grad_()), {}, ValueError, "geometry must be without grad"),
        ((GOOD, ROWS), {"std": torch.zeros(1)}, ValueError, "std must be without a zero"),
        ((GOOD, ROWS[:1]), {}, ValueError, r"geometry must be of shape \(N, 16\) with N = 2"),
        ((GOOD, ROWS.float()), {}, TypeError, "geometry must be a torch.float64 tensor"),
        ((GOOD, ROWS, torch.zeros(2, 3)), {}, ValueError, r"color must be of shape \(N, K, 2\)"),
        ((GOOD, ROWS, torch.zeros(2, 1, 2).double()), {}, TypeError, "color must be a torch.float"),
        ((GOOD[:, :2], ROWS, torch.zeros(2, 1, 2)), {}, ValueError, "of 1 or 3 channels"),
        ((GOOD, ROWS), {"fill": [1.0, 2.0]}, ValueError, "fill must be a number, 3 numbers"),
        ((GOOD, ROWS), {"mean": [1.0, 2.0]}, ValueError, "mean must be a number or 3 numbers"),
        ((GOOD, ROWS), {"std": [1.0, 0.0, 1.0]}, ValueError, "std must be without a zero"),
        ((GOOD.float().to_sparse(), ROWS), {}, TypeError, "images must be dense"),
        ((GOOD, None), {}, TypeError, "geometry must be a tensor, got NoneType"),
        ((GOOD, ROWS, [[1, 2]]), {}, TypeError, "color must be a tensor, got list"),
        ((GOOD, ROWS), {"size": 4}, TypeError, r"size must be two whole numbers"),
        ((GOOD, ROWS), {"size": (4.0, 4)}, TypeError, r"size must be two whole numbers"),
        ((GOOD, ROWS), {"size": (4,)}, ValueError, r"size must be \(height, width\)"),
        ((GOOD, ROWS), {"size": (4, -1)}, ValueError, "neither negative"),
        ((GOOD, ROWS), {"interpolation": "bicubic"}, ValueError, "'nearest' or 'bilinear'"),
        ((GOOD, ROWS), {"dtype": torch.complex64}, TypeError, "dtype must be a floating"),
    ],
)
def test_augment_rejects_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        augment(*arguments, **({"size": (4, 4)} | options))


@pytest.mark.parametrize("code", [6.0, 16.0, -1.0, 1.5, math.nan])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_augment_rejects_unknown_colours(code, backend):
    color = torch.tensor([[[code, 1.0]]])
    with (
        bigkernel.use_backend(backend),
        pytest.raises((ValueError, RuntimeError), match="color codes must be 0 to 5, or 17 to 21"),
    ):
        run(GOOD[0], UNCHANGED, color, size=(4, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [GOOD.int()]}, "images must be"),
        ({"images": [GOOD[0]]}, "a row for each image"),
        ({"images": [GOOD[:, :2]]}, "must have 3 channels"),
        ({"geometry": ROWS[:, :8]}, "geometry must be float64"),
        ({"color": torch.zeros(1, 1, 2)}, "color must be float32"),
        ({"fill": torch.zeros(3)}, "fill must be float32"),
        ({"mean": torch.zeros(2)}, "mean must be float32"),
        ({"interpolation": 7}, "interpolation must be"),
        ({"out_dtype": 9}, "out_dtype must be"),
        ({"out_h": -1}, "must not be negative"),
    ],
)
def test_augment_native_op_checks_for_itself(changes, message):
    """Called below the public function: whatever memory safety rests on is checked again."""
    if not bigkernel.cpu_isas():
        pytest.skip("the native library is not built")
    arguments = {"images": [GOOD], "geometry": ROWS, "color": torch.zeros(2, 1, 2)} | changes
    first = [arguments.pop(name) for name in ("images", "geometry", "color")]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bigkernel.augment(*op_arguments(*first, **arguments))


def test_augment_reference_handles_float64():
    """The definition itself, in float64, against torchvision in float64."""
    image = picture(3, 40, 52).double() / 255
    box = (3, 5, 30, 40)
    with bigkernel.use_backend("torch"):
        actual = run(image, tables.resized_crop(*box, (24, 24)), size=(24, 24))
    expected = F.resized_crop(image, *box, [24, 24], antialias=True)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    assert reference.OUT_DTYPES[4] == torch.float64


@pytest.mark.parametrize("width", [224, 217], ids=["aligned", "not-aligned"])
def test_augment_large_results(cpu_isa, width):
    """Results that no cache would keep are stored in another way; one image's is small."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 3, 20, 24), dtype=torch.uint8, generator=generator)
    rows = torch.zeros(30, 16, dtype=torch.float64)
    rows[:, 0], rows[:, 4] = 24 / width, 20 / 224
    rows[:, 8:10] = torch.tensor([24.0, 20.0])
    rows[:, 12:14] = torch.tensor([float(width), 224.0])
    rows[:, 14] = 1
    options = {"size": (224, width), "dtype": torch.float32, "mean": 0.5, "std": 0.25}
    whole = augment(images, rows, **options)
    assert whole.nbytes > 1 << 24
    for i in range(30):
        assert torch.equal(whole[i], augment(images[i : i + 1], rows[i : i + 1], **options)[0])


def test_augment_codes_are_written_down_once():
    """The kernels' header is what table.py writes, and no kernel counts columns itself."""
    folder = Path(__file__).resolve().parents[2] / "csrc" / "augment"
    assert (folder / "codes.h").read_text() == table.header()
    for path in sorted(folder.iterdir()):
        assert not re.search(r"\brow\[\d|row \+ \d", path.read_text()), path
        if path.name != "codes.h":
            assert not re.search(r"enum class Augment(Border|Nearest|Op)\b", path.read_text()), path
    parts = [table.MAP, table.SOURCE, table.OUTPUT]
    columns = [i for part in parts for i in range(part.start, part.stop)]
    assert [*columns, table.BORDER, table.NEAREST] == list(range(table.COLUMNS))
    native = [getattr(torch, name) for name in table.NATIVE_DTYPES]
    assert set(native) == set(registry.find("augment").dtypes)
    assert native == list(reference.OUT_DTYPES[: len(native)])
