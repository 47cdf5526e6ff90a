"""Global memory: host arrays at addresses of their own, every access checked; local memory.

Address windows (PTX ISA, "State Spaces", "Generic Addressing"): registered arrays, parameters and
module variables from GLOBAL_BASE, each thread's local memory at LOCAL_BASE, the block's shared
memory at SHARED_BASE.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from bigkernel.testing.ptx.errors import Finding, OutOfBounds
from bigkernel.testing.ptx.lanes import Lanes
from bigkernel.testing.ptx.types import BITS, Array

if TYPE_CHECKING:
    from bigkernel.testing.ptx.machine import Machine

LOCAL_BASE, SHARED_BASE, PARAM_BASE, GLOBAL_BASE = 1 << 40, 1 << 41, 3 << 40, 1 << 44
WINDOW = 1 << 32
_GUARD = 1 << 20  # bytes between arrays that belong to none


class Region:
    """One array: host bytes seen by the kernel at ``address``."""

    def __init__(self, name: str, what: str, address: int, data: Array, readonly: bool) -> None:
        self.name, self.what, self.address, self.data = name, what, address, data
        self.readonly = readonly
        self.end = address + len(data)

    def touch(self, m: Machine, kind: str, lanes: Lanes, k: int, at: Array,
              size: int) -> Callable[[int], Finding] | None:  # fmt: skip
        """Check, note and count a "load", "store" or "atomic" of ``size`` bytes.

        Where lanes of one store may disagree about a place, gives the finding for one of them.
        """
        if kind != "load" and self.readonly:
            what = f"writes '{self.name}' ({self.what}), which is read-only"
            raise m.fail(OutOfBounds, lanes.index[0], k, what)
        if kind == "atomic":
            m.counters.global_atomics += lanes.n
        elif self.address >= GLOBAL_BASE:
            table = m.counters.loads if kind == "load" else m.counters.stores
            m.counters.count_global(table, self.name, lanes, at, size)
        return None

    def place(self, address: int) -> str:
        """Words for an address here."""
        return f"address {address:#x}"

    def words(self, lanes: Lanes, at: Array, size: int) -> tuple[Array, Array]:
        """The memory in words of ``size`` bytes, and which of them are at these addresses."""
        lead = -self.address % size
        data = self.data[lead:]
        data = data[: len(data) // size * size]
        return data.view(BITS[size]), (at - (self.address + lead)) // size


class Local(Region):
    """Each lane's local memory."""

    def __init__(self, lanes: int, size: int) -> None:
        self.size, self.stride = size, -(-size // 16) * 16
        super().__init__("", "", LOCAL_BASE, np.zeros(lanes * self.stride, np.uint8), False)
        self.end = LOCAL_BASE + WINDOW

    def touch(self, m: Machine, kind: str, lanes: Lanes, k: int, at: Array, size: int) -> None:
        bad = at + size > LOCAL_BASE + self.size
        if bad.any():
            what = f"{size} bytes at {self.place(at[bad][0])}, of {self.size} bytes"
            raise m.fail(OutOfBounds, lanes.index[bad][0], k, what)

    def place(self, address: int) -> str:
        return f"local address {address - LOCAL_BASE}"

    def words(self, lanes: Lanes, at: Array, size: int) -> tuple[Array, Array]:
        return self.data.view(BITS[size]), (lanes.index * self.stride + at - LOCAL_BASE) // size


class Memory:
    """The arrays that kernels may touch."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._kept: list[Any] = []  # the arrays themselves
        self._next = GLOBAL_BASE
        self.variables: dict[int, tuple[Any, dict[str, int]]] = {}  # of modules, by program

    def register(self, array: Any, name: str | None = None, readonly: bool = False) -> int:
        """Give a numpy array or CPU torch tensor to kernels; returns its device address.

        The kernel reads and writes the array's own memory. A view that is not contiguous is
        accessible from its first to its last element. The address is as aligned as the view is
        within its base array. Writing where ``readonly`` raises OutOfBounds.
        """
        data, offset, what = _bytes_of(array)
        address = self._next + offset % 256
        label = name or f"array{len(self.regions)}"
        self.regions.append(Region(label, what, address, data, readonly))
        self._kept.append(array)
        self._next = -(-(address + len(data) + _GUARD) // 256) * 256
        return address

    def describe(self, address: int) -> str:
        """Words for an address that lies in no array."""
        before = [region for region in self.regions if region.address <= address]
        region = before[-1] if before else None
        if region is None or address >= region.end + _GUARD:
            return f"address {address:#x} is in no registered array"
        past = address - region.end
        place = f"{past} bytes past the end" if past >= 0 else f"{-past} bytes before the end"
        return f"address {address:#x} is {place} of '{region.name}' ({region.what})"


def _bytes_of(array: Any) -> tuple[Array, int, str]:
    """Bytes from the first to the last element, their offset in the base, and a description."""
    shape = list(getattr(array, "shape", ()))
    what = f"{str(getattr(array, 'dtype', '')).removeprefix('torch.')} {shape}"
    if isinstance(array, np.ndarray):
        if not array.flags.writeable:
            raise ValueError(f"Memory.register: array ({what}) must be writeable; pass a copy")
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        start, size, strides = array.ctypes.data, array.itemsize, [*array.strides]
        offset = start - base.ctypes.data
    else:
        import torch

        if not isinstance(array, torch.Tensor) or array.device.type != "cpu":
            raise TypeError(
                f"Memory.register: expected a numpy array or CPU tensor, got {type(array).__name__}"
            )
        start, size = array.data_ptr(), array.element_size()
        strides = [stride * size for stride in array.stride()]
        offset = int(array.storage_offset()) * size
    if 0 in shape:
        return np.zeros(0, np.uint8), 0, what
    if min(strides, default=0) < 0:
        raise ValueError(f"Memory.register: array ({what}) must not have negative strides")
    span = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + size
    return np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(start)), offset, what
