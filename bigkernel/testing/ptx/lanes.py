"""The set of threads that execute one piece of the program together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from bigkernel.testing.ptx.types import Array

WARP = 32


class Layout:
    """How a batch of blocks lies in the lanes: each block's threads, padded to whole warps.

    Lane ``b * padded + t`` is thread t of the batch's block b.
    """

    def __init__(self, grid: tuple[int, int, int], block: tuple[int, int, int], ids: range) -> None:
        self.grid, self.block_shape, self.blocks = grid, block, len(ids)
        self.threads = block[0] * block[1] * block[2]
        self.warps = -(-self.threads // WARP)
        self.padded = self.warps * WARP
        self.lanes = self.blocks * self.padded
        self.first = ids.start

    def name(self, lane: int) -> str:
        """As in "block (0,1,0), thread (5,0,0)"."""
        block = _unfold(self.first + lane // self.padded, self.grid)
        return f"block {block}, {self.thread_name(lane)}"

    def thread_name(self, lane: int) -> str:
        return f"thread {_unfold(lane % self.padded, self.block_shape)}"

    @cached_property
    def special(self) -> dict[str, Array]:
        """The special registers (PTX ISA, "Special Registers")."""
        lane = np.arange(self.lanes, dtype=np.int64)
        thread, block = lane % self.padded, lane // self.padded + self.first
        in_warp = lane % WARP
        values: dict[str, Any] = {
            "%laneid": in_warp,
            "%warpid": thread // WARP,
            "%nwarpid": self.warps,
            "%lanemask_eq": 1 << in_warp,
            "%lanemask_lt": (1 << in_warp) - 1,
            "%lanemask_le": (2 << in_warp) - 1,
            "%lanemask_gt": 0xFFFFFFFF - ((2 << in_warp) - 1),
            "%lanemask_ge": 0xFFFFFFFF - ((1 << in_warp) - 1),
        }
        values |= dict.fromkeys(("%clock", "%clock_hi", "%smid", "%gridid", "%cluster_ctarank"), 0)
        values["%nsmid"] = 1
        for axis, name in enumerate("xyz"):
            values[f"%tid.{name}"] = _axis(thread, self.block_shape, axis)
            values[f"%ntid.{name}"] = self.block_shape[axis]
            values[f"%ctaid.{name}"] = _axis(block, self.grid, axis)
            values[f"%nctaid.{name}"] = self.grid[axis]
            values[f"%cluster_ctaid.{name}"] = 0
            values[f"%cluster_nctaid.{name}"] = 1
        made = {k: np.broadcast_to(v, lane.shape).astype(np.uint32) for k, v in values.items()}
        wide = np.zeros(self.lanes, np.uint64)
        return made | {"%clock64": wide, "%globaltimer": wide}


def _axis(index: Array, shape: tuple[int, int, int], axis: int) -> Array:
    return index // int(np.prod(shape[:axis])) % shape[axis]


def _unfold(index: int, shape: tuple[int, int, int]) -> str:
    x, rest = index % shape[0], index // shape[0]
    return f"({x},{rest % shape[1]},{rest // shape[1]})"


class Lanes:
    """Lanes that run an instruction, in ascending order.

    ``within``: their places among the lanes of the set that they are part of, None for all of it.
    """

    def __init__(self, layout: Layout, index: Array, within: Array | None = None) -> None:
        self.layout, self.index, self.within = layout, index, within
        self.n = len(index)
        self.full = self.n == layout.lanes

    def where(self, predicate: Array) -> Lanes | None:
        """The lanes whose predicate holds; None if there are none."""
        chosen = np.flatnonzero(predicate)
        if len(chosen) == self.n:
            return self.alone()
        return Lanes(self.layout, self.index[chosen], chosen) if len(chosen) else None

    def alone(self) -> Lanes:
        """The same lanes as a set that is no part of another."""
        return self if self.within is None else Lanes(self.layout, self.index)

    def take(self, values: Any) -> Any:
        """The parent's values at these lanes; what is no array stays."""
        return values[self.within] if self.within is not None and np.ndim(values) else values

    def put(self, old: Array, new: Array) -> Array:
        """The parent's values with these lanes' replaced."""
        if self.within is None:
            return new
        merged = old.copy()
        merged[self.within] = new
        return merged

    @cached_property
    def block(self) -> Array:
        """The batch's block of each lane."""
        return self.index // self.layout.padded

    @cached_property
    def thread(self) -> Array:
        """The thread in its block of each lane."""
        return self.index % self.layout.padded

    @cached_property
    def warp(self) -> Array:
        """The warp in its block of each lane."""
        return self.thread // WARP

    @cached_property
    def row(self) -> Array:
        """Of each lane its warp's number among those that take part."""
        warps = self.index // WARP
        return np.cumsum(np.diff(warps, prepend=warps[:1]) > 0)

    @cached_property
    def warp_count(self) -> int:
        """Warps with at least one of these lanes."""
        return self.n // WARP if self.full else int(self.row[-1]) + 1

    def by_warp(self, values: Array, fill: int = 0) -> Array:
        """[warps, 32] of values, ``fill`` where a lane is not among these."""
        if self.full:
            return values.reshape(-1, WARP)
        rows = np.full((self.warp_count, WARP), fill, values.dtype)
        rows[self.row, self.index % WARP] = values
        return rows


def guarded(m: Any, lanes: Lanes, guard: Array, call: Any, dtypes: Sequence[Any],
            *arguments: Any) -> list[Array]:  # fmt: skip
    """What ``call`` gives at the lanes where the guard holds, zeros elsewhere."""
    out = [np.zeros(lanes.n, dtype) for dtype in dtypes]
    some = lanes.where(guard)
    if some is not None:
        found = call(m, some, *(some.take(argument) for argument in arguments)) or ()
        out = [some.put(old, new.view(old.dtype)) for old, new in zip(out, found, strict=True)]
    return out
