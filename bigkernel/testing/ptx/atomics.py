"""Atomic updates of global and shared memory (PTX ISA, "Parallel Synchronization": atom, red)."""

from __future__ import annotations

from typing import Any

import numpy as np

from bigkernel.testing.ptx.lanes import Lanes
from bigkernel.testing.ptx.machine import Machine
from bigkernel.testing.ptx.numerics import bf16_to_f32, round_to
from bigkernel.testing.ptx.types import BITS, DTYPES, PACKED, Array, size_of

_UFUNCS: dict[str, Any] = {
    "add": np.add, "min": np.fmin, "max": np.fmax,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def update(m: Machine, lanes: Lanes, k: int, space: str, at: Array, op: str, type_: str,
           keep: bool, *values: Array) -> list[Array]:  # fmt: skip
    """One atomic update per lane, in lane order; the values found, where they are kept."""
    size = size_of(type_)
    out = np.zeros(lanes.n, BITS[size])
    for some, view, place, _ in m.access("atomic", lanes, k, space, at, size):
        mine = [some.take(value) for value in values]
        if not keep and op in _UFUNCS and size >= 4 and type_ not in PACKED:
            dtype = DTYPES[type_]
            _UFUNCS[op].at(view.view(dtype), place, mine[0].view(dtype))
        else:
            out = some.put(out, _one_by_one(view, place, op, type_, mine))
    return [out] if keep else []


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
