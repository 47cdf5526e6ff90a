"""A batch of blocks: registers, memories, and what instructions do to them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigkernel.testing.ptx.counters import Counters
from bigkernel.testing.ptx.errors import Finding, Misaligned, OutOfBounds
from bigkernel.testing.ptx.lanes import Lanes, Layout
from bigkernel.testing.ptx.memory import (
    GLOBAL_BASE,
    LOCAL_BASE,
    SHARED_BASE,
    WINDOW,
    Memory,
    Region,
)
from bigkernel.testing.ptx.program import Flat, Piece
from bigkernel.testing.ptx.shared import Shared
from bigkernel.testing.ptx.types import BITS, SIGNED, Array, canonical

PARAM_BASE = 3 << 40


@dataclass(slots=True)
class Job:
    """What all batches of one launch share."""

    flat: Flat
    pieces: list[Piece]
    memory: Memory
    symbols: dict[str, int]
    params: Array  # bytes
    param_offsets: dict[str, int]
    dynamic_shared: int
    counters: Counters
    max_steps: int


class Machine:
    """Blocks ``layout.first`` .. of a launch, lane by lane."""

    def __init__(self, job: Job, layout: Layout) -> None:
        self.job, self.layout, self.flat = job, layout, job.flat
        self.memory, self.counters = job.memory, job.counters
        self.registers: dict[str, Array] = {}
        everyone = np.arange(layout.lanes)
        self.everyone = Lanes(layout, everyone)
        self.alive = everyone % layout.padded < layout.threads
        size = self.flat.shared_bytes + job.dynamic_shared
        self.shared = Shared(layout, size, self.flat.granule, self.fail)
        self.local = np.zeros((layout.lanes, -(-self.flat.local_bytes // 16) * 16), np.uint8)
        self.params = Region("parameters", "kernel parameters", PARAM_BASE, job.params, True)

    # Registers

    def register(self, name: str) -> Array:
        """A register's lanes; zero before the first write."""
        if name not in self.registers:
            if name in ("%dynamic_smem_size", "%total_smem_size"):
                size = self.job.dynamic_shared
                size += 0 if name.startswith("%d") else self.flat.shared_bytes
                value = np.full(self.layout.lanes, size, np.uint32)
            elif name in self.layout.special and name not in self.flat.registers:
                value = self.layout.special[name]
            else:
                dtype = canonical(self.flat.registers.get(name, "u32"))
                value = np.zeros(self.layout.lanes, dtype)
            self.registers[name] = value
        return self.registers[name]

    def symbol(self, name: str) -> int:
        """The address of a parameter or a module's variable."""
        if name in self.job.param_offsets:
            return PARAM_BASE + self.job.param_offsets[name]
        return self.job.symbols[name]

    # Findings

    def line(self, k: int) -> int:
        """The PTX line of instruction k."""
        return self.flat.instructions[k].line

    def fail(self, kind: type[Finding], lane: int, k: int, what: str) -> Finding:
        """A finding about instruction k in one thread."""
        i = self.flat.instructions[k]
        source = f" ({i.source})" if i.source else ""
        return kind(
            f"kernel {self.flat.name}, {self.layout.name(int(lane))}, PTX line {i.line}{source}, "
            f"`{i.text}`: {what}"
        )

    # Loads and stores

    def parts(self, lanes: Lanes, space: str, at: Array) -> list[tuple[str, Lanes, Array]]:
        """The accesses by state space, with addresses within it."""
        if space in ("shared", "local"):
            return [(space, lanes, at - (LOCAL_BASE if space == "local" else 0))]
        if space == "global" or int(at.min()) >= GLOBAL_BASE:
            return [("global", lanes, at)]
        parts: list[tuple[str, Lanes, Array]] = []
        rest = np.ones(lanes.n, bool)
        for name, base in (("shared", SHARED_BASE), ("local", LOCAL_BASE)):
            inside = (at >= base) & (at < base + WINDOW)
            chosen = lanes.where(inside)
            if chosen is not None:
                parts.append((name, chosen, chosen.take(at) - base))
                rest &= ~inside
        others = lanes.where(rest)
        if others is not None:
            parts.append(("global", others, others.take(at)))
        return parts

    @staticmethod
    def address(lanes: Lanes, base: Any, offset: int) -> Array:
        """Each lane's ``base + offset``."""
        if np.ndim(base) == 0:
            return np.full(lanes.n, int(base) + offset, np.int64)
        at: Array = base.astype(np.int64)
        return at + offset if offset else at

    def load(self, lanes: Lanes, k: int, space: str, base: Any, offset: int, size: int,
             count: int, signed: bool = False) -> list[Array]:  # fmt: skip
        """``count`` values of ``size`` bytes per lane."""
        parts = self.parts(lanes, space, self.address(lanes, base, offset))
        if len(parts) == 1 and parts[0][1] is lanes:
            out = self._load_part(lanes, k, parts[0][0], parts[0][2], size, count)
        else:
            out = [np.zeros(lanes.n, BITS[size]) for _ in range(count)]
            for name, chosen, at in parts:
                for j, value in enumerate(self._load_part(chosen, k, name, at, size, count)):
                    out[j] = chosen.put(out[j], value)
        return [v.view(SIGNED[size]) for v in out] if signed else out

    def _load_part(self, lanes: Lanes, k: int, space: str, at: Array, size: int,
                   count: int) -> list[Array]:  # fmt: skip
        total = size * count
        if space == "shared":
            out = self.shared.load(lanes, k, at, size, count)
            self.counters.count_shared(self.line(k), lanes, at, total)
            return out
        if space == "local":
            view, row, column = self._local(lanes, k, at, size, count)
            return [view[row, column + j] for j in range(count)]
        out = [np.empty(lanes.n, BITS[size]) for _ in range(count)]
        for region, chosen in self.regions(lanes, k, at, total):
            there = lanes.part(chosen)
            where = there.take(at)
            start, view = region.elements(size)
            place = (where - start) // size
            for j in range(count):
                value = view[place + j]
                out[j] = value if chosen is None else there.put(out[j], value)
            if region is not self.params:
                self.counters.count_global(self.counters.loads, region.name, there, where, total)
        return out

    def store(self, lanes: Lanes, k: int, space: str, base: Any, offset: int, size: int,
              *values: Any) -> None:  # fmt: skip
        """Each lane's values to its address."""
        at = self.address(lanes, base, offset)
        total = size * len(values)
        whole = [np.broadcast_to(v, (lanes.n,)) for v in values]
        for name, chosen, where in self.parts(lanes, space, at):
            mine = whole if chosen is lanes else [chosen.take(v) for v in whole]
            if name == "shared":
                self.shared.store(chosen, k, where, size, mine)
                self.counters.count_shared(self.line(k), chosen, where, total)
            elif name == "local":
                view, row, column = self._local(chosen, k, where, size, len(values))
                for j, value in enumerate(mine):
                    view[row, column + j] = value
            else:
                self._store_global(chosen, k, where, size, mine)

    def _store_global(self, lanes: Lanes, k: int, at: Array, size: int,
                      values: list[Array]) -> None:  # fmt: skip
        total = size * len(values)
        for region, chosen in self.regions(lanes, k, at, total):
            there = lanes.part(chosen)
            if region.readonly:
                what = f"writes '{region.name}' ({region.what}), which is read-only"
                raise self.fail(OutOfBounds, int(there.index[0]), k, what)
            where = there.take(at)
            start, view = region.elements(size)
            place = (where - start) // size
            for j, value in enumerate(values):
                view[place + j] = there.take(value)
            self.counters.count_global(self.counters.stores, region.name, there, where, total)

    def regions(self, lanes: Lanes, k: int, at: Array, size: int) -> list[tuple[Region, Any]]:
        """The arrays that the addresses lie in, checked."""
        if (at & (size - 1)).any():
            i = int(np.flatnonzero(at & (size - 1))[0])
            what = f"{size}-byte access at address {int(at[i]):#x}"
            raise self.fail(Misaligned, int(lanes.index[i]), k, what)
        if int(at.min()) >= PARAM_BASE and int(at.max()) + size <= self.params.end:
            return [(self.params, None)]
        found = self.memory.split(at, size)
        if isinstance(found, int):
            what = f"{size}-byte access: {self.memory.describe(int(at[found]))}"
            raise self.fail(OutOfBounds, int(lanes.index[found]), k, what)
        return found

    def _local(self, lanes: Lanes, k: int, at: Array, size: int, count: int) -> tuple[Any, ...]:
        bad = (at < 0) | (at + size * count > self.flat.local_bytes)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            what = f"local address {int(at[i])}, of {self.flat.local_bytes} bytes"
            raise self.fail(OutOfBounds, int(lanes.index[i]), k, what)
        if (at & (size * count - 1)).any():
            i = int(np.flatnonzero(at & (size * count - 1))[0])
            raise self.fail(Misaligned, int(lanes.index[i]), k, f"local address {int(at[i])}")
        return self.local.view(BITS[size]), lanes.index, at // size

    def is_space(self, at: Array, space: str) -> Array:
        """Whether generic addresses are in a state space."""
        windows = {"shared": SHARED_BASE, "local": LOCAL_BASE, "param": PARAM_BASE}
        inside = {n: (at >= b) & (at < b + WINDOW) for n, b in windows.items()}
        name = space.split(":")[0]
        return inside[name] if name in inside else at >= np.uint64(GLOBAL_BASE)

    # cp.async

    def copy(self, lanes: Lanes, k: int, to: Any, to_offset: int, of: Any, of_offset: int,
             size: int, source: Any = None) -> None:  # fmt: skip
        """Start an asynchronous copy of ``size`` bytes, zeros past the first ``source`` ones."""
        target = self.address(lanes, to, to_offset)
        at = self.address(lanes, of, of_offset)
        taken = np.full(lanes.n, size) if source is None else np.broadcast_to(source, (lanes.n,))
        rows = np.zeros((lanes.n, size), np.uint8)
        unit = min(size, 8)
        for length in np.unique(taken):
            n = int(length)
            if n > size:
                what = f"copies {n} of {size} bytes"
                raise self.fail(OutOfBounds, int(lanes.index[0]), k, what)
            chosen = lanes.where(taken == n) if n else None
            if chosen is None:
                continue
            part, width = chosen.take(at), unit if n == size else 1
            if n == size:
                words = self._load_part(chosen, k, "global", part, unit, size // unit)
            else:
                words = [self._load_part(chosen, k, "global", part + j, 1, 1)[0] for j in range(n)]
            filled = np.stack(words, axis=1).view(np.uint8)[:, : n if width == 1 else size]
            if chosen.within is None:
                rows[:, :n] = filled
            else:
                rows[chosen.within, :n] = filled
        self.shared.copy(lanes, k, target, rows)
        self.counters.count_shared(self.line(k), lanes, target, size)

    def count_instructions(self, executed: Array) -> None:
        """Add each block's instructions times the warps that executed it."""
        total: Counter[str] = Counter()
        for block, times in zip(self.flat.blocks, executed.tolist(), strict=True):
            if times:
                for k in [*block.body, *([] if block.end is None else [block.end])]:
                    i = self.flat.instructions[k]
                    total[".".join((i.op, *i.mods))] += times
        self.counters.instructions += total
