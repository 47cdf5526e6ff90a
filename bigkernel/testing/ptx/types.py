"""PTX's types as numpy dtypes.

A register is one numpy array with a lane per thread, kept as bits: bool for predicates, else
uint16, uint32 or uint64 (PTX ISA, "Types, State Spaces, and Variables"). An instruction sees those
bits through a view of its own type. Packed types are views of twice the length; bf16 has no numpy
dtype and stays uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DType = np.dtype[Any]

DTYPES: dict[str, DType] = {
    f"{letter}{8 * size}": np.dtype(f"{kind}{size}")
    for letter, kind in (("b", "u"), ("u", "u"), ("s", "i"))
    for size in (1, 2, 4, 8)
}
BITS = {size: DTYPES[f"b{8 * size}"] for size in (1, 2, 4, 8)}
SIGNED = {size: DTYPES[f"s{8 * size}"] for size in (1, 2, 4, 8)}
DTYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
DTYPES |= {"pred": np.dtype("?"), "bf16": BITS[2], "tf32": DTYPES["f32"]}
DTYPES |= {f"{t}x2": DTYPES[t] for t in ("f16", "bf16", "u16", "s16")}
PACKED = {"f16x2", "bf16x2", "u16x2", "s16x2"}
FLOATS = {"f16", "f32", "f64", "bf16", "f16x2", "bf16x2", "tf32"}
# Bits of the significand, exponent of the least value, the largest value.
FORMATS = {
    "f16": (11, -24, 65504.0),
    "bf16": (8, -133, float(np.uint32(0x7F7F0000).view(np.float32))),
    "f32": (24, -149, float(np.finfo(np.float32).max)),
}


def size_of(type_: str) -> int:
    """Bytes of one value; a predicate counts as 1."""
    return 4 if type_ in PACKED else DTYPES[type_].itemsize


def canonical(type_: str) -> DType:
    """The dtype in which the register file keeps a register declared with this type."""
    return DTYPES[type_] if type_ in ("f32", "f64", "pred") else BITS[max(2, size_of(type_))]
