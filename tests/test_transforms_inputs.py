"""What a transform takes and gives back, and how it says no."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bigkernel import transforms as bk

CROP = bk.RandomResizedCrop(6)
FULL = bk.Compose(
    [
        bk.ToImage(),
        bk.RandomResizedCrop(6),
        bk.ColorJitter(0.3, 0.3, 0.3, 0.1),
        bk.ToDtype(torch.float32, scale=True),
        bk.Normalize([0.5], [0.25]),
    ]
)


def picture(height: int = 12, width: int = 15, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def batch(n: int = 4) -> Tensor:
    return torch.stack([picture(seed=i) for i in range(n)])


def run(transform: bk.Transform, images: Any, **options: Any) -> Any:
    n = len(images) if isinstance(images, list) or getattr(images, "ndim", 0) == 4 else 1
    return transform(images, torch.Generator().manual_seed(3), range(n), **options)


def test_batch_gives_batch() -> None:
    result = run(CROP, batch())
    assert (result.shape, result.dtype) == ((4, 3, 6, 6), torch.uint8)


def test_channels_last_batch_stays_so() -> None:
    result = run(CROP, batch().movedim(1, -1).contiguous())
    assert torch.equal(result.movedim(-1, 1), run(CROP, batch()))


def test_to_image_puts_channels_first() -> None:
    assert torch.equal(run(FULL, batch().movedim(1, -1).contiguous()), run(FULL, batch()))


def test_layout_by_argument_and_attribute() -> None:
    odd = torch.arange(2 * 3 * 4 * 3, dtype=torch.uint8).view(2, 3, 4, 3)
    # What could be read both ways has its channels first, as for torchvision.
    assert bk.Pad(1)(odd).shape == (2, 3, 6, 5)
    assert bk.Pad(1)(torch.zeros(3, 9, 3)).shape == (3, 11, 5)
    assert bk.Pad(1)(torch.zeros(2, 3, 4, 4)).shape == (2, 3, 6, 6)
    assert bk.Pad(1)([torch.zeros(3, 9, 4)])[0].shape == (3, 11, 6)
    assert bk.Pad(1)(odd.numpy()).shape == (2, 3, 6, 5)
    assert bk.Pad(1)(odd[0].numpy()).shape == (5, 6, 3)  # an array of one picture: as everywhere
    assert bk.Pad(1)(odd, layout="channels_first").shape == (2, 3, 6, 5)
    assert bk.Pad(1)(odd, layout="channels_last").shape == (2, 5, 6, 3)
    pad = bk.Pad(1)
    pad.layout = "channels_last"
    assert pad(odd).shape == (2, 5, 6, 3)
    with pytest.raises(ValueError, match="layout"):
        pad(odd, layout="NHWC")
    # one pixel of one channel is the same either way; other numbers of channels come first
    assert bk.Pad(1)(torch.zeros(2, 1, 1, 1)).shape == (2, 1, 3, 3)
    assert bk.Pad(1)(torch.zeros(2, 7, 8, 9)).shape == (2, 7, 10, 11)
    assert bk.Pad(1)(torch.zeros(2, 8, 9, 1)).shape == (2, 10, 11, 1)


def test_strided_batches() -> None:
    images = batch()
    expected = run(CROP, images)
    assert torch.equal(run(CROP, images.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(
        run(CROP, torch.cat([images, images])[::2].roll(0)), run(CROP, images[[0, 2, 0, 2]])
    )
    assert torch.equal(run(CROP, images[:1].expand(4, -1, -1, -1))[0], expected[0])
    wide = torch.zeros(4, 3, 12, 30, dtype=torch.uint8)
    wide[..., ::2] = images
    assert torch.equal(run(CROP, wide[..., ::2]), expected)


def test_single_image_gives_image() -> None:
    result = run(CROP, picture())
    assert torch.equal(result, run(CROP, picture()[None])[0])
    assert run(FULL, picture()).shape == (3, 6, 6)


def test_list_gives_a_batch_where_sizes_agree() -> None:
    images = [picture(12, 15, seed=0), picture(20, 9, seed=1), picture(7, 7, seed=2)]
    result = run(FULL, images)
    assert (result.shape, result.dtype) == ((3, 3, 6, 6), torch.float32)
    for i, image in enumerate(images):
        alone = FULL(image, torch.Generator().manual_seed(3), [i])
        torch.testing.assert_close(result[i], alone, rtol=0, atol=1e-6)


def test_list_gives_a_list_where_they_do_not() -> None:
    result = run(bk.Pad(1), [picture(12, 15), picture(20, 9), picture(12, 15, seed=1)])
    assert [tuple(r.shape) for r in result] == [(3, 14, 17), (3, 22, 11), (3, 14, 17)]
    assert torch.equal(result[2][:, 1:-1, 1:-1], picture(12, 15, seed=1))


def test_arrays() -> None:
    array = picture().movedim(0, -1).contiguous().numpy()
    assert torch.equal(run(FULL, array), run(FULL, picture()))
    assert torch.equal(run(FULL, [array, array[:9]])[0], run(FULL, picture()))
    assert run(FULL, np.zeros((8, 9), dtype=np.uint8)).shape == (1, 6, 6)
    assert torch.equal(run(FULL, batch().numpy()), run(FULL, batch()))
    assert torch.equal(run(FULL, batch().movedim(1, -1).numpy()), run(FULL, batch()))
    # Views that torch itself does not take: mirrored (BGR as RGB), and of another byte order.
    mirrored = np.ascontiguousarray(array[:, ::-1, ::-1])[:, ::-1, ::-1]
    assert torch.equal(run(FULL, mirrored), run(FULL, picture()))
    assert torch.equal(run(FULL, [mirrored])[0], run(FULL, picture()))
    swapped = (array / np.float32(255)).astype(">f4")
    assert torch.equal(run(FULL, swapped), run(FULL, picture().float() / 255))


def test_tensor_subclasses_stay() -> None:
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    result = run(CROP, tv_tensors.Image(picture()))
    assert isinstance(result, tv_tensors.Image)
    assert torch.equal(result.as_subclass(Tensor), run(CROP, picture()))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "CMYK"])
def test_pil_gives_pil(mode: str) -> None:
    image_module = pytest.importorskip("PIL.Image")
    channels = len(image_module.new(mode, (1, 1)).getbands())
    tensor = picture(channels=channels)
    pil = image_module.frombytes(
        mode, (15, 12), tensor.movedim(0, -1).contiguous().numpy().tobytes()
    )
    result = run(CROP, pil)
    assert isinstance(result, image_module.Image)
    assert (result.mode, result.size) == (mode, (6, 6))
    expected = run(CROP, tensor, layout="channels_first")
    got = torch.from_numpy(np.atleast_3d(np.array(result))).movedim(-1, 0)
    assert torch.equal(got, expected)


def test_pil_lists_and_pil_to_tensor() -> None:
    image_module = pytest.importorskip("PIL.Image")
    pils = [image_module.fromarray(b.movedim(0, -1).contiguous().numpy()) for b in batch(2)]
    result = run(bk.Pad(1), pils)
    assert [p.size for p in result] == [(17, 14)] * 2
    assert torch.equal(run(FULL, pils), run(FULL, batch(2)))
    assert torch.equal(run(FULL, pils[0]), run(FULL, batch(1)[0]))
    assert torch.equal(run(CROP, [pils[0], batch(2)[1]]), run(CROP, batch(2)))  # mixed


@pytest.mark.parametrize("transform", [bk.Normalize([0.5], [0.5]), bk.ToDtype(torch.float32)])
def test_pil_needs_to_image_first(transform: bk.Transform) -> None:
    image_module = pytest.importorskip("PIL.Image")
    with pytest.raises(TypeError, match=r"Put ToImage\(\) before"):
        transform(image_module.new("RGB", (4, 4)))


def pil(mode: str) -> Any:
    """A picture of 20 x 30 whose pixels differ from their neighbours."""
    image_module = pytest.importorskip("PIL.Image")
    values = (np.arange(600).reshape(20, 30) * 37) % 251
    if mode == "1":
        return image_module.fromarray(((values % 2) * 255).astype(np.uint8)).convert("1")
    if mode == "P":
        picture = image_module.fromarray(values.astype(np.uint8), "P")
        picture.putpalette([(k * 89) % 256 for k in range(768)])
        picture.info["transparency"] = 3
        return picture
    dtype = {"I": "<i4", "F": "<f4", "I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2"}[mode]
    scale = {"I": 70001, "F": 0.37}.get(mode, 261)
    return image_module.frombytes(mode, (30, 20), (values * scale).astype(dtype).tobytes())


PIL_GEOMETRY = {
    "flip": (lambda: bk.RandomHorizontalFlip(1.0), lambda f, x: f.horizontal_flip(x)),
    "crop": (lambda: bk.CenterCrop((9, 40)), lambda f, x: f.center_crop(x, [9, 40])),
    "pad": (lambda: bk.Pad((1, 2, -3, 4)), lambda f, x: f.pad(x, [1, 2, -3, 4])),
    "edge": (
        lambda: bk.Pad(2, padding_mode="edge"),
        lambda f, x: f.pad(x, [2], padding_mode="edge"),
    ),
    "turn": (
        lambda: bk.RandomRotation((90, 90), expand=True),
        lambda f, x: f.rotate(x, 90.0, expand=True),
    ),
    "shrink": (lambda: bk.Resize((10, 15)), lambda f, x: f.resize(x, [10, 15])),
}


@pytest.mark.filterwarnings("ignore:bigkernel.augment runs in plain PyTorch")
@pytest.mark.parametrize("name", PIL_GEOMETRY)
@pytest.mark.parametrize("mode", ["1", "P", "I", "F", "I;16", "I;16L", "I;16B"])
def test_pil_modes_without_channels_of_bytes(mode: str, name: str) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2").functional
    make, theirs = PIL_GEOMETRY[name]
    picture = pil(mode)
    # Of I;16B torchvision reads the bytes in the wrong order: I;16 holds the same numbers.
    result, expected = make()(picture), theirs(functional, pil(mode.removesuffix("B")))
    assert (result.mode, result.size) == (mode, expected.size)
    got, wanted = (np.array(x).astype(np.float64) for x in (result, expected))
    if name == "shrink" and mode not in ("1", "P"):
        # Pillow rounds some modes in another way, and filters I;16 not at all.
        tensor = torch.from_numpy(np.array(picture).astype(np.float64))[None]
        wanted = functional.resize(tensor, [10, 15])[0].numpy()
        np.testing.assert_allclose(got, wanted, atol=0.0 if mode == "F" else 0.5, rtol=1e-5)
    else:
        np.testing.assert_array_equal(got, wanted)
    if mode == "P":
        assert result.info == picture.info
        assert np.array_equal(np.array(result.convert("RGB")), np.array(expected.convert("RGB")))


def test_palettes_and_black_and_white_are_not_blended() -> None:
    chain = bk.Compose(
        [bk.Resize((13, 17)), bk.RandomRotation(40, "bilinear"), bk.RandomAffine(9, shear=5)]
    )
    for mode in ("P", "1"):
        picture = pil(mode)
        values = set(np.unique(np.array(picture)).tolist()) | {0}
        assert set(np.unique(np.array(chain(picture, ids=[1]))).tolist()) <= values
    # Once they are tensors they are numbers, as for torchvision.
    blended = bk.Compose([bk.ToImage(), bk.Resize((7, 9))])(pil("P"))
    assert torch.equal(blended, bk.Resize((7, 9))(torch.from_numpy(np.array(pil("P")))[None]))


@pytest.mark.parametrize("mode", ["1", "P", "I", "F", "I;16"])
def test_pil_modes_without_channels_have_no_colors(mode: str) -> None:
    with pytest.raises(ValueError, match=r'for colour transforms.*convert\("RGB"\)'):
        bk.ColorJitter(0.5)(pil(mode))
    result = bk.Compose([bk.ToImage(), bk.ColorJitter(0.5)])(pil(mode))
    assert result.dtype == torch.from_numpy(np.array(pil(mode))).dtype


def test_pil_modes_that_do_not_go_together_are_refused() -> None:
    image_module = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match=r"images\[1\].*convert"):
        CROP([image_module.new("RGB", (4, 4)), image_module.new("L", (4, 4))])
    with pytest.raises(ValueError, match=r"images\[1\].*mode 'P'.*convert"):
        CROP([image_module.new("L", (4, 4)), image_module.new("P", (4, 4))])
    with pytest.raises(ValueError, match=r"mode 'PA'.*convert"):
        CROP(image_module.new("PA", (4, 4)))


WHOLE_DTYPES = [torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]


def whole_numbers(dtype: torch.dtype, negative: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    values = torch.rand(2, 3, 21, 26, generator=generator, dtype=torch.float64)
    if dtype == torch.bool:
        return values > 0.5
    values = (values * min(torch.iinfo(dtype).max, 2**24)).long()
    return (values - 20 if negative and dtype.is_signed else values).to(dtype)


# transform, torchvision's function, levels apart; geometry moves pixels exactly.
WHOLE_OPERATIONS = {
    "flip": (bk.RandomHorizontalFlip(1.0), lambda f, x: f.horizontal_flip(x), 0),
    "crop": (bk.CenterCrop((9, 30)), lambda f, x: f.center_crop(x, [9, 30]), 0),
    "pad": (bk.Pad((1, 2, -3, -4), fill=5), lambda f, x: f.pad(x, [1, 2, -3, -4], fill=5), 0),
    "edge": (
        bk.Pad((1, 2, 3, -4), padding_mode="edge"),
        lambda f, x: f.pad(x, [1, 2, 3, -4], padding_mode="edge"),
        0,
    ),
    "nearest": (
        bk.Resize((9, 13), "nearest"),
        lambda f, x: f.resize(x, [9, 13], interpolation="nearest"),
        0,
    ),
    "resize": (bk.Resize((9, 13)), lambda f, x: f.resize(x, [9, 13]), 1),
    "turn": (bk.RandomRotation((30, 30), fill=7), lambda f, x: f.rotate(x, 30, fill=7), 0),
    "rotate": (
        bk.RandomRotation((30, 30), "bilinear", fill=7),
        lambda f, x: f.rotate(x, 30, interpolation="bilinear", fill=7),
        1,
    ),
    "dim": (bk.ColorJitter((0.5, 0.5)), lambda f, x: f.adjust_brightness(x, 0.5), 1),
    "bright": (bk.ColorJitter((1.5, 1.5)), lambda f, x: f.adjust_brightness(x, 1.5), 1),
    "contrast": (
        bk.ColorJitter(contrast=(0.5, 0.5)),
        lambda f, x: f.adjust_contrast(x, 0.5),
        1,
    ),
    "saturation": (
        bk.ColorJitter(saturation=(0.5, 0.5)),
        lambda f, x: f.adjust_saturation(x, 0.5),
        1,
    ),
    "hue": (bk.ColorJitter(hue=(0.2, 0.2)), lambda f, x: f.adjust_hue(x, 0.2), 2),
    "grey": (bk.RandomGrayscale(1.0), lambda f, x: f.rgb_to_grayscale(x, 3), 1),
}


@pytest.mark.filterwarnings("ignore:bigkernel.augment runs in plain PyTorch")
@pytest.mark.parametrize("name", WHOLE_OPERATIONS)
@pytest.mark.parametrize("dtype", WHOLE_DTYPES, ids=str)
def test_whole_numbers_as_torchvision(dtype: torch.dtype, name: str) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2").functional
    transform, theirs, levels = WHOLE_OPERATIONS[name]
    images = whole_numbers(dtype, negative=name != "hue")
    wide = dtype.itemsize >= 4
    if name == "hue" and wide:  # torchvision's fails in the end: by float32, as it begins
        top = torch.iinfo(dtype).max
        expected = functional.adjust_hue(images.float() / top, 0.2).double() * top
        levels = top * 2**-22
    else:
        # Of 32 bits torchvision blends in float32, and is off by more than a level.
        blends = name in ("rotate", "resize") and wide
        given = images.double() if blends else images
        expected = torch.stack([theirs(functional, image) for image in given])
        levels += 2 if wide and levels and not blends else 0
    result = transform(images)
    assert result.dtype == dtype
    assert (result.double() - expected.double()).abs().max() <= levels


@pytest.mark.filterwarnings("ignore:bigkernel.augment runs in plain PyTorch")
@pytest.mark.parametrize("dtype", [*WHOLE_DTYPES[1:], torch.uint32, torch.uint64], ids=str)
def test_the_largest_numbers_do_not_overflow(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    for value in (limits.min, limits.max):
        flat = torch.full((1, 9, 9), value, dtype=dtype)
        for transform in (bk.Resize(4), bk.RandomHorizontalFlip(1.0)):
            assert (transform(flat) == value).all()
    assert bk.Normalize([0.5], [0.5])(torch.full((1, 2, 2), limits.max, dtype=dtype)).max() == 1
    assert bk.ToDtype(dtype, scale=True)(torch.ones(1, 2, 2))[0, 0, 0].item() == limits.max


@pytest.mark.filterwarnings("ignore:bigkernel.augment runs in plain PyTorch")
def test_moving_pixels_keeps_all_of_64_bits() -> None:
    limits = torch.iinfo(torch.int64)
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8) * 1234567 + (limits.max - 10**9)
    images[:, :, 0] = limits.min
    chain = bk.Compose([bk.RandomCrop(5), bk.RandomVerticalFlip(1.0), bk.RandomGrayscale(0.0)])
    params = chain.sample([(8, 8)] * 2, ids=range(2))[0]
    for image, result, top, left in zip(
        images, chain(images, ids=range(2)), params.top, params.left, strict=True
    ):
        assert torch.equal(result, image[:, top : top + 5, left : left + 5].flip(1))


@pytest.mark.filterwarnings("ignore:bigkernel.augment runs in plain PyTorch")
@pytest.mark.parametrize("scale", [False, True], ids=["values", "scale"])
@pytest.mark.parametrize(
    "target", [*WHOLE_DTYPES, torch.uint8, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize(
    "source", [*WHOLE_DTYPES, torch.uint8, torch.float32, torch.float64], ids=str
)
def test_to_any_dtype_as_torchvision(source: torch.dtype, target: torch.dtype, scale: bool) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2").functional
    if source.is_floating_point:
        images = whole_numbers(torch.int16).to(source) / 32767
    else:
        images = whole_numbers(source)
    result = bk.ToDtype(target, scale)(images)
    assert result.dtype == target
    whole, was_whole = not target.is_floating_point, not source.is_floating_point
    if scale and whole and was_whole and (source == torch.bool) != (target == torch.bool):
        # torchvision refuses: false and true are 0 and the largest.
        if target == torch.bool:
            assert torch.equal(result, images != 0)
        else:
            assert torch.equal(result, images.to(target) * torch.iinfo(target).max)
        return
    wide = target == torch.int64 or (target == torch.int32 and source == torch.float32)
    if scale and wide and not was_whole:
        top = torch.iinfo(target).max  # torchvision refuses here too
        expected = (images.double() * top).round()
        assert (result.double() - expected).abs().max() <= top * 2**-23
        return
    if whole:
        expected = functional.to_dtype(images, target, scale)
        far = (result.double() - expected.double()).abs().max()
        assert far <= (0 if was_whole else 1)  # torchvision cuts floats, this rounds
        return
    if scale and target == torch.float16:  # where torchvision's large numbers become infinite
        expected = functional.to_dtype(images, torch.float32, scale).to(target)
    else:
        expected = functional.to_dtype(images, target, scale)
    tolerance = 2 * torch.finfo(target).eps if target != torch.float64 else 1e-7
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_frames_of_a_clip_share_their_parameters(last: bool) -> None:
    clips = torch.stack([batch(3), batch(3).flip(0)])  # [N, T, C, H, W]
    given = clips.movedim(2, -1).contiguous() if last else clips
    chain = bk.Compose([CROP, bk.RandomHorizontalFlip(), bk.ColorJitter(0.3, 0.3, 0.3, 0.1)])
    result = chain(given, torch.Generator().manual_seed(3), [5, 9])
    result = result.movedim(-1, 2) if last else result
    assert result.shape == (2, 3, 3, 6, 6)
    for clip, got, number in zip(clips, result, (5, 9), strict=True):
        for frame, wanted in zip(clip, got, strict=True):
            alone = chain(frame, torch.Generator().manual_seed(3), [number])
            assert torch.equal(alone, wanted)
    assert chain(given[None], ids=[1]).shape[:3] == (1, 2, 3)
    assert chain(given[:0]).shape[:2] == (0, 3)
    assert chain(given[:, :0]).shape[:2] == (2, 0)
    spread = bk.RandomRotation(40, expand=True)(given, ids=[5, 9])
    assert isinstance(spread, list) or spread.shape[:2] == (2, 3)
    with pytest.raises(ValueError, match="each of the 2 images"):
        chain(given, ids=range(6))


@pytest.mark.parametrize("mode", ["constant", "edge"])
@pytest.mark.parametrize("padding", [-2, (-1, 3), (-1, 2, 3, -4), (5, -1, -6, 0), (0, 0, -14, 0)])
def test_negative_padding_crops_as_torchvision(padding: Any, mode: str) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2").functional
    sides = [padding] if isinstance(padding, int) else list(padding)
    expected = functional.pad(batch(), sides, 9 if mode == "constant" else None, mode)
    assert torch.equal(bk.Pad(padding, 9, mode)(batch()), expected)
    crop = bk.RandomCrop(1, padding=padding, fill=9, padding_mode=mode)
    params = crop.sample([(12, 15)] * 4, ids=range(4))
    assert (params.padding == crop.sample([(12, 15)] * 4, ids=range(4)).padding).all()
    for result, image, top, left in zip(
        crop(batch(), ids=range(4)), expected, params.top, params.left, strict=True
    ):
        assert torch.equal(result, image[:, top : top + 1, left : left + 1])
    with pytest.raises(ValueError, match="at least one pixel"):
        bk.Pad((-8, 0, -7, 0))(batch())


def test_scale_may_begin_at_zero() -> None:
    crop = bk.RandomResizedCrop(6, scale=[0.0, 1.0])
    params = crop.sample([(12, 15)] * 500, torch.Generator().manual_seed(1))
    assert params.height.min() >= 1
    assert params.width.min() >= 1
    assert (params.height * params.width < 6).any()
    assert crop(batch()).shape == (4, 3, 6, 6)
    assert bk.RandomResizedCrop(6, scale=(0, 0))(batch()).shape == (4, 3, 6, 6)  # the middle
    with pytest.raises(ValueError, match="from 0 on"):
        bk.RandomResizedCrop(6, scale=(-0.1, 1))


def test_pil_is_antialiased_unless_told_not_to() -> None:
    image_module = pytest.importorskip("PIL.Image")
    pil = image_module.fromarray(picture(60, 60).movedim(0, -1).contiguous().numpy())
    tensor = picture(60, 60)
    for antialias, expected in ((None, True), (True, True), (False, False)):
        result = np.array(bk.Resize((9, 9), antialias=antialias)(pil))
        wanted = bk.Resize((9, 9), antialias=expected)(tensor).movedim(0, -1).numpy()
        assert (result == wanted).all()
    assert torch.equal(
        bk.Resize((9, 9), antialias=None)(tensor), bk.Resize((9, 9), antialias=False)(tensor)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_dtype_stays_without_conversion(dtype: torch.dtype) -> None:
    images = (batch().float() / 255).to(dtype) if dtype.is_floating_point else batch()
    chain = bk.Compose([CROP, bk.ColorJitter(0.2), bk.RandomRotation(9)])
    assert run(chain, images).dtype == dtype


@pytest.mark.parametrize("shape", [(0, 3, 12, 15), (0, 12, 15, 3)], ids=["first", "last"])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape, dtype=torch.uint8)
    last = shape[-1] == 3
    assert CROP(empty).shape == ((0, 6, 6, 3) if last else (0, 3, 6, 6))
    result = FULL(empty)
    assert (result.shape, result.dtype) == ((0, 3, 6, 6), torch.float32)
    chain = bk.Compose([bk.Resize((8, 9)), bk.Pad(1), bk.ColorJitter(0.5), bk.CenterCrop((5, 30))])
    assert chain(empty, ids=[]).shape == ((0, 5, 30, 3) if last else (0, 3, 5, 30))
    assert CROP([]) == []


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        pytest.param(torch.zeros(3, 4), ValueError, r"\[N, C, H, W\]", id="rank"),
        pytest.param(torch.zeros(2, 3, 8, 8) * 1j, TypeError, "whole-number", id="dtype"),
        pytest.param(torch.zeros(2, 3, 0, 8), ValueError, "at least one pixel", id="no-pixels"),
        pytest.param("image.png", TypeError, "str", id="path"),
        pytest.param(torch.zeros(3, 8, 8).to_sparse(), TypeError, "dense", id="sparse"),
        pytest.param(
            (torch.zeros(3, 8, 8), 5), TypeError, "got int. Of a sample.*alone", id="label"
        ),
        pytest.param({"image": torch.zeros(3, 8, 8)}, TypeError, "dict. Of a sample", id="dict"),
        pytest.param([torch.zeros(8, 8)], ValueError, r"images\[0\]", id="list-rank"),
        pytest.param(
            [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)], ValueError, "channels", id="list-channels"
        ),
        pytest.param(
            [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)],
            ValueError,
            "as the first image",
            id="list-dtype",
        ),
    ],
)
def test_bad_images(images: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        CROP(images)


def test_masks_and_videos_are_refused() -> None:
    """As images they would be blended, recoloured, or drawn for frame by frame."""
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    mask = tv_tensors.Mask(torch.zeros(1, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"images must be images, got a tv_tensors\.Mask\. Masks"):
        CROP(mask)
    with pytest.raises(TypeError, match=r"images\[1\] must be images, got a tv_tensors\.Mask"):
        CROP([picture(), mask])
    with pytest.raises(TypeError, match=r"got a tv_tensors\.Video"):
        CROP(tv_tensors.Video(torch.zeros(2, 3, 8, 8)))
    boxes = tv_tensors.BoundingBoxes(torch.ones(2, 4), format="XYXY", canvas_size=(8, 8))
    with pytest.raises(TypeError, match=r"got a tv_tensors\.BoundingBoxes\. Masks, boxes and"):
        CROP(boxes)


def test_arrays_that_cannot_be_written_are_read_in_silence() -> None:
    array = picture().movedim(0, -1).numpy().copy()
    expected = CROP(array, ids=[0])
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(CROP(array, ids=[0]), expected)


@pytest.mark.parametrize("sizes", [[(0, 4)], [(3, 4, 5)], "x", [(1.5, 2.0)], [3, 4]])
def test_bad_sizes_to_sample_for(sizes: Any) -> None:
    with pytest.raises(ValueError, match="sizes must be positive pairs"):
        CROP.sample(sizes)
    assert len(CROP.sample([]).top) == 0


def test_image_smaller_than_the_crop() -> None:
    with pytest.raises(ValueError, match=r"\(20, 6\).*\(12, 15\).*pad_if_needed"):
        bk.RandomCrop((20, 6))(batch())
    with pytest.raises(ValueError, match=r"padded image.*image 1"):
        bk.RandomCrop(14, padding=1)([picture(12, 12), picture(10, 12)])
    assert bk.RandomCrop((20, 6), pad_if_needed=True)(batch()).shape == (4, 3, 20, 6)
    assert bk.CenterCrop(20)(batch()).shape == (4, 3, 20, 20)
    # not where the crop is not done
    bk.RandomApply([bk.RandomCrop(99)], p=0.0)(batch())


def test_colors_need_one_or_three_channels() -> None:
    four = torch.zeros(2, 4, 8, 9)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        bk.ColorJitter(0.5)(four)
    assert bk.RandomResizedCrop(6)(four).shape == (2, 4, 6, 6)
    with pytest.raises(ValueError, match=r"fill.*4"):
        bk.Pad(1, fill=(1, 2, 3))(four)
    with pytest.raises(ValueError, match=r"mean.*4"):
        bk.Normalize([0.1, 0.2], [1, 1])(four)


@pytest.mark.parametrize("ids", [[0, 1, 2], [[0, 1, 2, 3]], [0.5] * 4, ["a"] * 4, 7, {0, 1, 2, 3}])
def test_bad_ids(ids: Any) -> None:
    with pytest.raises(ValueError, match="ids"):
        CROP(batch(), ids=ids)


def test_bad_generator() -> None:
    with pytest.raises(TypeError, match=r"generator must be .* got 42\. A call takes images alone"):
        CROP(batch(), 42)  # where torchvision's take a label


BAD_ARGUMENTS = [
    ("RandomResizedCrop", {"size": (1, 2, 3)}),
    ("RandomResizedCrop", {"size": 8, "scale": 0.5}),
    ("RandomResizedCrop", {"size": 8, "ratio": (1, 2, 3)}),
    ("RandomCrop", {"size": (1, 2, 3)}),
    ("RandomCrop", {"size": 8, "padding": (1, 2, 3)}),
    ("RandomCrop", {"size": 8, "padding": "1"}),
    ("RandomCrop", {"size": 8, "padding": 1, "padding_mode": "mirror"}),
    ("RandomCrop", {"size": 8, "fill": "black"}),
    ("CenterCrop", {"size": (1, 2, 3)}),
    ("Resize", {"size": (1, 2, 3)}),
    ("Resize", {"size": None}),
    ("Resize", {"size": None, "max_size": 0.5}),
    ("RandomHorizontalFlip", {"p": 1.5}),
    ("RandomVerticalFlip", {"p": -0.5}),
    ("RandomGrayscale", {"p": 2}),
    ("RandomRotation", {"degrees": -3}),
    ("RandomRotation", {"degrees": (1, 2, 3)}),
    ("RandomRotation", {"degrees": None}),
    ("RandomRotation", {"degrees": 3, "center": 4}),
    ("RandomRotation", {"degrees": 3, "center": (1, 2, 3)}),
    ("RandomRotation", {"degrees": 3, "fill": "black"}),
    ("RandomAffine", {"degrees": -3}),
    ("RandomAffine", {"degrees": 3, "translate": 0.3}),
    ("RandomAffine", {"degrees": 3, "translate": (0.3, 2)}),
    ("RandomAffine", {"degrees": 3, "scale": 2}),
    ("RandomAffine", {"degrees": 3, "scale": (-1, 2)}),
    ("RandomAffine", {"degrees": 3, "shear": -3}),
    ("RandomAffine", {"degrees": 3, "shear": (1, 2, 3)}),
    ("ColorJitter", {"brightness": -1}),
    ("ColorJitter", {"contrast": (2, 1)}),
    ("ColorJitter", {"saturation": "much"}),
    ("ColorJitter", {"hue": 0.7}),
    ("ColorJitter", {"hue": (-0.7, 0)}),
    ("Pad", {"padding": (1, 2, 3)}),
    ("Pad", {"padding": 1, "padding_mode": "mirror"}),
    ("Pad", {"padding": 1, "fill": "black"}),
    ("ToDtype", {"dtype": "float32"}),
    ("RandomApply", {"transforms": []}),
    ("RandomApply", {"transforms": 3}),
    ("Compose", {"transforms": []}),
    ("Compose", {"transforms": 3}),
]


@pytest.mark.parametrize(
    ("name", "arguments"), BAD_ARGUMENTS, ids=lambda v: v if isinstance(v, str) else str(v)
)
def test_bad_arguments_raise_as_torchvisions(name: str, arguments: dict[str, Any]) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whatever it is
        getattr(v2, name)(**arguments)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(bk, name)(**arguments)
    assert str(ours.value).startswith(f"bigkernel.{name}: ")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda: bk.Resize(8, "bicubic"), "bicubic.*torchvision", id="filter"),
        pytest.param(lambda: bk.Resize(8, "cubic"), "interpolation", id="no-filter"),
        pytest.param(lambda: bk.Resize(0), "positive", id="no-size"),
        pytest.param(lambda: bk.CenterCrop(-1), "positive", id="negative-size"),
        pytest.param(lambda: bk.Resize((8, 8), max_size=9), "max_size", id="max-and-both"),
        pytest.param(lambda: bk.Resize(8, max_size=8), "greater", id="max-too-small"),
        pytest.param(lambda: bk.Resize(2, max_size=3)(picture(1, 200)), "one pixel", id="thin"),
        pytest.param(lambda: bk.Pad(1, padding_mode="reflect"), "pad before", id="reflect"),
        pytest.param(lambda: bk.RandomRotation(math.inf), "finite", id="endless-angle"),
        pytest.param(lambda: bk.RandomAffine(0, scale=(1, math.inf)), "finite", id="endless-scale"),
        pytest.param(lambda: bk.RandomRotation(9, center=(math.nan, 0)), "finite", id="nan-center"),
        pytest.param(lambda: bk.RandomResizedCrop(8, (1, math.inf)), "numbers", id="endless-area"),
        pytest.param(lambda: bk.Normalize([0.5], [0.0]), "zero", id="zero-std"),
        pytest.param(lambda: bk.ToDtype(torch.complex64), "floating-point", id="complex"),
        pytest.param(lambda: bk.ToDtype({"x": torch.uint8}), "others", id="dict-without"),
        pytest.param(lambda: bk.Pad(1, fill=[]), "fill must be at least one", id="no-fill"),
        pytest.param(lambda: bk.Normalize([], [1.0]), "mean must be at least one", id="no-mean"),
        pytest.param(lambda: bk.Compose([bk.Pad(1)]).explain([]), "one image, got none", id="none"),
    ],
)
def test_bad_arguments_of_our_own(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_bad_types_of_our_own() -> None:
    with pytest.raises(TypeError, match=r"RandomAffine: scale must be numbers, got \('a', 1\)\."):
        bk.RandomAffine(10, scale=("a", 1))
    with pytest.raises(TypeError, match=r"Stage: function must be callable, got 3\."):
        bk.Stage(3)


def test_normalize_at_random_needs_floats() -> None:
    chain = bk.RandomApply([bk.Normalize([0.5], [0.5])])
    with pytest.raises(ValueError, match=r"results must be of one dtype, got .* Put ToDtype"):
        chain(batch(), torch.Generator().manual_seed(0), range(4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(
            lambda: bk.RandomResizedCrop(8, scale=(1, 0)), "RandomResizedCrop: scale", id="scale"
        ),
        pytest.param(
            lambda: bk.RandomResizedCrop(8, ratio=(1, 0.5)), "RandomResizedCrop: scale", id="ratio"
        ),
        pytest.param(lambda: bk.ToDtype({"others": None}, True), "ToDtype: scale", id="no-dtype"),
    ],
)
def test_warnings_say_who_warns(make: Any, words: str) -> None:
    with pytest.warns(UserWarning, match=rf"^bigkernel\.{words}"):
        make()


@pytest.mark.parametrize("container", [bk.Compose, bk.RandomApply])
def test_what_is_no_transform_is_refused(container: Any) -> None:
    with pytest.raises(TypeError, match=r"transforms\[1\] must be a transform or .*got 'x'"):
        container([bk.Pad(1), "x"])
    with pytest.raises(TypeError, match=r"got the class Pad\. Make one: Pad\(\.\.\.\)"):
        container([bk.Pad])


def test_interpolation_spellings() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    expected = bk.InterpolationMode.BILINEAR
    for spelling in ("bilinear", 2, v2.InterpolationMode.BILINEAR, expected):
        assert bk.RandomRotation(3, spelling).interpolation is expected


def test_numpy_scalars_are_numbers() -> None:
    bk.RandomRotation(np.float32(3), fill=np.float32(0.5))
    bk.RandomAffine(np.int64(3), shear=np.float64(2))
    bk.ColorJitter(np.float32(0.5), hue=np.float64(0.1))
    assert bk.RandomResizedCrop(np.int64(6)).size == (6, 6)
    assert bk.Resize(np.int64(6)).size == [6]
    bk.Pad(np.int64(2))


def test_dicts_for_fill_and_dtype() -> None:
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    fill = {tv_tensors.Image: 9, tv_tensors.Mask: 1}
    assert bk.Pad(1, fill=fill)(picture())[0, 0, 0] == 9
    dtype = {tv_tensors.Mask: torch.uint8, "others": torch.float32}
    assert bk.ToDtype(dtype)(picture()).dtype == torch.float32
    assert bk.ToDtype({"others": None})(picture()).dtype == torch.uint8


@pytest.mark.filterwarnings("ignore:.*is not supported|.*TorchScript|.*deprecated")
def test_torchscript_and_tracing_are_refused() -> None:
    """They would keep one call's random numbers, or nothing, without a word."""
    model = torch.nn.Sequential(bk.RandomHorizontalFlip(), torch.nn.Conv2d(3, 3, 1))
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(NotImplementedError, match="TorchScript cannot compile transforms"):
        torch.jit.script(model)
    with pytest.raises(NotImplementedError, match=r"outside of torch\.jit\.trace"):
        torch.jit.trace(model, images)
    with pytest.raises(NotImplementedError, match=r"make_fx"):
        torch.fx.experimental.proxy_tensor.make_fx(model)(images)
    with pytest.raises(NotImplementedError, match=r"torch\.export"):
        torch.export.export(model, (images,), strict=False)
    with pytest.raises(NotImplementedError, match=r"outside of torch\.vmap"):
        torch.func.vmap(bk.Pad(1))(images)


def test_fx_keeps_a_transform_as_one_call() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.augment = bk.Compose([bk.RandomHorizontalFlip(), bk.Normalize([0.5], [0.5])])
            self.head = torch.nn.Conv2d(3, 3, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.augment(images, layout="channels_first")).relu()

    model, images = Model(), torch.rand(6, 3, 8, 8)
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["augment", "head"]
    results = []
    for module in (model, traced, traced):
        torch.manual_seed(1 if len(results) < 2 else 2)
        results.append(module(images))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
    with pytest.raises(NotImplementedError, match="a module that holds the transform"):
        torch.fx.symbolic_trace(bk.Pad(1))


def test_inside_a_compiled_function() -> None:
    """Drawing stays outside the compiled part."""

    @torch.compile(backend="aot_eager")
    def compiled(images: Tensor) -> Tensor:
        return run(FULL, images) * 2

    assert torch.equal(compiled(batch()), run(FULL, batch()) * 2)


def test_input_stays_as_it_was() -> None:
    images = batch()
    before = images.clone()
    result = run(FULL, images)
    result.zero_()
    bk.ToImage()(images).zero_()
    assert torch.equal(images, before)


def test_repr() -> None:
    assert repr(bk.RandomHorizontalFlip()) == "RandomHorizontalFlip(p=0.5)"
    assert repr(bk.Resize(8)) == "Resize(size=[8], interpolation=bilinear, antialias=True)"
    chain = bk.Compose([bk.RandomApply([bk.CenterCrop(4)], p=0.1), bk.Pad(2)])
    assert repr(chain) == (
        "Compose(\n"
        "  RandomApply(\n"
        "    CenterCrop(size=(4, 4))\n"
        "    p=0.1\n"
        "  )\n"
        "  Pad(padding=2, fill=0, padding_mode=constant)\n"
        ")"
    )
