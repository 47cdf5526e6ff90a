"""The native library: found, loaded, what it says of itself, and whether this machine suits it.

``libbigkernel_ops.so`` lies beside this file. It adds kernels to the ops of ``_library.py``, and
has ops of its own in ``torch.ops.bigkernel_native``. Nothing in it was compiled against a Python.

It is told the name of this package, and registers everything under that: as a kernel of Hugging
Face's hub (``bigkernel.hub``) the package has another name than its own, and its own ops.

Where it does not fit this torch, this driver or these GPUs, one sentence says so when the package
is imported, and PyTorch's own code runs instead.
"""

import ctypes
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bigkernel.errors import FallbackWarning, level_of_caller

PATH = Path(__file__).with_name("libbigkernel_ops.so")
OLDEST_TORCH = (2, 11)
NAMESPACE = __name__.partition(".")[0]
ops = getattr(torch.ops, f"{NAMESPACE}_native")
# Reasons that were told when the package was imported: no call says them again.
told: set[str] = set()


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


def _tell(reason: str, what: str) -> None:
    told.add(reason)
    message = f"bigkernel: {reason}; {what} in plain PyTorch."
    warnings.warn(message, FallbackWarning, stacklevel=level_of_caller())


def load() -> tuple[Native | None, str | None]:
    """The library, or why there is none.

    Raises:
        ValueError: BIGKERNEL_CPU_ISA names no instruction set of this CPU.
    """
    if os.environ.get("BIGKERNEL_NATIVE") == "0":
        return None, "BIGKERNEL_NATIVE=0"
    reason = why_not_loaded(PATH, str(torch.__version__))
    if reason is not None:
        _tell(reason, "every op runs")
        return None, reason
    native = Native()
    if name := os.environ.get("BIGKERNEL_CPU_ISA"):
        native.set_cpu_isa(name)
    return native, None


def why_not_loaded(path: Path, version: str) -> str | None:
    """Load the library for a version of torch; returns why that cannot be done."""
    if not path.exists():
        note = path.with_name("build_info.json")  # setup.py writes it into what it packs
        if note.exists() and not json.loads(note.read_text())["native"]:
            return "this is the pure-Python package, which has no native library"
        return "the native library was not built (pip install without BIGKERNEL_NATIVE=0)"
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"the native library needs torch {oldest} or later, and this is torch {version}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the native library did not load: {error}"
    if not hasattr(library, "bigkernel_register"):
        return "the native library is older than this package; `make build` builds it anew"
    library.bigkernel_register.restype = ctypes.c_char_p
    wrong = library.bigkernel_register(NAMESPACE.encode())
    return None if wrong is None else f"the native library did not load: {wrong.decode()}"


def runs_on(archs: str, capability: int) -> bool:
    """Whether a GPU, of capability 86 say, has code in a build's ``cuda_archs``.

    Machine code runs on the later GPUs of its generation, PTX on all later GPUs.
    """
    for ptx, number in re.findall(r"(PTX for )?sm_(\d+)\b", archs):
        arch = int(number)
        if arch <= capability and (ptx or arch // 10 == capability // 10):
            return True
    return False


def why_no_cuda(info: BuildInfo, driver: int, capabilities: Sequence[int]) -> str | None:
    """Why the CUDA kernels of a build cannot run on this machine; None if one of its GPUs can.

    ``driver`` is the newest CUDA that the driver knows (13000 for 13.0), 0 without a driver:
    where there is no driver there is no GPU to say anything about.
    """
    if info.cuda is None or not driver:
        return None
    if driver // 1000 < int(info.cuda.split(".")[0]):
        return (
            f"the CUDA kernels need a driver for CUDA {info.cuda}, and this one is for CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}"
        )
    if capabilities and not any(runs_on(info.cuda_archs, each) for each in capabilities):
        return no_code_for(info, capabilities)
    return None


def no_code_for(info: BuildInfo, capabilities: Sequence[int]) -> str:
    """The sentence about GPUs that a build has nothing for."""
    names = ", ".join(f"sm_{each}" for each in sorted(set(capabilities)))
    return f"there is no CUDA kernel for {names}, only for {info.cuda_archs}"


def capabilities(library: str = "libnvidia-ml.so.1") -> list[int]:
    """Compute capabilities (10 * major + minor) of all GPUs of this machine; none if not known.

    The driver's own library of figures is asked, which starts no GPU: a process that has started
    one cannot be forked.
    """
    try:
        nvml = ctypes.CDLL(library)
        if nvml.nvmlInit_v2() != 0:
            return []
    except (OSError, AttributeError):
        return []
    found = []
    count, gpu, major, minor = ctypes.c_uint(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        if (
            nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(gpu)) == 0
            and nvml.nvmlDeviceGetCudaComputeCapability(
                gpu, ctypes.byref(major), ctypes.byref(minor)
            )
            == 0
        ):
            found.append(10 * major.value + minor.value)
    nvml.nvmlShutdown()
    return found


def check_cuda(native: Native) -> tuple[str | None, bool]:
    """Why no CUDA kernel can run here although torch might use a GPU; said once if so.

    Also whether a call has to ask which GPU it is on: where one of them has no kernels, or no
    library tells what they are.
    """
    info = native.build_info()
    if info.cuda is None or torch.version.cuda is None:
        return None, False
    driver = int(ops.cuda_driver())
    there = capabilities() if driver else []
    reason = why_no_cuda(info, driver, there)
    if reason is not None:
        _tell(reason, "ops on a GPU run")
        return reason, False
    suited = there and all(runs_on(info.cuda_archs, each) for each in there)
    return None, bool(driver) and not suited
