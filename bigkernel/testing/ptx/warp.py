"""Warp-wide instructions: shuffles, votes, reductions, matrix products and matrix loads."""

from __future__ import annotations

from typing import Any

import numpy as np

from bigkernel.testing.ptx.errors import BarrierError
from bigkernel.testing.ptx.lanes import WARP, Lanes
from bigkernel.testing.ptx.machine import Machine
from bigkernel.testing.ptx.numerics import bf16_to_f32
from bigkernel.testing.ptx.types import F16, F32, U32, Array

_ALL = np.uint64(0xFFFFFFFF)


def check_members(m: Machine, lanes: Lanes, k: int, mask: Array) -> None:
    """All living threads that the member mask names are here ("Parallel Synchronization")."""
    if lanes.full:
        return
    here = _ballot(m, lanes, np.ones(lanes.n, bool))
    alive = _ballot(m, m.everyone, m.alive)[lanes.index]
    members = np.broadcast_to(mask, (lanes.n,)).astype(np.uint64)
    absent = members & alive & ~here
    if absent.any():
        i = int(np.flatnonzero(absent)[0])
        raise m.fail(
            BarrierError,
            int(lanes.index[i]),
            k,
            f"member mask {int(members[i]):#x} names lanes {int(absent[i]):#x} of the warp, "
            "which do not execute this instruction",
        )


def _ballot(m: Machine, lanes: Lanes, predicate: Array) -> Array:
    """For each lane the bits of its warp's lanes here whose predicate holds."""
    bits = np.zeros(m.layout.lanes, np.uint64)
    at = lanes.index % WARP
    bits[lanes.index] = predicate.astype(np.uint64) << at.astype(np.uint64)
    sums = np.bitwise_or.reduce(bits.reshape(-1, WARP), axis=1)
    return sums[lanes.index // WARP]


def active(m: Machine, lanes: Lanes) -> list[Array]:
    """PTX ISA, "activemask": the bits of the warp's lanes that are here."""
    return [_ballot(m, lanes, np.ones(lanes.n, bool)).astype(U32)]


def elect(m: Machine, lanes: Lanes) -> list[Array]:
    """PTX ISA, "elect.sync": the lowest lane here, and whether it is this one."""
    bits = active(m, lanes)[0].astype(np.int64)
    leader = np.bitwise_count((bits & -bits) - 1).astype(U32)
    return [leader, leader == lanes.index % WARP]


def barrier(m: Machine, lanes: Lanes, k: int, mask: Any) -> None:
    """PTX ISA, "bar.warp.sync", which orders memory among the warp's threads."""
    check_members(m, lanes, k, mask)
    m.shared.advance(lanes.block, lanes.warp)


def shfl(m: Machine, lanes: Lanes, k: int, mode: str, value: Array, b: Array, c: Array,
         mask: Array) -> tuple[Array, Array]:  # fmt: skip
    """PTX ISA, "Data Movement: shfl.sync": (value, whether the source is in range)."""
    check_members(m, lanes, k, mask)
    lane = (lanes.index % WARP).astype(np.int64)
    b, c = np.asarray(b).astype(np.int64) & 31, np.asarray(c).astype(np.int64)
    segment, clamp = (c >> 8) & 31, c & 31
    top, bottom = (lane & segment) | (clamp & ~segment), lane & segment
    moved = {"up": lane - b, "down": lane + b, "bfly": lane ^ b}
    j = moved.get(mode, bottom | (b & ~segment))
    inside = j >= top if mode == "up" else j <= top
    source = lanes.index - lane + np.where(inside, j, lane)
    everywhere = np.zeros(m.layout.lanes, value.dtype)
    everywhere[lanes.index] = value
    if not lanes.full:
        here = np.zeros(m.layout.lanes, bool)
        here[lanes.index] = True
        if not here[source].all():
            i = int(np.flatnonzero(~here[source])[0])
            raise m.fail(
                BarrierError, int(lanes.index[i]), k,
                f"reads from lane {int(source[i]) % WARP}, which does not execute the shuffle",
            )  # fmt: skip
    return everywhere[source], np.broadcast_to(inside, (lanes.n,))


def vote(m: Machine, lanes: Lanes, k: int, mode: str, predicate: Array,
         mask: Array) -> list[Array]:  # fmt: skip
    """PTX ISA, "Parallel Synchronization: vote.sync": ballot bits, or a predicate."""
    check_members(m, lanes, k, mask)
    predicate = np.broadcast_to(predicate, (lanes.n,))
    members = np.asarray(mask).astype(np.uint64)
    yes = _ballot(m, lanes, predicate) & members
    if mode == "ballot":
        return [yes.astype(U32)]
    no = _ballot(m, lanes, ~predicate) & members
    return [{"any": yes != 0, "all": no == 0, "uni": (yes == 0) | (no == 0)}[mode]]


def match(m: Machine, lanes: Lanes, k: int, mode: str, value: Array, mask: Array) -> list[Array]:
    """PTX ISA, "Parallel Synchronization: match.sync": lanes with that value (, whether all)."""
    check_members(m, lanes, k, mask)
    rows = np.zeros((m.layout.lanes // WARP, WARP), value.dtype)
    rows.reshape(-1)[lanes.index] = value
    here = np.zeros(rows.shape, bool)
    here.reshape(-1)[lanes.index] = True
    same = (rows[:, :, None] == rows[:, None, :]) & here[:, None, :]
    bits = (same.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(2, dtype=np.uint64)
    members = np.asarray(mask).astype(np.uint64)
    found = bits.reshape(-1)[lanes.index] & members
    if mode == "any":
        return [found.astype(U32)]
    every = found == (_ballot(m, lanes, np.ones(lanes.n, bool)) & members)
    return [np.where(every, found, 0).astype(U32), every]


def redux(m: Machine, lanes: Lanes, k: int, op: str, value: Array, mask: Array) -> list[Array]:
    """PTX ISA, "Parallel Synchronization: redux.sync"."""
    check_members(m, lanes, k, mask)
    ufunc = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[op]  # fmt: skip
    info = np.iinfo(value.dtype)
    neutral = {"min": info.max, "max": info.min, "and": -1 if info.min else info.max}.get(op, 0)
    out = np.empty_like(value)
    masks = np.broadcast_to(mask, (lanes.n,)).astype(np.uint64)
    for one in np.unique(masks):
        rows = np.full(m.layout.lanes, neutral, value.dtype)
        chosen = masks == one
        rows[lanes.index[chosen]] = value[chosen]
        sums = ufunc.reduce(rows.reshape(-1, WARP), axis=1, dtype=value.dtype)
        out[chosen] = sums[lanes.index[chosen] // WARP]
    return [out]


def _whole(m: Machine, lanes: Lanes, k: int) -> int:
    """The number of warps, which must be whole (.aligned)."""
    if not lanes.whole_warps:
        raise m.fail(BarrierError, int(lanes.index[0]), k, "not all threads of the warp are here")
    return lanes.n // WARP


# Fragments (PTX ISA, "Warp-Level Matrix Instructions: mma"): lane 4g + t, with g the row (of A and
# C) or column (of B), holds neighbouring pairs 2t, 2t + 1; further registers are 8 rows down, then
# half of k on.


def widen(kind: str, registers: tuple[Array, ...]) -> Array:
    """Registers of one lane each -> [warps, g, t, register, element of the register]."""
    words = np.stack(registers, axis=1)
    if kind == "tf32":
        values = (words & np.uint32(0xFFFFE000)).view(F32)  # the unit ignores the low 13 bits
        return values.reshape(-1, 8, 4, len(registers), 1)
    if kind == "bf16":
        return bf16_to_f32(words.view(np.uint16)).reshape(-1, 8, 4, len(registers), 2)
    return words.view(F16).astype(F32).reshape(-1, 8, 4, len(registers), 2)


def fragment_a(kind: str, *registers: Array) -> Array:
    """A [warps, 16, k]."""
    x = widen(kind, registers)
    warps, halves, pair = len(x), len(registers) // 2, x.shape[-1]
    x = x.reshape(warps, 8, 4, halves, 2, pair).transpose(0, 4, 1, 3, 2, 5)
    return np.ascontiguousarray(x).reshape(warps, 16, halves * 4 * pair)


def fragment_b(kind: str, *registers: Array) -> Array:
    """B [warps, k, 8]."""
    x = widen(kind, registers)
    return np.ascontiguousarray(x.transpose(0, 3, 2, 4, 1)).reshape(len(x), -1, 8)


def mma(m: Machine, lanes: Lanes, k: int, a: Array, b: Array, c: tuple[Array, ...],
        half: bool) -> list[Array]:  # fmt: skip
    """PTX ISA, "mma.sync.aligned.m16n8k*": A B + C, products exact, sums in float32."""
    warps = _whole(m, lanes, k)
    product = np.matmul(a, b).reshape(warps, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)
    if half:  # C and D are two registers of f16x2
        old = np.stack(c, axis=1).view(F16).reshape(warps, 8, 4, 2, 2)
        new = np.ascontiguousarray((product + old).astype(F16)).view(U32).reshape(-1, 2)
        return [np.ascontiguousarray(new[:, j]) for j in range(2)]
    flat = product.reshape(-1, 4)
    return [flat[:, j] + c[j] for j in range(4)]


def ldmatrix(m: Machine, lanes: Lanes, k: int, base: Any, offset: int, count: int,
             trans: bool) -> list[Array]:  # fmt: skip
    """PTX ISA, "ldmatrix.sync.m8n8.x{count}{.trans}"; lane 8j + i gives row i of matrix j."""
    warps = _whole(m, lanes, k)
    givers = lanes.where(lanes.index % WARP < 8 * count)
    assert givers is not None
    where = givers.take(m.address(lanes, base, offset))
    words = m.shared.load(givers, k, where, 4, 4)
    m.counters.count_shared(m.line(k), givers, where, 16)
    tiles = np.stack(words, axis=1).view(np.uint16).reshape(warps, count, 8, 8)
    if trans:
        tiles = np.ascontiguousarray(tiles.transpose(0, 1, 3, 2))
    rows = tiles.view(U32).reshape(warps, count, WARP)
    return [np.ascontiguousarray(rows[:, j]).reshape(-1) for j in range(count)]


def stmatrix(m: Machine, lanes: Lanes, k: int, base: Any, offset: int, trans: bool,
             *values: Array) -> None:  # fmt: skip
    """PTX ISA, "stmatrix.sync.aligned.m8n8.x{n}{.trans}.b16", ldmatrix the other way round."""
    warps, count = _whole(m, lanes, k), len(values)
    givers = lanes.where(lanes.index % WARP < 8 * count)
    assert givers is not None
    rows = np.stack([v.reshape(warps, WARP) for v in values], axis=1)
    tiles = np.ascontiguousarray(rows).view(np.uint16).reshape(warps, count, 8, 8)
    if trans:
        tiles = np.ascontiguousarray(tiles.transpose(0, 1, 3, 2))
    words = tiles.view(U32).reshape(-1, 4)
    where = givers.take(m.address(lanes, base, offset))
    m.shared.store(givers, k, where, 4, [words[:, j] for j in range(4)])
    m.counters.count_shared(m.line(k), givers, where, 16)
