"""Whether computing in bfloat16 pays: how fast this machine multiplies it beside float32."""

from __future__ import annotations

import functools
import time

import torch
from torch import nn

# Below these the conversions to and from bfloat16 take what the products gain.
_WORTH_IT = 1.5
_WIDTH = 256


@functools.cache
def bf16_speedup(device: torch.device) -> float:
    """How many times as fast as float32 `device` multiplies bfloat16.

    CPU: measured once a process, in some milliseconds, on PyTorch's own products (256 x 512 x 512).
    CUDA: infinity where the GPU has bfloat16 products. Other devices: 0.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            has = torch.cuda.is_bf16_supported(including_emulation=False)
        return float("inf") if has else 0.0
    if device.type != "cpu":
        return 0.0
    a = torch.full((256, 512), 0.5, dtype=torch.float32, device="cpu")
    b = torch.full((512, 512), 0.5, dtype=torch.float32, device="cpu")
    wide, narrow = (a, b), (a.bfloat16(), b.bfloat16())
    fastest = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    with torch.inference_mode():
        for _ in range(8):
            for x, y in (wide, narrow):
                began = time.perf_counter()
                x @ y
                fastest[x.dtype] = min(fastest[x.dtype], time.perf_counter() - began)
            # Without such products in the processor one takes a hundred times as long.
            if fastest[torch.bfloat16] > 20 * fastest[torch.float32]:
                break
    return fastest[torch.float32] / fastest[torch.bfloat16]


def bf16_is_faster(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 clearly faster than float32: 1.5 times."""
    return bf16_speedup(device) >= _WORTH_IT


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products in bfloat16 are usable on `device`: a quarter as fast as float32 or more.

    Processors without AVX-512 have a loop for them, a hundredth as fast, and GPUs before sm_80
    none. The bound lies far from either kind, so that no two runs on a machine differ. Devices
    of other kinds are taken to have them.
    """
    return device.type not in ("cpu", "cuda") or bf16_speedup(device) >= 0.25


def bf16_pays(model: nn.Module, device: torch.device) -> bool:
    """Whether training steps of `model` are faster in bfloat16 on `device`.

    They are where the device multiplies it 1.5 times as fast as float32, all floating-point
    parameters are float32, and more than half of them stand in matrices of at least 256 x 256.
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
