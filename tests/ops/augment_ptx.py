"""The CUDA kernels of augment without a GPU: an op whose kernels run in bigkernel.testing.ptx.

``emulated()`` sends the native calls of ``bigkernel.ops.augment`` to the launcher in csrc/augment,
compiled against the emulator, with the arguments that csrc/augment/cuda.cpp would hand to it.
``on_gpu()`` sends them to a GPU and back.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bigkernel import backend
from bigkernel.ops.augment.op import OUT_DTYPES, augment
from bigkernel.testing import ptx

ROOT = Path(__file__).resolve().parents[2]
P, I32, I64, F32, BOOL = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_bool,
)
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}  # DType


class Image(ctypes.Structure):  # AugmentImage
    _fields_ = (
        *(("data", P), ("height", I64), ("width", I64)),
        *(("stride_c", I64), ("stride_y", I64), ("stride_x", I64), ("readable", I64)),
    )


class Args(ctypes.Structure):  # AugmentArgs
    _fields_ = (
        *(("in_type", I32), ("out_type", I32), ("channels", I64), ("out_h", I64), ("out_w", I64)),
        *(("nearest", BOOL), ("channels_last_out", BOOL), ("bound", F32)),
        *(("gain", P), ("offset", P), ("out", P)),
    )


class Input(ctypes.Structure):  # AugmentInput
    _fields_ = (
        *(("args", Args), ("images", P), ("geometry", P), ("color", P), ("fill", P)),
        *(("n", I64), ("k", I64), ("fill_rows", I64), ("antialias", BOOL)),
    )


@functools.cache
def host() -> ptx.HostLibrary:
    sources = [ROOT / "csrc/augment/augment.cu", ROOT / "tests/ops/augment_shim.cpp"]
    host = ptx.HostLibrary(
        sources, flags=["-std=c++20", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc")]
    )
    host.library.augment_plan.restype = ctypes.c_char_p
    host.library.augment_run.restype = ctypes.c_char_p
    assert host.library.augment_input_size() == ctypes.sizeof(Input), "AugmentInput changed"
    assert host.library.augment_image_size() == ctypes.sizeof(Image), "AugmentImage changed"
    return host


launches: list[ptx.Launch] = []  # of the last call


class Call:
    """The arguments of one call, and the memory that its tensors are registered in."""

    def __init__(
        self,
        images: list[Tensor],
        geometry: Tensor,
        color: Tensor,
        fill: Tensor,
        mean: Tensor | None,
        std: Tensor | None,
        out_h: int,
        out_w: int,
        channels_last_in: bool,
        channels_last_out: bool,
        interpolation: int,
        antialias: bool,
        in_scale: float,
        out_dtype: int,
    ) -> None:
        self.memory = ptx.Memory()
        n, channels = geometry.shape[0], fill.shape[1]
        dtype = images[0].dtype if images else torch.uint8
        ones, zeros = torch.ones(channels), torch.zeros(channels)
        std, mean = (ones if std is None else std).double(), (zeros if mean is None else mean)
        host_tables = [geometry, color, fill, (in_scale / std).float(), (-mean / std).float()]
        self.kept = [t.contiguous() for t in host_tables]
        geometry, color, fill, gain, offset = (t.data_ptr() for t in self.kept)
        shape = (out_h, out_w, channels) if channels_last_out else (channels, out_h, out_w)
        # Whatever is not written shows: as NaN, or as bytes that differ from what is wanted.
        self.out = torch.empty((n, *shape), dtype=OUT_DTYPES[out_dtype])
        self.out.view(torch.uint8).fill_(255)
        # Each row of a batch is an image; "images" is one array all the same.
        batched = len(images) == 1 and images[0].dim() == 4
        if batched:
            start, step = self.at(images[0], "images"), images[0].stride(0)
            views = [
                (image, start + i * step * image.element_size())
                for i, image in enumerate(images[0])
            ]
        else:
            views = [(image, self.at(image, f"images[{i}]")) for i, image in enumerate(images)]
        self.images = (Image * len(views))()
        for image, (view, data) in zip(self.images, views, strict=True):
            planes = view.movedim(-1, 0) if channels_last_in else view
            image.data, image.height, image.width = data, *planes.shape[1:]
            image.stride_c, image.stride_y, image.stride_x = planes.stride()
        args = Args(
            *(TYPE_CODES[dtype], TYPE_CODES[self.out.dtype], channels, out_h, out_w),
            *(interpolation == 0, channels_last_out, 255.0 if dtype == torch.uint8 else 1.0),
            *(gain, offset, self.at(self.out, "out")),
        )
        self.input = Input(
            *(args, ctypes.cast(self.images, P), geometry, color, fill),
            *(n, self.kept[1].shape[1], self.kept[2].shape[0], antialias),
        )

    def at(self, x: Any, name: str) -> int:
        return self.memory.register(x, name)

    def plan(self) -> tuple[int, int, int, int]:
        """Bytes of the tables and of the scratch memory, launches, blocks an image."""
        sizes = (I64 * 4)()
        error = host().library.augment_plan(ctypes.byref(self.input), sizes)
        if error:
            raise RuntimeError(error.decode())
        return tuple(sizes)  # type: ignore[return-value]

    def run(self) -> Tensor:
        table_bytes, scratch_bytes, *_ = self.plan()
        tables, scratch = np.zeros(table_bytes, np.uint8), np.full(scratch_bytes, 255, np.uint8)
        device_tables, device_scratch = self.at(tables, "tables"), self.at(scratch, "scratch")
        with host().running(self.memory) as made:
            error = host().library.augment_run(
                *(ctypes.byref(self.input), P(tables.ctypes.data), P(device_tables)),
                P(device_scratch),
            )
        launches[:] = made
        if error:
            raise RuntimeError(error.decode())
        return self.out


class _Emulator:
    @staticmethod
    def augment(*arguments: Any) -> Tensor:
        return Call(*arguments).run()


class _Gpu:
    @staticmethod
    def augment(images: list[Tensor], *rest: Any) -> Tensor:
        return torch.ops.bigkernel.augment([image.cuda() for image in images], *rest).cpu()


@contextmanager
def _instead(namespace: Any) -> Iterator[None]:
    """Within, every call that a native kernel takes goes to ``namespace``."""
    original = augment.__globals__["select"]

    def select(name: str, device: torch.device, reason: str | None = None) -> Any:
        if backend._forced == "torch":
            return original(name, device, reason)
        assert reason is None, reason
        return namespace

    with mock.patch.dict(augment.__globals__, {"select": select}):
        yield


def emulated() -> Any:
    return _instead(_Emulator)


def on_gpu() -> Any:
    return _instead(_Gpu)
