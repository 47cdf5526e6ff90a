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
from bigkernel.ops.augment.reference import Arguments
from bigkernel.testing import ptx

ROOT = Path(__file__).resolve().parents[2]
P, I64 = ctypes.c_void_p, ctypes.c_int64
layout = ptx.Structures(ROOT / "csrc", "augment/cuda_plan.h")
TYPE_CODES = {
    torch.float32: layout.DType.kFloat32,
    torch.bfloat16: layout.DType.kBFloat16,
    torch.float16: layout.DType.kFloat16,
    torch.uint8: layout.DType.kUInt8,
}


@functools.cache
def host() -> ptx.HostLibrary:
    sources = [ROOT / "csrc/augment/sm80_augment.cu", ROOT / "tests/ops/augment_shim.cpp"]
    host = ptx.HostLibrary(
        sources, flags=["-std=c++20", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc")]
    )
    host.library.augment_plan.restype = ctypes.c_char_p
    host.library.augment_run.restype = ctypes.c_char_p
    return host


launches: list[ptx.Launch] = []  # of the last call


class Call:
    """The arguments of one call, and the memory that its tensors are registered in."""

    def __init__(self, *given: Any) -> None:
        call = Arguments(*given)
        images, geometry, color, fill = call.images, call.geometry, call.color, call.fill
        out_h, out_w = call.out_h, call.out_w
        self.memory = ptx.Memory()
        n, channels = geometry.shape[0], fill.shape[1]
        dtype = images[0].dtype if images else torch.uint8
        ones, zeros = torch.ones(channels), torch.zeros(channels)
        std = (ones if call.std is None else call.std).double()
        mean = zeros if call.mean is None else call.mean
        gain, offset = (call.in_scale / std).float(), (-mean / std).float()
        self.kept = [t.contiguous() for t in (geometry, color, fill, gain, offset)]
        tables = [t.data_ptr() for t in self.kept]
        shape = (out_h, out_w, channels) if call.channels_last_out else (channels, out_h, out_w)
        # Whatever is not written shows: as NaN, or as bytes that differ from what is wanted.
        self.out = torch.empty((n, *shape), dtype=OUT_DTYPES[call.out_dtype])
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
        self.images = (layout.AugmentImage * len(views))()
        for image, (view, data) in zip(self.images, views, strict=True):
            planes = view.movedim(-1, 0) if call.channels_last_in else view
            image.data, image.height, image.width = data, *planes.shape[1:]
            image.stride_c, image.stride_y, image.stride_x = planes.stride()
        self.input = layout.AugmentInput(
            args=layout.AugmentArgs(
                in_type=TYPE_CODES[dtype],
                out_type=TYPE_CODES[self.out.dtype],
                channels=channels,
                out_h=out_h,
                out_w=out_w,
                nearest=call.interpolation == 0,
                channels_last_out=call.channels_last_out,
                bound=255.0 if dtype == torch.uint8 else 1.0,
                gain=tables[3],
                offset=tables[4],
                out=self.at(self.out, "out"),
            ),
            images=ctypes.cast(self.images, P),
            geometry=tables[0],
            color=tables[1],
            fill=tables[2],
            n=n,
            k=color.shape[1],
            fill_rows=fill.shape[0],
            antialias=call.antialias,
        )

    def at(self, x: Any, name: str) -> int:
        return self.memory.register(x, name)

    def plan(self, device: ptx.Device = ptx.DEVICES["A100"]) -> tuple[int, int, int, int]:
        """Bytes of the tables and of the scratch memory, launches, blocks an image."""
        sizes = (I64 * 4)()
        traits = layout.DeviceTraits(*device)
        error = host().library.augment_plan(ctypes.byref(self.input), ctypes.byref(traits), sizes)
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
    name = "emulator"

    @staticmethod
    def augment(*arguments: Any) -> Tensor:
        return Call(*arguments).run()


class _Gpu:
    name = "gpu"

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
