"""How fast this machine multiplies, and whether computing in 16 bits pays."""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor, nn

# Below these the conversions to and from bfloat16 take what the products gain. (A step of four
# LLaMA layers, 4 x 256 tokens on two Zen 4 cores, takes as long in both at widths of 64 and 96, and
# 0.7 of it at 128.)
_WORTH_IT = 1.5
_WIDTH = 128
_HAS = 0.75  # see `multiplies`
# Sides of the matrices whose product is the rate: large enough for all of a device's cores.
_SIDE = {"cpu": 1024, "cuda": 8192}
_PATIENCE = 0.4  # seconds, of a processor to which that is much


def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


# Of torch 2.11's own, torch.compile makes no graph. The decorator for this imports torch._dynamo.
setattr(_has_autocast, "_dynamo_marked_constant", True)  # noqa: B010 - mypy knows no such name


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What torch.autocast computes in on a kind of device, or None where it is off."""
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


@functools.cache
def speedup(device: torch.device, dtype: torch.dtype) -> float:
    """How many times as fast as float32 `device` multiplies `dtype`, bfloat16 or float16.

    CPU: measured once a process, in some milliseconds, on PyTorch's own products (256 x 512 x 512).
    CUDA: infinity where the GPU has such products. Other devices: 0.
    """
    if device.type == "cuda":
        if dtype == torch.float16:
            return float("inf")
        with torch.cuda.device(device):
            has = torch.cuda.is_bf16_supported(including_emulation=False)
        return float("inf") if has else 0.0
    if device.type != "cpu":
        return 0.0
    a = torch.full((256, 512), 0.5, dtype=torch.float32, device="cpu")
    b = torch.full((512, 512), 0.5, dtype=torch.float32, device="cpu")
    wide, narrow = (a, b), (a.to(dtype), b.to(dtype))
    least = {torch.float32: float("inf"), dtype: float("inf")}
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        for _ in range(8):
            for x, y in (wide, narrow):
                least[x.dtype] = min(least[x.dtype], _seconds(device, x, y))
            # Without such products in the processor one takes a hundred times as long.
            if least[dtype] > 20 * least[torch.float32]:
                break
    return least[torch.float32] / least[dtype]


def fastest(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where it is one of 16 bits and `device` multiplies float32 faster.

    Without AVX-512 PyTorch has no product of 16-bit matrices but a loop, a hundredth as fast.
    """
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow and speedup(device, dtype) < 1 else dtype


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of PyTorch's product of two large matrices of `dtype`, or of what is `fastest`.

    The fastest of some, measured once a process in about a tenth of a second; None where the device
    has no room for them.
    """
    dtype = fastest(device, dtype)
    side = _SIDE.get(device.type, _SIDE["cuda"])
    least, spent = float("inf"), 0.0
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        try:
            a, b = (torch.full((side, side), 0.5, dtype=dtype, device=device) for _ in range(2))
            for _ in range(4):  # the first warms up
                took = _seconds(device, a, b)
                least, spent = min(least, took), spent + took
                if spent > _PATIENCE:
                    break
        except torch.OutOfMemoryError:
            return None
    return 2.0 * side**3 / least


def _seconds(device: torch.device, a: Tensor, b: Tensor) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    a @ b
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def bf16_is_faster(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 clearly faster than float32: 1.5 times."""
    return speedup(device, torch.bfloat16) >= _WORTH_IT


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `device` has products in bfloat16 or float16: three quarters as fast as float32.

    Processors have none of float16, with few exceptions, nor of bfloat16 before AVX-512 BF16: torch
    has a loop for them, a fiftieth as fast, or, for bfloat16 under AVX-512, widens what it
    multiplies, 0.4 times as fast. Those that have them multiply twice as fast or faster. The bound
    lies between, so that no two runs on a machine differ. GPUs have none of bfloat16 before sm_80.
    Devices of other kinds are taken to have them.
    """
    return device.type not in ("cpu", "cuda") or speedup(device, dtype) >= _HAS


# The compiler takes its answer for a constant, and does not follow how it is measured.
multiplies._dynamo_marked_constant = True  # type: ignore[attr-defined]


def bf16_pays(model: nn.Module, device: torch.device) -> bool:
    """Whether training steps of `model` are faster in bfloat16 on `device`.

    They are where the device multiplies it 1.5 times as fast as float32, all floating-point
    parameters are float32, and more than half of them stand in matrices of at least 128 x 128.
    """
    floats = [p for p in model.parameters() if p.is_floating_point()]
    matrices = sum(
        p.numel() for p in floats if p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= _WIDTH
    )
    return (
        all(p.dtype == torch.float32 for p in floats)
        and 2 * matrices > sum(p.numel() for p in floats)
        and bf16_is_faster(device)
    )
