"""A batch of blocks: registers, memories, and what instructions do to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigkernel.testing.ptx import warp
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
from bigkernel.testing.ptx.numerics import bf16_to_f32, round_to
from bigkernel.testing.ptx.program import Flat
from bigkernel.testing.ptx.shared import Shared
from bigkernel.testing.ptx.types import (
    BITS,
    DTYPES,
    PACKED,
    SIGNED,
    Array,
    size_of,
)
from bigkernel.testing.ptx.writer import Piece, canonical

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

    def _parts(self, lanes: Lanes, space: str, at: Array) -> list[tuple[str, Lanes, Array]]:
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
    def _address(lanes: Lanes, base: Any, offset: int) -> Array:
        if np.ndim(base) == 0:
            return np.full(lanes.n, int(base) + offset, np.int64)
        at: Array = base.astype(np.int64)
        return at + offset if offset else at

    def load(self, lanes: Lanes, k: int, space: str, base: Any, offset: int, size: int,
             count: int, signed: bool = False) -> list[Array]:  # fmt: skip
        """``count`` values of ``size`` bytes per lane."""
        parts = self._parts(lanes, space, self._address(lanes, base, offset))
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
        for region, chosen in self._regions(lanes, k, at, total):
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
        at = self._address(lanes, base, offset)
        total = size * len(values)
        whole = [np.broadcast_to(v, (lanes.n,)) for v in values]
        for name, chosen, where in self._parts(lanes, space, at):
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
        for region, chosen in self._regions(lanes, k, at, total):
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

    def _regions(self, lanes: Lanes, k: int, at: Array, size: int) -> list[tuple[Region, Any]]:
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

    # Atomics

    def atomic(self, lanes: Lanes, k: int, space: str, base: Any, offset: int, op: str, type_: str,
               keep: bool, *values: Any) -> list[Array]:  # fmt: skip
        """One atomic update per lane, in lane order; the values found."""
        size = size_of(type_)
        out = np.zeros(lanes.n, BITS[size])
        whole = [np.broadcast_to(v, (lanes.n,)) for v in values]
        for name, chosen, at in self._parts(lanes, space, self._address(lanes, base, offset)):
            mine = whole if chosen is lanes else [chosen.take(v) for v in whole]
            if name == "shared":
                self.shared.touch_atomic(chosen, k, at, size)
                self.counters.shared_atomics += chosen.n
                view = self.shared.data.view(BITS[size])
                place = (chosen.block * self.shared.stride + at) // size
                out = chosen.put(out, _update(view, place, op, type_, keep, mine))
                continue
            self.counters.global_atomics += chosen.n
            for region, part in self._regions(chosen, k, at, size):
                take: Callable[[Array], Array] = lambda v, p=part: v if p is None else v[p]  # type: ignore[misc]  # noqa: E731
                start, view = region.elements(size)
                found = _update(view, (take(at) - start) // size, op, type_, keep,
                                [take(v) for v in mine])  # fmt: skip
                if chosen is lanes and part is None:
                    out = found
                else:
                    where = np.arange(lanes.n) if chosen.within is None else chosen.within
                    out[take(where)] = found
        return [out]

    # cp.async

    def copy(self, lanes: Lanes, k: int, to: Any, to_offset: int, of: Any, of_offset: int,
             size: int, source: Any = None) -> None:  # fmt: skip
        """Start an asynchronous copy of ``size`` bytes, zeros past the first ``source`` ones."""
        target = self._address(lanes, to, to_offset)
        at = self._address(lanes, of, of_offset)
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

    def commit(self, lanes: Lanes) -> None:
        """cp.async.commit_group."""
        self.shared.commit(lanes)

    def wait(self, lanes: Lanes, groups_left: int) -> None:
        """cp.async.wait_group, wait_all."""
        self.shared.wait(lanes, groups_left)

    # Warps

    def bar_warp(self, lanes: Lanes, k: int, mask: Any) -> None:
        """bar.warp.sync orders memory among the warp's threads."""
        warp.check_members(self, lanes, k, mask)
        self.shared.advance(lanes.block, lanes.warp)

    def shfl(self, lanes: Lanes, k: int, mode: str, *args: Any) -> tuple[Array, Array]:
        """shfl.sync."""
        return warp.shfl(self, lanes, k, mode, *args)

    def vote(self, lanes: Lanes, k: int, mode: str, *args: Any) -> list[Array]:
        """vote.sync."""
        return [warp.vote(self, lanes, k, mode, *args)]

    def match(self, lanes: Lanes, k: int, mode: str, *args: Any) -> list[Array]:
        """match.sync."""
        return warp.match(self, lanes, k, mode, *args)

    def redux(self, lanes: Lanes, k: int, op: str, *args: Any) -> list[Array]:
        """redux.sync."""
        return [warp.redux(self, lanes, k, op, *args)]

    def activemask(self, lanes: Lanes) -> list[Array]:
        """The warp's lanes that are here."""
        return [warp.active(self, lanes)]

    def elect(self, lanes: Lanes) -> list[Array]:
        """The lowest lane here, and whether it is this one."""
        bits = warp.active(self, lanes).astype(np.int64)
        leader = np.bitwise_count((bits & -bits) - 1).astype(np.uint32)
        return [leader, leader == lanes.index % 32]

    def ldmatrix(self, lanes: Lanes, k: int, base: Any, offset: int, count: int,
                 trans: bool) -> list[Array]:  # fmt: skip
        """ldmatrix."""
        return warp.ldmatrix(self, lanes, k, self._address(lanes, base, offset), count, trans)

    def stmatrix(self, lanes: Lanes, k: int, base: Any, offset: int, trans: bool,
                 *values: Array) -> None:  # fmt: skip
        """stmatrix."""
        at = self._address(lanes, base, offset)
        warp.stmatrix(self, lanes, k, at, trans, list(values))

    def count_instructions(self, executed: Array) -> None:
        """Add each block's instructions times the warps that executed it."""
        total: Counter[str] = Counter()
        for block, times in zip(self.flat.blocks, executed.tolist(), strict=True):
            if times:
                for k in [*block.body, *([] if block.end is None else [block.end])]:
                    i = self.flat.instructions[k]
                    total[".".join((i.op, *i.mods))] += times
        self.counters.instructions += total


def _update(view: Array, place: Array, op: str, type_: str, keep: bool,
            values: list[Array]) -> Array:  # fmt: skip
    """Update view[place] once per entry, in order; what each found."""
    dtype = DTYPES[type_]
    direct = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
              "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip
    out = np.zeros(len(place), view.dtype)
    if not keep and op in direct and size_of(type_) >= 4 and type_ not in PACKED:
        direct[op].at(view.view(dtype), place, values[0].view(dtype))  # type: ignore[attr-defined]
        return out
    left = np.arange(len(place))
    while len(left):
        _, first = np.unique(place[left], return_index=True)
        now = left[first]
        old = view[place[now]]
        out[now] = old
        view[place[now]] = _combine(op, type_, old, [v[now] for v in values])
        left = np.delete(left, first)
    return out


def _combine(op: str, type_: str, old: Array, values: list[Array]) -> Array:
    """The new bits ("Parallel Synchronization: atom")."""
    dtype = DTYPES[type_]
    a, b = np.ascontiguousarray(old).view(dtype), np.ascontiguousarray(values[0]).view(dtype)
    if op == "exch":
        return values[0]
    if op == "cas":
        return np.where(old == values[0], values[1], old)
    if op in ("inc", "dec"):
        up = np.where(a >= b, a.dtype.type(0), a + a.dtype.type(1))
        down = np.where((a == 0) | (a > b), b, a - a.dtype.type(1))
        return up if op == "inc" else down
    if type_.startswith("bf16"):
        x, y = bf16_to_f32(a), bf16_to_f32(b)
        wide = {"add": np.add, "min": np.fmin, "max": np.fmax}[op](x, y)
        return round_to(wide, "bf16").view(old.dtype)
    new: Array = {
        "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "min": np.fmin, "max": np.fmax,
    }[op](a, b)  # fmt: skip
    return new.view(old.dtype)
