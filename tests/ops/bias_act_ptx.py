"""The CUDA kernels of bias_act without a GPU: its launcher, compiled against the emulator."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from bigkernel.testing import ptx

ROOT = Path(__file__).resolve().parents[2]
layout = ptx.Structures(ROOT / "csrc", "bias_act/cuda.h")
TYPE_CODES = {
    torch.float32: layout.DType.kFloat32,
    torch.bfloat16: layout.DType.kBFloat16,
    torch.float16: layout.DType.kFloat16,
}
launches: list[ptx.Launch] = []  # of the last call


@functools.cache
def host() -> ptx.HostLibrary:
    """The launcher, compiled against the emulator."""
    sources = [ROOT / "csrc/bias_act/sm80_bias_act.cu", ROOT / "tests/ops/bias_act_shim.cpp"]
    flags = ["-std=c++20", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc")]
    host = ptx.HostLibrary(sources, flags=flags)
    host.library.bias_act_count_chunks.restype = ctypes.c_int64
    host.library.bias_act_run.restype = ctypes.c_char_p
    return host


def run(
    x: Tensor,
    bias: Tensor | None,
    activation: int,
    dy: Tensor | None = None,
    needs_dbias: bool = False,
    device: str = "A100",
) -> tuple[Tensor, Tensor]:
    """(y, or the gradient of x; that of bias) of contiguous rows [N, D]."""
    memory, (rows, dim) = ptx.Memory(), x.shape
    # Whatever is not written shows as NaN.
    y, dbias = torch.full_like(x, torch.nan), torch.full((dim,), torch.nan)
    chunks = host().library.bias_act_count_chunks(ctypes.c_int64(rows))
    partials = torch.full((chunks, dim), torch.nan)
    call = layout.BiasActCudaArgs(
        args=layout.BiasActArgs(
            x=memory.register(x, "x"),
            dy=None if dy is None else memory.register(dy, "dy"),
            bias=None if bias is None else memory.register(bias, "bias"),
            y=memory.register(y, "y"),
            dim=dim,
            x_stride=dim,
            dy_stride=dim,
            type=TYPE_CODES[x.dtype],
            activation=activation,
        ),
        rows=rows,
        partials=memory.register(partials, "partials") if needs_dbias else None,
        dbias=memory.register(dbias, "dbias") if needs_dbias else None,
    )
    with host().running(memory) as made:
        error = host().library.bias_act_run(ctypes.byref(call), [*ptx.DEVICES].index(device))
    launches[:] = made
    if error:
        raise RuntimeError(error.decode())
    return y, dbias
