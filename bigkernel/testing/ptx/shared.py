"""Shared memory of a batch of blocks: who wrote and read what when, and cp.async.

Order between threads follows PTX ISA, "Memory Consistency Model", as far as barriers make it: each
warp has a clock that advances at every barrier it passes, and a vector of the other warps' clocks
that it has synchronised with. An access is ordered after another if the other's clock is in that
vector. Places are told apart in granules: the kernel's shortest shared-memory access.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bigkernel.testing.ptx.errors import (
    Finding,
    MissingWait,
    OutOfBounds,
    SharedRace,
    UninitializedRead,
)
from bigkernel.testing.ptx.lanes import Lanes
from bigkernel.testing.ptx.memory import SHARED_BASE, WINDOW, Region
from bigkernel.testing.ptx.types import BITS, Array

if TYPE_CHECKING:
    from bigkernel.testing.ptx.machine import Machine

# A stamp is clock << 12 | atomic << 11 | thread + 1; 0 is never.
_THREAD, _MANY, _ATOMIC, _CLOCK = 0x7FF, 0x7FF, 0x800, 12


@dataclass
class _Copy:
    """cp.async by some lanes."""

    lanes: Array
    place: Array  # row of `size` bytes in the data
    rows: Array  # [lanes, size] bytes
    slots: Array  # [lanes, granules]
    group: Array  # the lanes' groups
    flying: Array  # which have not landed


class Shared(Region):
    """Shared memory of every block of a batch, ``size`` bytes each."""

    def __init__(self, machine: Machine, size: int, granule: int) -> None:
        layout = self.layout = machine.layout
        self.m, self.size, self.granule = machine, size, granule
        self.stride = -(-size // 16) * 16
        data = np.zeros(layout.blocks * self.stride, np.uint8)
        super().__init__("", "", SHARED_BASE, data, False)
        self.end = SHARED_BASE + WINDOW
        self.slots_per_block = self.stride // granule
        slots = layout.blocks * self.slots_per_block
        self.written = np.zeros(slots, np.int32)
        self.read = np.zeros((slots, layout.warps), np.int32)
        self.pending = np.zeros(slots, np.int32)  # thread + 1 of a copy in flight
        self.clock = np.zeros((layout.blocks, layout.warps, layout.warps), np.int32)
        self._own = np.arange(layout.warps)
        self.clock[:, self._own, self._own] = 1
        self.copies: list[_Copy] = []
        self.committed = np.zeros(layout.lanes, np.int64)

    @staticmethod
    def bytes_per_block(size: int, granule: int, warps: int) -> int:
        """Host memory that one block takes."""
        return size + size // granule * 4 * (warps + 2)

    # Order

    def synchronize(self) -> None:
        """All threads of all blocks have met at a barrier."""
        self.clock[:] = self.clock.max(axis=1)[:, None, :]
        self.clock[:, self._own, self._own] += 1

    def synchronize_warps(self, block: int, seen: Array, warps: Array) -> None:
        """Some warps of one block have met; ``seen``: the clocks all participants brought."""
        self.clock[block, warps] = np.maximum(self.clock[block, warps], seen)
        self.advance(np.full(len(warps), block), warps)

    def advance(self, block: Array, warp: Array) -> None:
        """What these warps do from now on is later than what they did (bar.warp.sync)."""
        pairs = np.unique(block * self.layout.warps + warp)
        block, warp = np.divmod(pairs, self.layout.warps)
        self.clock[block, warp, warp] += 1

    def _now(self, lanes: Lanes) -> Array:
        """Each lane's stamp if it writes or reads now, [lanes, 1]."""
        clock = self.clock[lanes.block, lanes.warp, lanes.warp]
        return ((clock << _CLOCK) | (lanes.thread + 1)).astype(np.int32)[:, None]

    # Accesses

    def touch(self, m: Machine, kind: str, lanes: Lanes, k: int, at: Array,
              size: int) -> Callable[[int], Finding] | None:  # fmt: skip
        slots = self.slots(lanes, k, at, size)
        if kind == "atomic":
            m.counters.shared_atomics += lanes.n
        else:
            m.counters.count_shared(m.line(k), lanes, at, size)
        if kind != "store":
            self._check_written(lanes, k, slots)
        if kind == "load":
            self._mark_read(lanes, k, slots)
        elif self._mark_write(lanes, k, slots, _ATOMIC if kind == "atomic" else 0) is not None:
            words = "writes another value to {}'s place"
            return lambda i: self._race(lanes, k, slots, i, 0, words, self.written[slots])
        return None

    def words(self, lanes: Lanes, at: Array, size: int) -> tuple[Array, Array]:
        """The memory in words of ``size`` bytes, and which of them are at these addresses."""
        return self.data.view(BITS[size]), (lanes.block * self.stride + at - SHARED_BASE) // size

    def slots(self, lanes: Lanes, k: int, at: Array, size: int) -> Array:
        """The granules of an access, [lanes, granules]."""
        bad = at + size > SHARED_BASE + self.size
        if bad.any():
            what = f"{size} bytes at {self.place(at[bad][0])}, of {self.size} bytes"
            raise self.m.fail(OutOfBounds, lanes.index[bad][0], k, what)
        first = lanes.block * self.slots_per_block + (at - SHARED_BASE) // self.granule
        return first[:, None] + np.arange(size // self.granule)

    def _check_written(self, lanes: Lanes, k: int, slots: Array) -> None:
        if self.copies and self.pending[slots].any():
            i, j = _first(self.pending[slots])
            by = self._thread(lanes.index[i], int(self.pending[slots][i, j]))
            what = f"{self._place(slots, i, j)} awaits a cp.async of {by} that was not waited for"
            raise self.m.fail(MissingWait, lanes.index[i], k, what)
        stamps = self.written[slots]
        if not stamps.all():
            i, j = _first(stamps == 0)
            what = f"{self._place(slots, i, j)} was never written"
            raise self.m.fail(UninitializedRead, lanes.index[i], k, what)

    def _mark_read(self, lanes: Lanes, k: int, slots: Array) -> None:
        stamps = self.written[slots]
        bad = self._unordered(lanes, stamps)
        if bad.any():
            raise self._race(lanes, k, slots, *_first(bad), "reads what {} wrote", stamps)
        warp, me = lanes.warp[:, None], self._now(lanes)
        clock = me >> _CLOCK << _CLOCK
        before = self.read[slots, warp]
        mine = np.where((before >= clock) & (before != me), clock | _MANY, me)
        self.read[slots, warp] = mine
        lost = np.nonzero(self.read[slots, warp] != mine)  # to others that read the same place now
        if len(lost[0]):
            self.read[slots[lost], lanes.warp[lost[0]]] = (clock | _MANY)[lost[0], 0]

    def _mark_write(self, lanes: Lanes, k: int, slots: Array, flag: int) -> Array | None:
        """Check and note a write; the lanes that others overwrote in the same instruction."""
        if self.copies and self.pending[slots].any():
            pending = self.pending[slots]
            words = "writes under a cp.async to {}'s place"
            raise self._race(lanes, k, slots, *_first(pending), words, pending)
        stamps = self.written[slots]
        bad = self._unordered(lanes, stamps)
        if flag:
            bad &= (stamps & _ATOMIC) == 0
        if bad.any():
            raise self._race(lanes, k, slots, *_first(bad), "writes what {} wrote", stamps)
        now, clocks = self._now(lanes), self.clock[lanes.block, lanes.warp]
        reads = self.read[slots]  # [lanes, granules, warps]
        late = (reads >> _CLOCK) > clocks[:, None, :]
        own = self.read[slots, lanes.warp[:, None]]
        other = (own >> _CLOCK == now >> _CLOCK) & ((own ^ now) & _THREAD != 0)
        if late.any() or other.any():
            i, j = _first(late.any(2) | other)
            stamps[i, j] = reads[i, j][late[i, j]][0] if late[i, j].any() else own[i, j]
            raise self._race(lanes, k, slots, i, j, "writes what {} read", stamps)
        mine = np.broadcast_to(now | flag, slots.shape)
        self.written[slots] = mine
        clash = (self.written[slots] != mine).any(1)
        return np.flatnonzero(clash) if clash.any() else None

    def _unordered(self, lanes: Lanes, stamps: Array) -> Array:
        """Which writes another thread made with no barrier since."""
        writer = (stamps & _THREAD) - 1
        warp = writer >> 5
        mine = lanes.warp[:, None]
        seen = self.clock[lanes.block[:, None], mine, warp] - (warp == mine)
        return ((stamps >> _CLOCK) > seen) & (writer != lanes.thread[:, None])

    # cp.async (PTX ISA, "Data Movement and Conversion: cp.async")

    def copy(self, lanes: Lanes, k: int, at: Array, rows: Array) -> None:
        """Start copies of rows ([lanes, bytes]) to ``at``; they land when waited for."""
        size = rows.shape[1]
        slots = self.slots(lanes, k, at, size)
        written = self.written[slots]
        clash = self._mark_write(lanes, k, slots, 0)
        if clash is not None:
            words, stamps = "writes what {} wrote", self.written[slots]
            raise self._race(lanes, k, slots, int(clash[0]), 0, words, stamps)
        self.written[slots] = written  # nothing is there before it lands
        self.pending[slots] = (lanes.thread + 1)[:, None]
        place = (lanes.block * self.stride + at - SHARED_BASE) // size
        group, flying = self.committed[lanes.index], np.ones(lanes.n, bool)
        self.copies.append(_Copy(lanes.index, place, rows, slots, group, flying))

    def wait(self, lanes: Lanes, groups_left: int) -> None:
        """Land all but the last ``groups_left`` groups; -1: also what is in no group yet."""
        limit = np.full(self.layout.lanes, -1, np.int64)
        limit[lanes.index] = self.committed[lanes.index] - groups_left
        for copy in self.copies:
            done = copy.flying & (copy.group < limit[copy.lanes])
            if done.any():
                self.data.reshape(-1, copy.rows.shape[1])[copy.place[done]] = copy.rows[done]
                landed = Lanes(self.layout, copy.lanes[done])
                self.written[copy.slots[done]] = self._now(landed)
                self.pending[copy.slots[done]] = 0
                copy.flying &= ~done
        self.copies = [copy for copy in self.copies if copy.flying.any()]

    # Findings

    def _thread(self, lane: int, stamp: int) -> str:
        """The other party of a race: a stamp's thread in the lane's block."""
        number = (stamp & _THREAD) - 1
        if number == _MANY - 1:
            return "several threads of its warp"
        return self.layout.thread_name(lane // self.layout.padded * self.layout.padded + number)

    def place(self, address: int) -> str:
        return f"shared address {address - SHARED_BASE}"

    def _place(self, slots: Array, i: int, j: int) -> str:
        return self.place(SHARED_BASE + int(slots[i, j]) % self.slots_per_block * self.granule)

    def _race(self, lanes: Lanes, k: int, slots: Array, i: int, j: int, words: str,
              stamps: Array) -> Finding:  # fmt: skip
        """Lane i's finding at its granule j; ``words`` about the thread of the stamp there."""
        lane = lanes.index[i]
        said = words.format(self._thread(lane, int(stamps[i, j])))
        what = f"{said}, {self._place(slots, i, j)}, with no barrier between"
        return self.m.fail(SharedRace, lane, k, what)


def _first(bad: Array) -> tuple[int, int]:
    i, j = np.argwhere(bad)[0]
    return int(i), int(j)
