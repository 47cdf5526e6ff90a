"""Augment: a batch of images through one map and one colour chain per sample, in a single pass.

Every sample has a row in three tables. All of a chain of transforms (crops, flips, resizes,
rotations, colour jitter, conversion, normalisation) folds into one such row, so the cost of a call
is that of its output, not of the number of transforms.

``table.py`` explains the tables.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch._guards import detect_fake_mode

from bigkernel import _library, registry
from bigkernel.backend import select
from bigkernel.errors import has_tangent
from bigkernel.expect import Expect, shape_of
from bigkernel.ops.augment import reference
from bigkernel.ops.augment.reference import Arguments
from bigkernel.ops.augment.table import COLUMNS, INTERPOLATIONS

_EXPECT = Expect("augment")
SCHEMA = (  # `Arguments`, in their order
    "(Tensor[] images, Tensor geometry, Tensor color, Tensor fill, Tensor? mean, Tensor? std, "
    "SymInt out_h, SymInt out_w, bool channels_last_in, bool channels_last_out, "
    "int interpolation, bool antialias, float in_scale, int out_dtype) -> Tensor"
)
OUT_DTYPES = reference.OUT_DTYPES  # of images, too; the op's out_dtype is an index into this
_DTYPES = "a floating-point, whole-number or bool dtype of torch's"
Numbers = Tensor | Sequence[float] | float


def _fake(*given: Any) -> Tensor:
    call = Arguments(*given)
    n, channels = call.geometry.shape[0], call.fill.shape[1]
    size = (call.out_h, call.out_w)
    shape = (n, *size, channels) if call.channels_last_out else (n, channels, *size)
    like = call.images[0] if call.images else call.geometry
    return like.new_empty(shape, dtype=OUT_DTYPES[call.out_dtype])


_TABLES = ("geometry", "color", "fill", "mean", "std")


def _with_derivatives(op: Any) -> Any:
    """What autograd calls in the op's place: the op has no derivative, its definition has.

    Without this a custom op drops a tangent, and inside of torch.func.grad a gradient, silently.
    """

    def augment(keyset: Any, images: list[Tensor], *rest: Any) -> Any:
        call = Arguments(images, *rest)
        for name in _TABLES:
            table = getattr(call, name)
            tangent = isinstance(table, Tensor) and has_tangent(table)
            _check_constant(name, table, tangent)
        if not any(asks_derivative(image) or has_tangent(image) for image in images):
            return op.redispatch(keyset & torch._C._after_autograd_keyset, images, *rest)
        if detect_fake_mode() is not None:
            expected = "without gradient or tangent inside of a compiled torch.func transform"
            fix = "Compile the function inside of the transform, or neither"
            raise _EXPECT.error("images", expected, "images with one", fix, NotImplementedError)
        return reference.augment(images, *rest)

    return augment


def _batched(*_: Any) -> Any:
    raise NotImplementedError(
        "bigkernel.augment: images must be outside of torch.vmap, got a call inside. "
        "A batch is one call already: pass [N, C, H, W]."
    )


def asks_derivative(x: Tensor) -> bool:
    """Whether autograd follows ``x``, backward or forward."""
    if x.requires_grad and torch.is_grad_enabled():
        return True
    # Dynamo cannot trace the look; what it traces calls the op, which looks for itself.
    return not torch.compiler.is_compiling() and has_tangent(x)


def _check_constant(name: str, x: Any, tangent: bool = False) -> None:
    if isinstance(x, Tensor) and (tangent or asks_derivative(x)):
        fix = "Only images have derivatives: pass a detached tensor"
        raise _EXPECT.error(name, "without gradient or tangent", "a tensor with one", fix)


def _followed(tensors: Sequence[Tensor]) -> str | None:
    asked = any(map(asks_derivative, tensors))
    return "the images require a gradient, which PyTorch computes" if asked else None


_OP = registry.register(
    registry.Op(
        noun="augment",
        title="image augmentation",
        functions=(registry.Function("augment", SCHEMA, reference.augment, _fake),),
        dtypes=(torch.uint8, *registry.NATIVE_DTYPES),
        limit=_followed,
        no_contest="torch's side is a pass over the images for each transform",
    )
)
_library.derive("augment", _with_derivatives, _batched)


def augment(
    images: Tensor | Sequence[Tensor],
    geometry: Tensor,
    color: Tensor | None = None,
    *,
    size: Sequence[int],
    fill: Numbers = 0.0,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    interpolation: str = "bilinear",
    antialias: bool = True,
    in_scale: float | None = None,
    dtype: torch.dtype | None = None,
    channels_last_in: bool = False,
    channels_last_out: bool = False,
) -> Tensor:
    """Resample, recolour and normalise N images, each with parameters of its own.

    Args:
        images: [N, C, H, W], or N images [C, H, W] of different sizes ([N, H, W, C] and [H, W, C]
            with ``channels_last_in``); whole numbers in their dtype's range (uint8: 0..255), or
            floats in 0..1.
        geometry: float64 [N, 16], the table of ``bigkernel/ops/augment/table.py``. Best on the CPU:
            it decides what is launched, so a table on the GPU is brought back first, which waits
            for it. So is ``color``.
        color: float32 [N, K, 2], described there too; without it nothing is recoloured.
        size: (height, width) of the output.
        fill: for output pixels that come from no source pixel: a number, C numbers, or a tensor
            [C], [1, C] or [N, C]; in the units of the input. NaN or infinite, it stays out of
            pixels that come from source pixels alone.
        mean: a number or C numbers; the result is ``(value * in_scale - mean) / std``.
        std: the same.
        interpolation: "nearest" or "bilinear".
        antialias: widen the filter where the map shrinks.
        in_scale: None scales between the ranges of input and output dtype (floats: 0..1).
        dtype: of the output; None keeps the input's.
        channels_last_in: the images are [N, H, W, C] or [H, W, C].
        channels_last_out: the result is [N, height, width, C].

    Returns:
        [N, C, height, width], or [N, height, width, C] with ``channels_last_out``.

    uint8, float32, bfloat16 and float16 run natively, in float32 arithmetic; other dtypes run in
    PyTorch, in float64. So do images that require a gradient or have a forward-mode tangent:
    autograd follows the definition, to any order, in eager code; a whole-number result has none.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which.
        NotImplementedError: inside of torch.vmap.
    """
    expect = _EXPECT
    batch, n, channels = _check_images(images, channels_last_in)
    device = batch[0].device if batch else geometry.device
    source = batch[0].dtype if batch else torch.uint8
    _check_table("geometry", geometry, torch.float64, (n, COLUMNS), f"(N, {COLUMNS})", device)
    if color is None:
        color = torch.zeros(n, 0, 2, dtype=torch.float32, device="cpu")
    k = color.shape[1] if isinstance(color, Tensor) and color.dim() == 3 else 0
    _check_table("color", color, torch.float32, (n, k, 2), "(N, K, 2)", device)
    if batch and k > 0 and channels not in (1, 3):
        fix = "Leave color out, or select channels"
        raise expect.error("images", "of 1 or 3 channels for colour", f"{channels} channels", fix)
    wide = work_dtype(source)
    fill_table = _fill(fill, n, channels if batch else None, wide)
    if not batch:
        channels = fill_table.shape[1]
    height, width = _check_size(size)
    expect.one_of("interpolation", interpolation, *INTERPOLATIONS)
    dtype = source if dtype is None else dtype
    expect(dtype in OUT_DTYPES, "dtype", _DTYPES, dtype, cls=TypeError)
    if in_scale is None:
        in_scale = 1.0 if dtype == source else reference.bound(dtype) / reference.bound(source)
    return launch(
        Arguments(
            images=batch,
            geometry=geometry,
            color=color,
            fill=fill_table,
            mean=_per_channel("mean", mean, channels, wide),
            std=_per_channel("std", std, channels, wide),
            out_h=height,
            out_w=width,
            channels_last_in=channels_last_in,
            channels_last_out=channels_last_out,
            interpolation=INTERPOLATIONS.index(interpolation),
            antialias=antialias,
            in_scale=in_scale,
            out_dtype=OUT_DTYPES.index(dtype),
        ),
        interpolation == "nearest" or _is_finite(fill),
    )


def launch(arguments: Arguments, finite: bool) -> Tensor:
    """``augment`` without the checks, for transforms: their tables fit by construction.

    finite: the fill is, or it is not blended with.
    """
    images = arguments.images
    device = images[0].device if images else arguments.geometry.device
    reason = _OP.why_not_dtype(OUT_DTYPES[arguments.out_dtype]) or _OP.why_not_native(images)
    if reason is None and not finite:
        reason = "the kernels blend with a finite fill only"
    namespace = select("augment", device, reason)
    # The op is opaque to autograd, which goes through its definition instead.
    if any(map(asks_derivative, images)):
        run = namespace.augment if device.type == "meta" else reference.augment
        return run(*arguments)  # type: ignore[no-any-return]
    return _library.call(namespace, "augment", *arguments)  # type: ignore[no-any-return]


def launch_usual(device: torch.device, arguments: Sequence[Any]) -> Tensor:
    """`launch` for who knows that the kernels take it all, and has asked `_library.is_usual`."""
    namespace = select("augment", device)
    return _library.call_usual(namespace, "augment", *arguments)  # type: ignore[no-any-return]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of fill, mean and std for images of this dtype."""
    return torch.float32 if dtype in _OP.dtypes else torch.float64


def _check_images(
    images: Tensor | Sequence[Tensor], channels_last: bool
) -> tuple[list[Tensor], int, int]:
    """(the op's list, N, C) after checking that the images can form one batch."""
    expect = _EXPECT
    if isinstance(images, Tensor):
        check_plain(_EXPECT, "images", images)
        batch, names = [images], ["images"]
        layout = "[N, H, W, C]" if channels_last else "[N, C, H, W]"
        expected, fix = (
            f"a batch {layout} or a list of images",
            "Add a batch dimension with images[None]",
        )
        expect.rank("images", images, 4, expected, fix)
        n = images.shape[0]
    else:
        batch = list(images)
        n, names = len(batch), [f"images[{i}]" for i in range(len(batch))]
        layout = "[H, W, C]" if channels_last else "[C, H, W]"
        for name, image in zip(names, batch, strict=True):
            expect.tensor(name, image, "Convert PIL images and arrays first")
            check_plain(_EXPECT, name, image)
            expect.rank(name, image, 3, f"of shape {layout}")
    axis = -1 if channels_last else -3
    for name, image in zip(names, batch, strict=True):
        first, channels = batch[0], batch[0].shape[axis]
        expect.dtype(
            name, image, OUT_DTYPES, f"of {_DTYPES}", "Convert with .to(torch.uint8) or .float()"
        )
        if image.dtype != first.dtype:
            expected = f"{first.dtype} like the first image"
            raise expect.error(name, expected, image.dtype, cls=TypeError)
        if image.device != first.device:
            raise expect.error(name, f"on {first.device} like the first image", image.device)
        if image.shape[axis] != channels:
            expected = f"of {channels} channels like the first image"
            got = f"{image.shape[axis]} ({shape_of(image)})"
            fix = "channels_last_in says which dimension holds the channels"
            raise expect.error(name, expected, got, fix)
    return batch, n, batch[0].shape[axis] if batch else 0


def check_plain(expect: Expect, name: str, x: Tensor) -> None:
    """``x`` is a dense tensor whose own data are the values, or is known to stand for one."""
    if x.is_nested:
        fix = "Pass the list of its images, from .unbind()"
        raise expect.error(name, "plain tensors", "a nested one", fix, TypeError)
    expect.dense(name, x, "dense", "Convert with .to_dense()")
    kind = type(x)
    if kind is Tensor or kind is torch.nn.Parameter:
        if not torch.compiler.is_compiling() and is_batchedtensor(x):
            expected, fix = (
                "outside of torch.vmap",
                "A batch is one call already: pass [N, C, H, W]",
            )
            raise expect.error(name, expected, "a tensor inside", fix, NotImplementedError)
        return
    if kind.__module__.startswith("torch._subclasses."):  # fake and functional tensors, of tracing
        if kind.__name__ == "FakeTensor" and detect_fake_mode() is None:
            expected, fix = (
                "within its FakeTensorMode",
                "Call it inside `with fake_tensor.fake_mode:`",
            )
            raise expect.error(name, expected, "a FakeTensor outside", fix, TypeError)
        return
    # A subclass that says itself what operations mean may hold anything in the place of its data.
    usual = getattr(Tensor.__torch_function__, "__func__", None)
    ours = kind.__module__.startswith("torchvision.") or (
        getattr(kind.__torch_function__, "__func__", None) is usual
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )
    fix = (
        "If its data are the values, pass x.as_subclass(torch.Tensor); a DTensor's part on this "
        "rank is x.to_local()"
    )
    expect(ours, name, "a plain tensor", f"a {kind.__name__}", fix, TypeError)


def _check_table(
    name: str,
    table: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    wanted: str,
    device: torch.device,
) -> None:
    expect = _EXPECT
    expect.tensor(name, table)
    check_plain(_EXPECT, name, table)
    _check_constant(name, table)
    if table.dtype != dtype:
        fix = f"Convert it with .to({dtype})"
        raise expect.error(name, f"a {dtype} tensor", table.dtype, fix, TypeError)
    if tuple(table.shape) != shape:
        expected = f"of shape {wanted} with N = {shape[0]} images"
        raise expect.error(name, expected, shape_of(table))
    if table.device.type not in ("cpu", device.type):
        raise expect.error(name, f"on the CPU or on {device}", table.device)


def _check_size(size: Sequence[int]) -> tuple[int, int]:
    whole = isinstance(size, Sequence) and not any(isinstance(s, (float, str)) for s in size)
    _EXPECT(whole, "size", "two whole numbers (height, width)", repr(size), cls=TypeError)
    fits = len(size) == 2 and all(side >= 0 for side in size)
    _EXPECT(fits, "size", "(height, width), neither negative", tuple(size))
    return size[0], size[1]


def _numbers(name: str, numbers: Numbers, dtype: torch.dtype) -> Tensor:
    if isinstance(numbers, Tensor):
        check_plain(_EXPECT, name, numbers)
        _EXPECT.dtype(name, numbers, OUT_DTYPES, "real")
        _check_constant(name, numbers)
        return numbers.to(dtype)
    return torch.as_tensor(numbers, dtype=dtype, device="cpu")


def _is_finite(numbers: Numbers) -> bool:
    """As far as can be seen: not of tensors in a compiled function, or on a GPU without waiting."""
    if not isinstance(numbers, Tensor):
        return all(map(math.isfinite, numbers if isinstance(numbers, Sequence) else [numbers]))
    return not _is_readable(numbers) or bool(numbers.isfinite().all())


def _is_readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def _fill(fill: Numbers, n: int, channels: int | None, dtype: torch.dtype) -> Tensor:
    """[N, C] or [1, C]; without images (``channels`` None) it says how many channels there are."""
    table = _numbers("fill", fill, dtype)
    if table.dim() == 0:
        table = table.expand(1, 1 if channels is None else channels)
    elif table.dim() == 1:
        table = table.view(1, -1)
    rows = table.dim() == 2 and table.shape[0] in (1, n)
    if not rows or channels not in (None, table.shape[1]):
        expected = f"a number, {channels} numbers or a tensor [N, C] = [{n}, {channels}]"
        raise _EXPECT.error("fill", expected, shape_of(table))
    return table


def _per_channel(
    name: str, numbers: Numbers | None, channels: int, dtype: torch.dtype
) -> Tensor | None:
    if numbers is None:
        return None
    row = _numbers(name, numbers, dtype)
    if row.dim() != 0 and tuple(row.shape) not in ((1,), (channels,)):
        expected = f"a number or {channels} numbers, one a channel"
        raise _EXPECT.error(name, expected, shape_of(row))
    if name == "std" and (not isinstance(numbers, Tensor) or _is_readable(numbers)):
        _EXPECT(bool((row != 0).all()), "std", "without a zero", numbers)
    return row.expand(channels)
