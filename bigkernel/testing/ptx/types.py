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

BOOL: DType = np.dtype(np.bool_)
U8: DType = np.dtype(np.uint8)
U16: DType = np.dtype(np.uint16)
U32: DType = np.dtype(np.uint32)
U64: DType = np.dtype(np.uint64)
S8: DType = np.dtype(np.int8)
S16: DType = np.dtype(np.int16)
S32: DType = np.dtype(np.int32)
S64: DType = np.dtype(np.int64)
F16: DType = np.dtype(np.float16)
F32: DType = np.dtype(np.float32)
F64: DType = np.dtype(np.float64)

DTYPES: dict[str, DType] = {
    "pred": BOOL,
    **{"b8": U8, "u8": U8, "s8": S8, "b16": U16, "u16": U16, "s16": S16},
    **{"b32": U32, "u32": U32, "s32": S32, "b64": U64, "u64": U64, "s64": S64},
    **{"f16": F16, "f32": F32, "f64": F64, "bf16": U16, "tf32": F32},
    **{"f16x2": F16, "bf16x2": U16, "u16x2": U16, "s16x2": S16},
}
PACKED = {"f16x2", "bf16x2", "u16x2", "s16x2"}
FLOATS = {"f16", "f32", "f64", "bf16", "f16x2", "bf16x2", "tf32"}
BITS = {1: U8, 2: U16, 4: U32, 8: U64}
SIGNED = {1: S8, 2: S16, 4: S32, 8: S64}
# Bits of the significand, exponent of the least value, the largest value.
FORMATS = {
    "f16": (11, -24, 65504.0),
    "bf16": (8, -133, float(np.uint32(0x7F7F0000).view(F32))),
    "f32": (24, -149, float(np.finfo(F32).max)),
}


def size_of(type_: str) -> int:
    """Bytes of one value; a predicate counts as 1."""
    return 4 if type_ in PACKED else DTYPES[type_].itemsize


def canonical(type_: str) -> DType:
    """The dtype in which the register file keeps a register declared with this type."""
    return DTYPES[type_] if type_ in ("f32", "f64", "pred") else BITS[max(2, size_of(type_))]
