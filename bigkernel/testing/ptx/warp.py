"""Warp-wide instructions: shuffles, votes, reductions, matrix products and matrix loads."""

from __future__ import annotations

import numpy as np

from bigkernel.testing.ptx.errors import BarrierError
from bigkernel.testing.ptx.lanes import WARP, Lanes
from bigkernel.testing.ptx.machine import Machine
from bigkernel.testing.ptx.numerics import bf16_to_f32
from bigkernel.testing.ptx.types import Array


def _ballot(lanes: Lanes, predicate: Array) -> Array:
    """For each lane the bits of its warp's lanes here whose predicate holds."""
    bits = predicate.astype(np.uint64) << (lanes.index % WARP).astype(np.uint64)
    return np.bitwise_or.reduce(lanes.by_warp(bits), axis=1)[lanes.row]


def _here(lanes: Lanes) -> Array:
    return _ballot(lanes, np.ones(lanes.n, bool))


def _check_members(m: Machine, lanes: Lanes, k: int, mask: Array) -> None:
    """All living threads that the member mask names are here ("Parallel Synchronization")."""
    if lanes.full:
        return
    alive = _ballot(m.everyone, m.alive)[lanes.index]
    absent = mask & alive & ~_here(lanes)
    if absent.any():
        i = int(np.flatnonzero(absent)[0])
        what = (f"member mask {int(mask[i]):#x} names lanes {int(absent[i]):#x} of the warp, "
                "which do not execute this instruction")  # fmt: skip
        raise m.fail(BarrierError, lanes.index[i], k, what)


# Each takes the instruction's number and mode, its operands, last the member mask.


def activemask(m: Machine, lanes: Lanes, k: int, mode: str) -> list[Array]:
    """PTX ISA, "activemask": the bits of the warp's lanes that are here."""
    return [_here(lanes).astype(np.uint32)]


def elect(m: Machine, lanes: Lanes, k: int, mode: str, mask: Array) -> list[Array]:
    """PTX ISA, "elect.sync": the lowest lane here, and whether it is this one."""
    _check_members(m, lanes, k, mask)
    bits = _here(lanes).astype(np.int64)
    leader = np.bitwise_count((bits & -bits) - 1).astype(np.uint32)
    return [leader, leader == lanes.index % WARP]


def bar(m: Machine, lanes: Lanes, k: int, mode: str, mask: Array) -> None:
    """PTX ISA, "bar.warp.sync", which orders memory among the warp's threads."""
    _check_members(m, lanes, k, mask)
    m.shared.advance(lanes.block, lanes.warp)


def shfl(m: Machine, lanes: Lanes, k: int, mode: str, value: Array, b: Array, c: Array,
         mask: Array) -> list[Array]:  # fmt: skip
    """PTX ISA, "Data Movement: shfl.sync": the value, and whether the source is in range."""
    _check_members(m, lanes, k, mask)
    lane = lanes.index % WARP
    b, segment, clamp = (x.astype(np.int64) & 31 for x in (b, c >> 8, c))
    top, bottom = (lane & segment) | (clamp & ~segment), lane & segment
    moved = {"up": lane - b, "down": lane + b, "bfly": lane ^ b}
    j = moved.get(mode, bottom | (b & ~segment))
    inside = j >= top if mode == "up" else j <= top
    source = np.where(inside, j, lane)
    absent = _here(lanes) >> source.astype(np.uint64) & np.uint64(1) == 0
    if absent.any():
        i = int(np.flatnonzero(absent)[0])
        what = f"reads from lane {source[i]}, which does not execute the shuffle"
        raise m.fail(BarrierError, lanes.index[i], k, what)
    return [lanes.by_warp(value)[lanes.row, source], inside]


def vote(m: Machine, lanes: Lanes, k: int, mode: str, predicate: Array,
         mask: Array) -> list[Array]:  # fmt: skip
    """PTX ISA, "Parallel Synchronization: vote.sync": ballot bits, or a predicate."""
    _check_members(m, lanes, k, mask)
    yes, no = (_ballot(lanes, p) & mask for p in (predicate, ~predicate))
    if mode == "ballot":
        return [yes.astype(np.uint32)]
    return [{"any": yes != 0, "all": no == 0, "uni": (yes == 0) | (no == 0)}[mode]]


def match(m: Machine, lanes: Lanes, k: int, mode: str, value: Array, mask: Array) -> list[Array]:
    """PTX ISA, "Parallel Synchronization: match.sync": lanes with that value (, whether all)."""
    _check_members(m, lanes, k, mask)
    rows = lanes.by_warp(value)
    same = rows[:, :, None] == rows[:, None, :]
    bits = (same.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(2, dtype=np.uint64)
    members = _here(lanes) & mask
    found = bits[lanes.row, lanes.index % WARP] & members
    every = found == members
    return [(found if mode == "any" else np.where(every, found, 0)).astype(np.uint32), every]


def redux(m: Machine, lanes: Lanes, k: int, mode: str, value: Array, mask: Array) -> list[Array]:
    """PTX ISA, "Parallel Synchronization: redux.sync"."""
    _check_members(m, lanes, k, mask)
    ufunc = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[mode]  # fmt: skip
    info = np.iinfo(value.dtype)
    neutral = {"min": info.max, "max": info.min, "and": -1 if info.min else info.max}.get(mode, 0)
    out = np.empty_like(value)
    for one in np.unique(mask):  # a warp may hold several groups
        group = lanes.where(mask == one)
        assert group is not None
        rows = group.by_warp(group.take(value), int(neutral))
        out = group.put(out, ufunc.reduce(rows, axis=1, dtype=value.dtype)[group.row])
    return [out]


def _whole(m: Machine, lanes: Lanes, k: int) -> int:
    """The number of warps, which must be whole (.aligned)."""
    if lanes.n != WARP * lanes.warp_count:
        raise m.fail(BarrierError, lanes.index[0], k, "not all threads of the warp are here")
    return lanes.n // WARP


# Fragments (PTX ISA, "Warp-Level Matrix Instructions: mma"): lane 4g + t, with g the row (of A and
# C) or column (of B), holds neighbouring pairs 2t, 2t + 1; further registers are 8 rows down, then
# half of k on.


def widen(kind: str, registers: tuple[Array, ...]) -> Array:
    """Registers of one lane each -> [warps, g, t, register, element of the register]."""
    words = np.stack(registers, axis=1)
    if kind == "tf32":  # the unit ignores the low 13 bits
        values = (words & 0xFFFFE000).view(np.float32)
    elif kind == "bf16":
        values = bf16_to_f32(words.view(np.uint16))
    else:
        values = words.view(np.float16).astype(np.float32)
    return values.reshape(len(words) // WARP, 8, 4, len(registers), -1)


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


def mma(m: Machine, lanes: Lanes, k: int, a: Array, b: Array, c: tuple[Array, ...]) -> list[Array]:
    """PTX ISA, "mma.sync.aligned.m16n8k*": A B + C, products exact, sums in float32."""
    warps = _whole(m, lanes, k)
    product = np.matmul(a, b).reshape(warps, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)
    if len(c) == 2:  # C and D are two registers of f16x2
        old = np.stack(c, axis=1).view(np.float16).reshape(warps, 8, 4, 2, 2)
        new = np.ascontiguousarray((product + old).astype(np.float16)).view(np.uint32)
        return list(np.ascontiguousarray(new.reshape(-1, 2).T))
    flat = product.reshape(-1, 4)
    return [flat[:, j] + c[j] for j in range(4)]


# ldmatrix and stmatrix (PTX ISA, "ldmatrix.sync.m8n8.x{count}{.trans}"): lane 8j + i has the
# address of row i of matrix j.


def ldmatrix(m: Machine, lanes: Lanes, k: int, at: Array, count: int,
             trans: bool) -> list[Array]:  # fmt: skip
    """``count`` matrices; lane 4r + c gets row r's elements 2c and 2c + 1 of each."""
    warps = _whole(m, lanes, k)
    givers = lanes.where(lanes.index % WARP < 8 * count)
    assert givers is not None
    words = m.load(givers, k, "shared", givers.take(at), 4, 4)
    tiles = np.stack(words, axis=1).view(np.uint16).reshape(warps, count, 8, 8)
    if trans:
        tiles = np.ascontiguousarray(tiles.transpose(0, 1, 3, 2))
    rows = tiles.view(np.uint32).reshape(warps, count, WARP)
    return list(np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(count, -1))


def stmatrix(m: Machine, lanes: Lanes, k: int, at: Array, trans: bool,
             *values: Array) -> None:  # fmt: skip
    """The same the other way round."""
    warps, count = _whole(m, lanes, k), len(values)
    givers = lanes.where(lanes.index % WARP < 8 * count)
    assert givers is not None
    rows = np.stack([v.reshape(warps, WARP) for v in values], axis=1)
    tiles = rows.view(np.uint16).reshape(warps, count, 8, 8)
    if trans:
        tiles = np.ascontiguousarray(tiles.transpose(0, 1, 3, 2))
    words = tiles.view(np.uint32).reshape(-1, 4)
    m.store(givers, k, "shared", givers.take(at), 4, *words.T)
