"""Atomic updates of global and shared memory (PTX ISA, "Parallel Synchronization": atom, red)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bigkernel.testing.ptx.lanes import Lanes
from bigkernel.testing.ptx.machine import Machine
from bigkernel.testing.ptx.numerics import bf16_to_f32, round_to
from bigkernel.testing.ptx.types import BITS, DTYPES, PACKED, Array, size_of


def update(m: Machine, lanes: Lanes, k: int, space: str, base: Any, offset: int, op: str,
           type_: str, keep: bool, *values: Any) -> list[Array]:  # fmt: skip
    """One atomic update per lane, in lane order; the values found."""
    size = size_of(type_)
    out = np.zeros(lanes.n, BITS[size])
    whole = [np.broadcast_to(v, (lanes.n,)) for v in values]
    for name, chosen, at in m.parts(lanes, space, m.address(lanes, base, offset)):
        mine = whole if chosen is lanes else [chosen.take(v) for v in whole]
        if name == "shared":
            m.shared.touch_atomic(chosen, k, at, size)
            m.counters.shared_atomics += chosen.n
            view = m.shared.data.view(BITS[size])
            place = (chosen.block * m.shared.stride + at) // size
            out = chosen.put(out, _update(view, place, op, type_, keep, mine))
            continue
        m.counters.global_atomics += chosen.n
        for region, part in m.regions(chosen, k, at, size):
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
