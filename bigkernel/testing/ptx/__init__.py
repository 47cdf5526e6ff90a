"""Runs compiled CUDA kernels (PTX) on the CPU, checks and counts what they do. See README.md."""

from bigkernel.testing.ptx.compiler import nvcc
from bigkernel.testing.ptx.counters import Counters, Traffic
from bigkernel.testing.ptx.errors import (
    BarrierError,
    Finding,
    Misaligned,
    MissingWait,
    NoProgress,
    OutOfBounds,
    PtxError,
    SharedRace,
    Trap,
    UninitializedRead,
    UnknownInstruction,
)
from bigkernel.testing.ptx.host import DEVICES, Device, HostLibrary, Launch
from bigkernel.testing.ptx.launch import Kernel, Module, compile, load
from bigkernel.testing.ptx.memory import Memory
from bigkernel.testing.ptx.structures import Structures

__all__ = [
    "DEVICES",
    "BarrierError",
    "Counters",
    "Device",
    "Finding",
    "HostLibrary",
    "Kernel",
    "Launch",
    "Memory",
    "Misaligned",
    "MissingWait",
    "Module",
    "NoProgress",
    "OutOfBounds",
    "PtxError",
    "SharedRace",
    "Structures",
    "Traffic",
    "Trap",
    "UninitializedRead",
    "UnknownInstruction",
    "compile",
    "load",
    "nvcc",
]
