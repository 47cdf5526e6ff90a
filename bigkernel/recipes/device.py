"""Which device, dtype and number of threads a run takes."""

import os

import torch

from bigkernel.recipes.errors import UsageError, option


def use_threads(threads: int | None) -> None:
    """Set how many CPU threads torch and the native kernels take; None leaves it."""
    if threads is not None:
        if threads < 1:
            raise UsageError(f"{option('threads')} must be 1 or more, got {threads}.")
        torch.set_num_threads(threads)


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU, else the CPU. UsageError for what this machine does not have."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            f"{option('device')} must be auto, cpu, cuda or cuda:N, got {name!r}."
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{option('device')} must be auto, cpu, cuda or cuda:N, got {name!r}.")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        build = "torch is a CPU-only build" if torch.version.cuda is None else "torch sees no GPU"
        raise UsageError(f"{option('device', name)}: {build}. Use {option('device', 'cpu')}.")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise UsageError(
            f"{option('device', name)}: this machine has {torch.cuda.device_count()} GPU(s)."
        )
    return torch.device("cuda", index)


def show_only(device: torch.device) -> torch.device:
    """Hide the other GPUs, which the Trainer would otherwise spread a batch over.

    Before CUDA starts up in this process, and not under a launcher, which hands out the GPUs.
    """
    if device.type != "cuda" or "LOCAL_RANK" in os.environ or torch.cuda.is_initialized():
        return device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[device.index or 0]
    return torch.device("cuda", 0)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """What to compute in. ``auto``: bfloat16 on a GPU that has it, else float32.

    On the CPU float32 unless asked: bfloat16 pays only with AVX-512-BF16 or AMX and large layers.
    """
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    if dtype == torch.float16 and device.type == "cpu":
        raise UsageError(
            f"{option('dtype', name)} needs a GPU. On the CPU use float32 or bfloat16."
        )
    return dtype
