"""Global memory: host arrays at addresses of their own, every access checked; local memory.

Address windows (PTX ISA, "State Spaces", "Generic Addressing"): registered arrays, parameters and
module variables from GLOBAL_BASE, each thread's local memory at LOCAL_BASE, the block's shared
memory at SHARED_BASE.
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np

from bigkernel.testing.ptx.types import BITS, Array

LOCAL_BASE, SHARED_BASE, GLOBAL_BASE = 1 << 40, 1 << 41, 1 << 44
WINDOW = 1 << 32
_GUARD = 1 << 20  # bytes between arrays that belong to none


class Region:
    """One array: ``nbytes`` host bytes seen by the kernel at ``address``."""

    def __init__(self, name: str, what: str, address: int, data: Array, readonly: bool) -> None:
        self.name, self.what, self.address, self.data = name, what, address, data
        self.readonly = readonly
        self.end = address + len(data)
        self._views: dict[int, tuple[int, Array]] = {}

    def elements(self, size: int) -> tuple[int, Array]:
        """The first address that is a multiple of ``size``, and the elements from there."""
        if size not in self._views:
            lead = -self.address % size
            count = max(0, len(self.data) - lead) // size
            view = self.data[lead : lead + count * size].view(BITS[size])
            self._views[size] = (self.address + lead, view)
        return self._views[size]


class Memory:
    """The arrays that kernels may touch."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._starts: list[int] = []
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
        label = name or f"array{len(self._regions)}"
        self._regions.append(Region(label, what, address, data, readonly))
        self._starts.append(address)
        self._next = -(-(address + len(data) + _GUARD) // 256) * 256
        return address

    def find(self, address: int) -> Region | None:
        """The array at or before the address."""
        at = bisect.bisect_right(self._starts, address) - 1
        return self._regions[at] if at >= 0 else None

    def split(self, address: Array, size: int) -> list[tuple[Region, Array | None]] | int:
        """Arrays and which accesses go there (None: all); or the place of a bad access."""
        region = self.find(int(address.min()))
        if region is not None and int(address.max()) + size <= region.end:
            return [(region, None)]
        which = np.searchsorted(np.array(self._starts, np.int64), address, "right") - 1
        ends = np.array([r.end for r in self._regions] or [0], np.int64)
        bad = (which < 0) | (address + size > ends[which])
        if bad.any():
            return int(np.flatnonzero(bad)[0])
        return [(self._regions[w], np.flatnonzero(which == w)) for w in np.unique(which)]

    def describe(self, address: int) -> str:
        """Words for an address that lies in no array."""
        region = self.find(address)
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
        offset = array.ctypes.data - base.ctypes.data
        if array.size == 0:
            return np.zeros(0, np.uint8), 0, what
        if min(array.strides, default=0) < 0:
            raise ValueError(f"Memory.register: array ({what}) must not have negative strides")
        span = sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True))
        span += array.itemsize
        start = array[(slice(0, 1),) * array.ndim].reshape(1)
        raw = np.lib.stride_tricks.as_strided(start.view(np.uint8), (span,), (1,))
        return raw, offset, what
    import torch

    if not isinstance(array, torch.Tensor) or array.device.type != "cpu":
        raise TypeError(
            f"Memory.register: expected a numpy array or CPU tensor, got {type(array).__name__}"
        )
    if array.numel() == 0:
        return np.zeros(0, np.uint8), 0, what
    reach = sum((n - 1) * s for n, s in zip(array.shape, array.stride(), strict=True)) + 1
    storage = torch.empty(0, dtype=torch.uint8).set_(array.untyped_storage())  # type: ignore[call-overload]
    offset = int(array.storage_offset()) * array.element_size()
    return storage.numpy()[offset : offset + reach * array.element_size()], offset, what
