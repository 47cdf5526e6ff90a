"""A batch of blocks: registers, memories, and what instructions do to them."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigkernel.testing.ptx.counters import Counters
from bigkernel.testing.ptx.errors import Finding, Misaligned, OutOfBounds
from bigkernel.testing.ptx.lanes import Lanes, Layout
from bigkernel.testing.ptx.memory import (
    GLOBAL_BASE,
    LOCAL_BASE,
    PARAM_BASE,
    SHARED_BASE,
    WINDOW,
    Local,
    Memory,
    Region,
)
from bigkernel.testing.ptx.numerics import bf16_to_f32, round_to
from bigkernel.testing.ptx.program import Flat
from bigkernel.testing.ptx.shared import Shared
from bigkernel.testing.ptx.types import BITS, DTYPES, PACKED, Array, canonical, size_of


@dataclass(slots=True)
class Job:
    """What all batches of one launch share."""

    flat: Flat
    pieces: list[Any]  # translated blocks
    memory: Memory
    symbols: dict[str, int]  # addresses of parameters and of the module's variables
    params: Array  # bytes
    dynamic_shared: int
    counters: Counters
    max_steps: int


class Machine:
    """Blocks ``layout.first`` .. of a launch, lane by lane."""

    def __init__(self, job: Job, layout: Layout) -> None:
        self.job, self.layout, self.flat = job, layout, job.flat
        self.counters, self.symbols = job.counters, job.symbols
        everyone = np.arange(layout.lanes)
        self.everyone = Lanes(layout, everyone)
        self.alive = everyone % layout.padded < layout.threads
        size = self.flat.shared_bytes + job.dynamic_shared
        self.shared = Shared(self, size, self.flat.granule)
        params = Region("parameters", "kernel parameters", PARAM_BASE, job.params, True)
        own = [Local(layout.lanes, self.flat.local_bytes), self.shared, params]
        self.memories: list[Region] = [*own, *job.memory.regions]  # by address
        self.starts = [region.address for region in self.memories]
        self.ends = np.array([region.end for region in self.memories], np.int64)
        self.own = len(own)
        sizes = {"%dynamic_smem_size": job.dynamic_shared, "%total_smem_size": size}
        self.registers = layout.special | {
            name: np.full(layout.lanes, value, np.uint32) for name, value in sizes.items()
        }

    def register(self, name: str) -> Array:
        """A register's lanes; zero before the first write."""
        if name not in self.registers:
            dtype = canonical(self.flat.registers[name])
            self.registers[name] = np.zeros(self.layout.lanes, dtype)
        return self.registers[name]

    # Findings

    def line(self, k: int) -> int:
        """The PTX line of instruction k."""
        return self.flat.instructions[k].line

    def fail(self, kind: type[Finding], lane: int, k: int, what: str) -> Finding:
        """A finding about instruction k in one thread."""
        i = self.flat.instructions[k]
        source = f" ({i.source})" if i.source else ""
        return kind(
            f"kernel {self.flat.name}, {self.layout.name(lane)}, PTX line {i.line}{source}, "
            f"`{i.text}`: {what}"
        )

    # Loads and stores

    def access(
        self, kind: str, lanes: Lanes, k: int, space: str, at: Array, size: int, count: int = 1,
        align: int = 0,
    ) -> Iterator[tuple[Lanes, Array, Array, Any]]:  # fmt: skip
        """Check, note and count a "load", "store" or "atomic" of ``count`` words of ``size`` bytes.

        By memory: its lanes, its words, where among them each lane's first is, and what the
        memory's ``touch`` gave.
        """
        if space == "shared":
            at = at + SHARED_BASE
        total = size * count
        for memory, some in self.reached(lanes, k, space, at, total):
            where = some.take(at)
            self.check_aligned(memory, some, k, where, align or total)
            note = memory.touch(self, kind, some, k, where, total)
            yield (some, *memory.words(some, where, size), note)

    def check_aligned(self, memory: Region, lanes: Lanes, k: int, at: Array, align: int) -> None:
        wrong = at & (align - 1)
        if wrong.any():
            what = f"{align}-byte access at {memory.place(at[wrong > 0][0])}"
            raise self.fail(Misaligned, lanes.index[wrong > 0][0], k, what)

    def reached(
        self, lanes: Lanes, k: int, space: str, at: Array, size: int
    ) -> Iterator[tuple[Region, Lanes]]:
        """The memories that generic addresses lie in, and whose lanes do."""
        first = self.own if space == "global" else 0
        one = bisect.bisect_right(self.starts, int(at.min())) - 1
        if one >= first and int(at.max()) + size <= self.ends[one]:
            yield self.memories[one], lanes.alone()
            return
        which = np.searchsorted(self.starts, at, "right") - 1
        bad = (which < first) | (at + size > self.ends[which])
        if bad.any():
            what = f"{size}-byte access: {self.job.memory.describe(at[bad][0])}"
            raise self.fail(OutOfBounds, lanes.index[bad][0], k, what)
        for number in np.unique(which):
            some = lanes.where(which == number)
            assert some is not None
            yield self.memories[number], some

    def load(self, lanes: Lanes, k: int, space: str, at: Array, size: int, count: int,
             align: int = 0) -> list[Array]:  # fmt: skip
        """``count`` values of ``size`` bytes per lane."""
        out = [np.zeros(lanes.n, BITS[size])] * count
        for some, view, first, _ in self.access("load", lanes, k, space, at, size, count, align):
            out = [some.put(old, view[first + j]) for j, old in enumerate(out)]
        return out

    def store(self, lanes: Lanes, k: int, space: str, at: Array, size: int,
              *values: Array) -> None:  # fmt: skip
        """Each lane's values to its address."""
        count = len(values)
        for some, view, first, clash in self.access("store", lanes, k, space, at, size, count):
            mine = [some.take(value) for value in values]
            for j, value in enumerate(mine):
                view[first + j] = value
            for j, value in enumerate(mine if clash else ()):
                overwritten = np.flatnonzero(view[first + j] != value)
                if len(overwritten):
                    raise clash(int(overwritten[0]))

    def update(self, lanes: Lanes, k: int, space: str, at: Array, op: str, type_: str, keep: bool,
               *values: Array) -> list[Array]:  # fmt: skip
        """One atomic update per lane, in lane order; the values found, where they are kept."""
        size = size_of(type_)
        out = np.zeros(lanes.n, BITS[size])
        for some, view, place, _ in self.access("atomic", lanes, k, space, at, size):
            mine = [some.take(value) for value in values]
            if not keep and op in _UFUNCS and size >= 4 and type_ not in PACKED:
                dtype = DTYPES[type_]
                _UFUNCS[op].at(view.view(dtype), place, mine[0].view(dtype))
            else:
                out = some.put(out, _one_by_one(view, place, op, type_, mine))
        return [out] if keep else []

    def is_space(self, at: Array, space: str) -> Array:
        """Whether generic addresses are in a state space."""
        windows = {"shared": SHARED_BASE, "local": LOCAL_BASE, "param": PARAM_BASE}
        base = windows.get(space.split(":")[0])
        return at >= GLOBAL_BASE if base is None else (at >= base) & (at < base + WINDOW)

    # cp.async (PTX ISA, "Data Movement and Conversion: cp.async")

    def copy(self, lanes: Lanes, k: int, to: Array, of: Array, size: int, taken: Array) -> None:
        """Start an asynchronous copy of ``size`` bytes, zeros past the first ``taken`` ones."""
        bad = taken > size
        if bad.any():
            what = f"copies {taken[bad][0]} of {size} bytes"
            raise self.fail(OutOfBounds, lanes.index[bad][0], k, what)
        rows = np.zeros((lanes.n, size), np.uint8)
        for n in np.unique(taken[taken > 0]).tolist():
            some = lanes.where(taken == n)
            assert some is not None
            unit = min(n & -n, 8)  # the longest words that n is made of
            words = self.load(some, k, "global", some.take(of), unit, n // unit, size)
            filled = np.zeros((some.n, size), np.uint8)
            filled[:, :n] = np.stack(words, axis=1).view(np.uint8)
            rows = some.put(rows, filled)
        to = to + SHARED_BASE
        self.check_aligned(self.shared, lanes, k, to, size)
        self.counters.count_shared(self.line(k), lanes, to, size)
        self.shared.copy(lanes, k, to, rows)

    def commit(self, lanes: Lanes) -> None:
        """cp.async.commit_group."""
        self.shared.committed[lanes.index] += 1

    def wait(self, lanes: Lanes, groups_left: int) -> None:
        """cp.async.wait_group, wait_all."""
        self.shared.wait(lanes, groups_left)

    def count_instructions(self, executed: Array) -> None:
        """Add each block's instructions times the warps that executed it."""
        for block, times in zip(self.flat.blocks, executed.tolist(), strict=True):
            for k in [*block.body, block.end] if times else ():
                if k is not None:
                    self.counters.instructions[self.flat.instructions[k].opcode] += times


# Atomic updates (PTX ISA, "Parallel Synchronization": atom, red)

_UFUNCS: dict[str, Any] = {
    "add": np.add, "min": np.fmin, "max": np.fmax,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def _one_by_one(view: Array, place: Array, op: str, type_: str, values: list[Array]) -> Array:
    """Update view[place] once per entry, in order; what each found."""
    out = np.zeros(len(place), view.dtype)
    left = np.arange(len(place))
    while len(left):  # all places once, the first that wants it
        _, first = np.unique(place[left], return_index=True)
        now = left[first]
        out[now] = view[place[now]]
        view[place[now]] = _combine(op, type_, out[now], [v[now] for v in values])
        left = np.delete(left, first)
    return out


def _combine(op: str, type_: str, old: Array, values: list[Array]) -> Array:
    """The new bits."""
    a, b = (x.view(DTYPES[type_]) for x in (old, values[0]))
    if op == "exch":
        return values[0]
    if op == "cas":
        return np.where(old == values[0], values[1], old)
    if op == "inc":
        return np.where(a >= b, 0, a + 1)
    if op == "dec":
        return np.where((a == 0) | (a > b), b, a - 1)
    if type_.startswith("bf16"):
        return round_to(_UFUNCS[op](bf16_to_f32(a), bf16_to_f32(b)), "bf16").view(old.dtype)
    new: Array = _UFUNCS[op](a, b)
    return new.view(old.dtype)
