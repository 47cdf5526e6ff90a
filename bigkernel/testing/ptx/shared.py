"""Shared memory of a batch of blocks: who wrote and read what when, and cp.async.

Order between threads follows PTX ISA, "Memory Consistency Model", as far as barriers make it: each
warp has a clock that advances at every barrier it passes, and a vector of the other warps' clocks
that it has synchronised with. An access is ordered after another if the other's clock is in that
vector. Places are told apart in granules: the kernel's shortest shared-memory access.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bigkernel.testing.ptx.errors import (
    Finding,
    Misaligned,
    MissingWait,
    OutOfBounds,
    SharedRace,
    UninitializedRead,
)
from bigkernel.testing.ptx.lanes import Lanes, Layout
from bigkernel.testing.ptx.types import BITS, Array

# A stamp is clock << 12 | atomic << 11 | thread + 1; 0 is never.
_THREAD, _MANY, _ATOMIC, _CLOCK = 0x7FF, 0x7FF, 0x800, 12

Fail = Callable[[type[Finding], int, int, str], Finding]  # (kind, lane, instruction, what)


@dataclass
class _Copy:
    """cp.async by some lanes, not landed yet."""

    lanes: Array
    place: Array  # row of `size` bytes in the data
    size: int
    rows: Array  # [lanes, size] bytes
    slots: Array  # [lanes, granules]
    group: Array  # the lanes' groups


class Shared:
    """Shared memory of every block of a batch, ``size`` bytes each."""

    def __init__(self, layout: Layout, size: int, granule: int, fail: Fail) -> None:
        self.layout, self.size, self.granule, self.fail = layout, size, granule, fail
        self.stride = -(-size // 16) * 16
        self.data = np.zeros(layout.blocks * self.stride, np.uint8)
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

    def synchronize(self, blocks: Array | None = None) -> None:
        """All threads of these blocks (None: of all) have met at a barrier."""
        if blocks is None:
            self.clock[:] = self.clock.max(axis=1)[:, None, :]
            self.clock[:, self._own, self._own] += 1
        else:
            self.clock[blocks] = self.clock[blocks].max(axis=1)[:, None, :]
            self.clock[blocks[:, None], self._own, self._own] += 1

    def synchronize_warps(self, block: int, seen: Array, warps: Array) -> None:
        """Some warps of one block have met; ``seen``: the clocks all participants brought."""
        self.clock[block, warps] = np.maximum(self.clock[block, warps], seen)
        self.advance(np.full(len(warps), block), warps)

    def advance(self, block: Array, warp: Array) -> None:
        """What these warps do from now on is later than what they did (bar.warp.sync)."""
        pairs = np.unique(block * self.layout.warps + warp)
        block, warp = np.divmod(pairs, self.layout.warps)
        self.clock[block, warp, warp] += 1

    def load(self, lanes: Lanes, k: int, at: Array, size: int, count: int) -> list[Array]:
        """``count`` values of ``size`` bytes from each lane's address."""
        slots = self._slots(lanes, k, at, size * count)
        self._mark_read(lanes, k, slots)
        return self.peek(lanes, at, size, count)

    def store(self, lanes: Lanes, k: int, at: Array, size: int, values: list[Array]) -> None:
        """Each lane's values to its address."""
        slots = self._slots(lanes, k, at, size * len(values))
        clash = self._mark_write(lanes, k, slots, 0)
        self.poke(lanes, at, size, values)
        if clash is not None:  # several lanes in this very instruction: fine if they agree
            for value, now in zip(values, self.peek(lanes, at, size, len(values)), strict=True):
                bad = np.flatnonzero(now != value)
                if len(bad):
                    raise self._race(lanes, k, slots, int(bad[0]), "writes another value to")

    def touch_atomic(self, lanes: Lanes, k: int, at: Array, size: int) -> None:
        """Check and note an atomic update."""
        slots = self._slots(lanes, k, at, size)
        unknown = self.written[slots] == 0
        if unknown.any():
            raise self._unwritten(lanes, k, slots, unknown)
        self._mark_write(lanes, k, slots, _ATOMIC)

    def peek(self, lanes: Lanes, at: Array, size: int, count: int) -> list[Array]:
        """Values without any check."""
        view, place = self._place(lanes, at, size)
        return [view[place + j] for j in range(count)]

    def poke(self, lanes: Lanes, at: Array, size: int, values: list[Array]) -> None:
        """Store without any check."""
        view, place = self._place(lanes, at, size)
        for j, value in enumerate(values):
            view[place + j] = value

    def _place(self, lanes: Lanes, at: Array, size: int) -> tuple[Array, Array]:
        return self.data.view(BITS[size]), (lanes.block * self.stride + at) // size

    def _slots(self, lanes: Lanes, k: int, at: Array, size: int) -> Array:
        """The granules of an access, [lanes, granules], after checking its address."""
        if at.size and (int(at.min()) < 0 or int(at.max()) + size > self.size):
            i = int(np.flatnonzero((at < 0) | (at + size > self.size))[0])
            what = f"{size} bytes at shared address {int(at[i])}, of {self.size} bytes"
            raise self.fail(OutOfBounds, lanes.index[i], k, what)
        if (at & (size - 1)).any():
            i = int(np.flatnonzero(at & (size - 1))[0])
            what = f"{size}-byte access at shared address {int(at[i])}"
            raise self.fail(Misaligned, lanes.index[i], k, what)
        first = lanes.block * self.slots_per_block + at // self.granule
        return first[:, None] + np.arange(size // self.granule)

    def _mark_read(self, lanes: Lanes, k: int, slots: Array) -> None:
        stamps = self.written[slots]
        if self.copies:
            waiting = self.pending[slots] != 0
            if waiting.any():
                raise self._in_flight(lanes, k, slots, waiting)
        if not stamps.all():
            raise self._unwritten(lanes, k, slots, stamps == 0)
        bad = self._unordered(lanes, stamps)
        if bad.any():
            raise self._race(lanes, k, slots, *_first(bad), "reads what", stamps)
        warp, me = lanes.warp[:, None], (lanes.thread + 1)[:, None]
        clock = self.clock[lanes.block, lanes.warp, lanes.warp][:, None] << _CLOCK
        before = self.read[slots, warp]
        many = (before >= clock) & (before != clock | me)
        mine = np.where(many, clock | _MANY, clock | me).astype(np.int32)
        self.read[slots, warp] = mine
        if len(lanes.index) > 1:  # lanes of this instruction that read one place
            lost = np.nonzero(self.read[slots, warp] != mine)
            if len(lost[0]):
                self.read[slots[lost], lanes.warp[lost[0]]] = (clock | _MANY)[lost[0], 0]

    def _mark_write(self, lanes: Lanes, k: int, slots: Array, flag: int) -> Array | None:
        """Check and note a write; the lanes that others overwrote in the same instruction."""
        if self.copies:
            waiting = self.pending[slots] != 0
            if waiting.any():
                raise self._race(lanes, k, slots, *_first(waiting), "writes under a cp.async to")
        stamps = self.written[slots]
        bad = self._unordered(lanes, stamps)
        if flag:
            bad &= (stamps & _ATOMIC) == 0
        if bad.any():
            raise self._race(lanes, k, slots, *_first(bad), "writes what", stamps)
        clocks = self.clock[lanes.block, lanes.warp]
        reads = self.read[slots]
        late = (reads >> _CLOCK) > clocks[:, None, :]
        own = np.take_along_axis(reads, np.broadcast_to(lanes.warp[:, None, None], (*slots.shape, 1)), 2)[..., 0]  # fmt: skip  # noqa: E501
        now = np.take_along_axis(clocks, lanes.warp[:, None], 1)
        other = ((own >> _CLOCK) == now) & ((own & _THREAD) != (lanes.thread + 1)[:, None])
        if late.any() or other.any():
            bad = late.any(2) | other
            i, j = _first(bad)
            by = int(reads[i, j][late[i, j]][0] if late[i, j].any() else own[i, j])
            raise self._race(lanes, k, slots, i, j, "writes what", np.full(slots.shape, by), "read")
        mine = ((now << _CLOCK) | flag | (lanes.thread + 1)[:, None]).astype(np.int32)
        mine = np.broadcast_to(mine, slots.shape)
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
        slots = self._slots(lanes, k, at, size)
        written = self.written[slots]
        clash = self._mark_write(lanes, k, slots, 0)
        if clash is not None:
            raise self._race(lanes, k, slots, int(clash[0]), 0, "writes what", self.written[slots])
        self.written[slots] = written  # nothing is there before it lands
        self.pending[slots] = (lanes.thread + 1)[:, None]
        place = (lanes.block * self.stride + at) // size
        group = self.committed[lanes.index]
        self.copies.append(_Copy(lanes.index, place, size, rows, slots, group))

    def commit(self, lanes: Lanes) -> None:
        """cp.async.commit_group."""
        self.committed[lanes.index] += 1

    def wait(self, lanes: Lanes, groups_left: int) -> None:
        """Land all but the last ``groups_left`` groups; -1: also what is in no group yet."""
        limit = np.full(self.layout.lanes, -1, np.int64)
        limit[lanes.index] = self.committed[lanes.index] - groups_left
        kept = []
        for copy in self.copies:
            done = copy.group < limit[copy.lanes]
            if done.any():
                self._land(copy, done)
            if not done.all():
                rest = (copy.lanes, copy.place), (copy.rows, copy.slots, copy.group)
                (lane, place), (rows, slots, group) = ([x[~done] for x in part] for part in rest)
                kept.append(_Copy(lane, place, copy.size, rows, slots, group))
        self.copies = kept

    def _land(self, copy: _Copy, done: Array) -> None:
        self.data.reshape(-1, copy.size)[copy.place[done]] = copy.rows[done]
        block, thread = np.divmod(copy.lanes[done], self.layout.padded)
        clock = self.clock[block, thread // 32, thread // 32]
        self.written[copy.slots[done]] = ((clock << _CLOCK) | (thread + 1))[:, None]
        self.pending[copy.slots[done]] = 0

    # Findings

    def _thread(self, lane: int, number: int) -> str:
        """The other party of a race: thread ``number`` of the lane's block."""
        if number == _MANY - 1:
            return "several threads of its warp"
        base = lane // self.layout.padded * self.layout.padded
        return self.layout.name(base + number).split(", ", 1)[1]

    def _where(self, slots: Array, i: int, j: int) -> str:
        return f"shared address {int(slots[i, j]) % self.slots_per_block * self.granule}"

    def _race(self, lanes: Lanes, k: int, slots: Array, i: int, j: int | str, what: str = "",
              stamps: Array | None = None, did: str = "wrote") -> Finding:  # fmt: skip
        if isinstance(j, str):  # same instruction
            what, j = j, 0
            stamps = self.written[slots]
        lane = int(lanes.index[i])
        number = int((self.pending[slots] if stamps is None else stamps)[i, j] & _THREAD) - 1
        other = self._thread(lane, number)
        verb = f"{what} {other} {did}" if what.endswith("what") else f"{what} {other}'s place"
        return self.fail(
            SharedRace, lane, k, f"{verb}, {self._where(slots, i, j)}, with no barrier between"
        )

    def _unwritten(self, lanes: Lanes, k: int, slots: Array, bad: Array) -> Finding:
        i, j = _first(bad)
        what = f"{self._where(slots, i, j)} was never written"
        return self.fail(UninitializedRead, int(lanes.index[i]), k, what)

    def _in_flight(self, lanes: Lanes, k: int, slots: Array, bad: Array) -> Finding:
        i, j = _first(bad)
        by = self._thread(int(lanes.index[i]), int(self.pending[slots][i, j]) - 1)
        what = f"{self._where(slots, i, j)} awaits a cp.async of {by} that was not waited for"
        return self.fail(MissingWait, int(lanes.index[i]), k, what)


def _first(bad: Array) -> tuple[int, int]:
    i, j = np.argwhere(bad)[0]
    return int(i), int(j)
