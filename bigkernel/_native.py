"""The native library: found, loaded, and what it says of itself.

``libbigkernel_ops.so`` lies beside this file. It adds kernels to the ops of ``_library.py``, and
has ops of its own in ``torch.ops.bigkernel_native``. Nothing in it was compiled against a Python.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch

PATH = Path(__file__).with_name("libbigkernel_ops.so")
ops = torch.ops.bigkernel_native


class BuildInfo(NamedTuple):
    """What was compiled: the CUDA toolkit's version if any, the GPU architectures, by what."""

    cuda: str | None
    cuda_archs: str
    compiler: str
    sanitizer: bool


class Native:
    """The library once it is loaded."""

    path = PATH

    def build_info(self) -> BuildInfo:
        cuda, *rest = ops.build_info()
        return BuildInfo(cuda or None, *rest)

    def cpu_isa(self) -> str:
        """Instruction set that the CPU kernels use now."""
        return str(ops.cpu_isa())

    def cpu_isas(self) -> list[str]:
        """Instruction sets that this machine can run, the last the most."""
        return list(ops.cpu_isas())

    def set_cpu_isa(self, name: str) -> None:
        """Use this instruction set from now on; ValueError where it does not exist."""
        try:
            ops.set_cpu_isa(name)
        except RuntimeError as error:
            raise ValueError(str(error)) from None


def load() -> tuple[Native | None, str | None]:
    """The library, or why there is none.

    Raises:
        ValueError: BIGKERNEL_CPU_ISA names no instruction set of this CPU.
    """
    if os.environ.get("BIGKERNEL_NATIVE") == "0":
        return None, "BIGKERNEL_NATIVE=0"
    if not PATH.exists():
        return None, "the native library was not built (pip install without BIGKERNEL_NATIVE=0)"
    try:
        torch.ops.load_library(PATH)
    except OSError as error:
        return None, f"the native library did not load: {error}"
    native = Native()
    if name := os.environ.get("BIGKERNEL_CPU_ISA"):
        native.set_cpu_isa(name)
    return native, None
