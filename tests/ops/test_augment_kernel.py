"""What augment's CUDA launcher does beside giving right numbers, which test_augment.py shows:
how often it launches, what is read and written, what it refuses.

Feature -> test
  one launch; one more for each contrast, without the source   test_augment_kernel_launches
  coalesced writes                                             test_augment_kernel_writes
  sources are read once where nothing overlaps                 test_augment_kernel_reads
  exact means: as on the CPU, and bit-equal over runs          test_augment_kernel_means_are_exact
  images between launches, in the output or beside it          test_augment_kernel_holds_images
  errors: before the launch, of the launch, out of bounds      test_augment_kernel_refuses,
                                                               test_augment_kernel_names_a_failed_launch,
                                                               test_augment_kernel_stays_within_bounds
"""

import augment_ptx
import augment_tables as tables
import pytest
import torch

import bigkernel
from bigkernel.ops.augment import augment
from bigkernel.testing import ptx
from bigkernel.testing.tolerance import assert_as_accurate

DTYPES = {
    "uint8": torch.uint8,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
BRIGHT = tables.chain(("brightness", 1.1), ("hue", 0.1))
CONTRASTS = tables.chain(("contrast", 0.7), ("hue", 0.1), ("contrast", 1.4))


@pytest.fixture(autouse=True)
def _nvcc():
    if ptx.nvcc() is None:
        pytest.skip("nvcc is not on the path")


def picture(*shape, dtype=torch.uint8):
    values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1))
    return values.to(torch.uint8) if dtype == torch.uint8 else (values / 255).to(dtype)


def identity(size):
    return tables.resized_crop(0, 0, *size, size)


def emulate(images, geometry, color=None, **options):
    """The result and the launches."""
    with augment_ptx.emulated():
        return augment(images, geometry, color, **options), list(augment_ptx.launches)


def call(images, geometry, color=None, size=(24, 19), out_dtype=0):
    """The arguments as the binding hands them to the launcher."""
    color = torch.zeros(len(geometry), 0, 2) if color is None else color
    rest = (torch.zeros(1, 3), None, None, *size, False, False, 1, True, 1 / 255, out_dtype)
    return augment_ptx.Call([images], geometry, color, *rest)


def test_augment_kernel_launches():
    images, size = picture(3, 3, 40, 52), (24, 19)
    geometry = tables.resized_crop(3, 2, 35, 48, size).expand(3, 16)
    _, (only,) = emulate(images, geometry, BRIGHT.expand(3, 2, 2), size=size)
    assert only.counters.loads["images"].bytes > 0
    # Of three images two have a contrast and one of them two.
    color = torch.zeros(3, 3, 2)
    color[0, :2], color[2] = BRIGHT, CONTRASTS
    color[1, 1] = CONTRASTS[0, 0]
    _, made = emulate(images, geometry, color, size=size)
    blocks = made[0].grid[0] // 3
    assert [launch.grid[0] for launch in made] == [3 * blocks, 2 * blocks, blocks]
    assert all("images" not in launch.counters.loads for launch in made[1:])
    assert all(launch.counters.global_atomics == 0 for launch in made)


@pytest.mark.parametrize("layout", ["planar", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 1, 4])
def test_augment_kernel_writes(dtype, layout, channels):
    """At most 1.05 times the sectors that the output fills; between launches, too."""
    images, size = picture(2, channels, 30, 40), (64, 48)
    geometry = tables.affine(25, [0, 0], 1.0, [0, 0], (30, 40), size).expand(2, 16)
    options = {"size": size, "dtype": DTYPES[dtype], "channels_last_out": layout != "planar"}
    contrast = None if channels == 4 else CONTRASTS[:, :1].expand(2, 1, 2)
    for color in (None, contrast):
        out, made = emulate(images, geometry, color, **options)
        assert made[-1].counters.stores["out"].sectors <= 1.05 * out.nbytes / 32
        # Every element once.
        assert made[-1].counters.stores["out"].bytes == out.nbytes
        for launch in made:
            stores = launch.counters.global_stores
            assert stores.sectors <= 1.05 * stores.minimum + len(images) * launch.grid[0]


def test_augment_kernel_writes_odd_sizes():
    """Planes that begin anywhere: a tile's two ends may each cost one more access."""
    images, size = picture(2, 3, 30, 40), (61, 47)
    out, (launch,) = emulate(images, identity(size).expand(2, 16), size=size)
    pieces = 3 * launch.grid[0]
    assert launch.counters.stores["out"].bytes == out.nbytes
    assert launch.counters.stores["out"].sectors <= out.nbytes / 32 + 3 * pieces


def test_augment_kernel_reads():
    """Nearest, every pixel once: planes are read as they lie, 32 bytes at a time."""
    images, size = picture(1, 3, 64, 64), (64, 64)
    _, (launch,) = emulate(images, identity(size)[None], size=size, interpolation="nearest")
    assert launch.counters.loads["images"].sectors == images.nbytes / 32


@pytest.mark.parametrize("out", ["uint8", "fp32", "bf16"])
def test_augment_kernel_means_are_exact(out):
    """In whole numbers the mean is the CPU's to the bit, and so is what follows from it."""
    images, size = picture(2, 3, 40, 52), (40, 52)
    pairs = [("contrast", 0.7), ("brightness", 1.1), ("saturation", 0.6), ("contrast", 1.6)]
    color = tables.chain(*pairs, whole=True).expand(2, 4, 2)
    arguments = (images, identity(size).expand(2, 16), color)
    options = {"size": size, "dtype": DTYPES[out]}
    actual, _ = emulate(*arguments, **options)
    again, _ = emulate(*arguments, **options)
    assert torch.equal(actual, again)
    if not bigkernel.cpu_isas():
        pytest.skip("the native library is not built: there is no CPU kernel to compare with")
    assert torch.equal(actual, augment(*arguments, **options))


@pytest.mark.parametrize(
    ("out", "whole", "beside"),
    [(0, False, False), (1, True, False), (3, True, False), (1, False, True), (3, False, True)],
    ids=["fp32", "bf16-whole", "uint8-whole", "bf16", "uint8"],
)
def test_augment_kernel_holds_images(out, whole, beside):
    """fp32 and whole numbers wait in the output, where they are exact; the rest beside it."""
    images, size = picture(2, 3, 40, 52), (24, 19)
    geometry = tables.resized_crop(3, 2, 35, 48, size).expand(2, 16)
    pairs = [("brightness", 1.2), ("contrast", 0.7), ("saturation", 1.2), ("contrast", 1.2)]
    color = tables.chain(*pairs, whole=whole).expand(2, 4, 2)
    _, scratch, launches, _ = call(images, geometry, color, size, out).plan()
    assert launches == 3
    assert (scratch > 2 * 3 * 24 * 19 * 4) == beside
    options = {"size": size, "dtype": augment_ptx.OUT_DTYPES[out]}
    actual, _ = emulate(images, geometry, color, **options)
    with bigkernel.use_backend("torch"):
        same = augment(images, geometry, color, **options)
    if out == 3 or whole:
        scale = 1 if out == 3 else 255
        assert ((actual.double() - same.double()).abs() * scale).max() <= 2
        return
    with bigkernel.use_backend("torch"):
        exact = augment(images.double() / 255, geometry, color, size=size)
    assert_as_accurate(actual, exact, same)


def test_augment_kernel_refuses():
    """Before any launch, in one sentence."""
    images, geometry = picture(1, 3, 40, 52), identity((40, 52))[None]
    with pytest.raises(RuntimeError, match=r"augment: color codes must be 0 to 5, or 17 to 21"):
        call(images, geometry, torch.tensor([[[6.0, 1.0]]])).run()
    wide = call(images, geometry)
    wide.input.args.out_w = 2**31
    with pytest.raises(RuntimeError, match=r"an output image must have fewer than 2\^31 elements"):
        wide.plan()
    with pytest.raises(RuntimeError, match=r"augment_sample_kernel is for GPUs of compute capabil"):
        call(images, geometry).plan(ptx.DEVICES["T4"])


def test_augment_kernel_names_a_failed_launch():
    made = call(picture(1, 3, 40, 52), identity((24, 19))[None])
    library = augment_ptx.host().library
    tables_ = (augment_ptx.ctypes.c_char * made.plan()[0])()
    error = library.augment_run(augment_ptx.ctypes.byref(made.input), tables_, None, None)
    assert error.decode() == (
        "bigkernel: launching CUDA kernel augment_sample_kernel with grid (1, 1, 1), block "
        "(256, 1, 1) and 0 bytes of shared memory failed: the emulator stopped the launch "
        "(cudaErrorLaunchFailure)"
    )


def test_augment_kernel_stays_within_bounds():
    """The emulator does check these launches: an image that is said to be larger is found."""
    made = call(picture(1, 3, 40, 52), tables.resized_crop(0, 0, 48, 52, (24, 19))[None])
    made.images[0].height = 48
    with pytest.raises(ptx.OutOfBounds, match=r"'images' \(uint8 \[1, 3, 40, 52\]\)"):
        made.run()


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_augment_kernel_training_size(dtype, out, channels_last):
    """ImageNet's size, several tiles an image, every pair of dtypes and both layouts."""
    size = (224, 224)
    images = [picture(3, h, w, dtype=DTYPES[dtype]) for h, w in [(240, 320), (333, 250), (80, 90)]]
    rows = [
        tables.resized_crop(11, 20, 200, 280, size, flip_x=True),
        tables.affine(-20, [5, 0], 0.8, [4, 0], (333, 250), size),
        tables.resized_crop(0, 0, 80, 90, size),
    ]
    geometry = torch.stack(rows)
    color = tables.chain(("brightness", 1.1), ("contrast", 0.8), ("hue", 0.05)).expand(3, 3, 2)
    options = {"size": size, "dtype": DTYPES[out], "channels_last_in": channels_last}
    options |= {"channels_last_out": channels_last}
    if channels_last:
        images = [image.permute(1, 2, 0).contiguous() for image in images]
    actual, made = emulate(images, geometry, color, **options)
    with bigkernel.use_backend("torch"):
        expected = augment(images, geometry, color, **options)
    # A last place of the output's type, and fp32's error in between.
    apart = {"uint8": 1, "fp32": 1e-5, "bf16": 2**-7, "fp16": 2**-10}[out]
    assert (actual.double() - expected.double()).abs().max() <= apart
    assert made[-1].counters.stores["out"].sectors <= 1.05 * actual.nbytes / 32
