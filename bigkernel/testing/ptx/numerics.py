"""The arithmetic that numpy lacks: roundings, fma, bit fields, saturation, conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bigkernel.testing.ptx.types import (
    BITS,
    DTYPES,
    F32,
    F64,
    FORMATS,
    S8,
    S64,
    U8,
    U16,
    U32,
    U64,
    Array,
    DType,
)


def ftz(x: Array) -> Array:
    """Subnormal float32 values become zeros of the same sign (modifier ``.ftz``)."""
    tiny = np.abs(x) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(np.float32(0), x), x) if tiny.any() else x


def odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64 rounded to odd, so that one more rounding to a shorter type is exact.

    Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008.
    """
    s = a + b
    bb = s - a
    error = (a - (s - bb)) + (b - bb)
    fix = (error != 0) & ((s.view(U64) & np.uint64(1)) == 0) & np.isfinite(s)
    if fix.any():
        s = np.where(fix, np.nextafter(s, np.copysign(np.inf, error)), s)
    return s


_ROUND = {"rn": np.rint, "rz": np.trunc, "rm": np.floor, "rp": np.ceil}


def round_to(x: Array, type_: str, mode: str = "rn") -> Array:
    """float32 or float64 values -> values of ``type_`` ("f16", "bf16", "f32", "f64").

    mode: "rn" to nearest even, "rz" towards zero, "rm" down, "rp" up (PTX ISA, "Rounding
    Modifiers").
    """
    if type_ != "bf16" and (mode == "rn" or DTYPES[type_].itemsize >= x.itemsize):
        return x.astype(DTYPES[type_])
    if mode == "rn" and x.dtype == F32:
        u = x.view(U32)
        u = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = np.isnan(x)
        return np.where(nan, np.uint16(0x7FFF), u.astype(U16)) if nan.any() else u.astype(U16)
    wide = x.astype(F64)
    bits, least, largest = FORMATS[type_]
    unit = np.maximum(np.frexp(wide)[1] - bits, least)  # log2 of the last place
    rounded = np.ldexp(_ROUND[mode](np.ldexp(wide, -unit)), unit)
    inward = {"rn": False, "rz": True, "rm": wide > 0, "rp": wide < 0}[mode] & np.isfinite(wide)
    rounded = np.where(inward, np.clip(rounded, -largest, largest), rounded)
    return round_to(rounded.astype(F32), type_)  # now exact


def bf16_to_f32(x: Array) -> Array:
    """Bits of bf16 -> the same values in float32 (exact)."""
    return (x.astype(U32) << np.uint32(16)).view(F32)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float32 or float64 with one rounding to nearest."""
    if np.result_type(a, b, c) == F64:
        return _fma_f64(a, b, c)
    product = np.multiply(a, b, dtype=F64)
    s = product + c
    # A second rounding can differ only from half way between two float32 values, or where float32
    # has fewer bits.
    risky = (s.view(U64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    risky |= np.abs(s) < 2.0**-126
    return (odd_sum(product, np.asarray(c, F64)) if risky.any() else s).astype(F32)


def _fma_f64(a: Array, b: Array, c: Array) -> Array:
    """Dekker's product, then Boldo and Melquiond's sum."""
    p = a * b
    split = np.float64(134217729.0)
    ah = a * split - (a * split - a)
    bh = b * split - (b * split - b)
    al, bl = a - ah, b - bh
    low = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    th = c + low
    t = th - c
    tl = (c - (th - t)) + (low - t)
    vh = p + th
    v = vh - p
    vl = (p - (vh - v)) + (th - v)
    exact = vh + odd_sum(tl, vl)
    plain = p + c
    return np.where(np.isfinite(exact) & np.isfinite(plain), exact, plain)


def extreme(a: Array, b: Array, pick: Callable[[Array, Array], Array]) -> Array:
    """The lesser or greater by one of numpy's four functions, with -0 below +0."""
    r = pick(a, b)
    zero = r == 0
    if zero.any():  # numpy may give either zero
        merge = np.bitwise_or if pick in (np.fmin, np.minimum) else np.bitwise_and
        bits = BITS[r.itemsize]
        r = np.where(zero & (a == b), merge(a.view(bits), b.view(bits)).view(r.dtype), r)
    return r


# Integers


def mul_hi(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    size = a.dtype.itemsize
    if size == 8:  # numpy has no longer type: Python's integers
        return np.asarray(a.astype(object) * b.astype(object) >> 64).astype(a.dtype)
    wide = S64 if a.dtype.kind == "i" else U64
    return (np.multiply(a, b, dtype=wide) >> wide.type(8 * size)).astype(a.dtype)


def add_carry(a: Array, b: Array, carry: Array) -> tuple[Array, Array]:
    """a + b + carry of unsigned words, and the carry out."""
    s = a + b
    total = s + carry.astype(s.dtype)
    return total, (s < a) | (total < s)


def sub_borrow(a: Array, b: Array, borrow: Array) -> tuple[Array, Array]:
    """a - b - borrow of unsigned words, and the borrow out."""
    s = a - b
    return s - borrow.astype(s.dtype), (a < b) | (s < borrow)


def int_div(a: Array, b: Array) -> Array:
    """Quotient towards zero; all ones where the divisor is 0 (unspecified in the manual)."""
    return np.where(b == 0, ~b.dtype.type(0), (a - np.fmod(a, b)) // b)


def saturated(x: Array, dtype: DType) -> Array:
    """Integers clamped to those of ``dtype``."""
    info, own = np.iinfo(dtype), np.iinfo(x.dtype)
    return np.clip(x, max(info.min, own.min), min(info.max, own.max)).astype(dtype)


def funnel(low: Array, high: Array, n: Array) -> Array:
    """32 bits of the 64-bit word high:low from bit n on."""
    return (((high.astype(U64) << np.uint64(32)) | low) >> n.astype(U64)).astype(U32)


def bfe(a: Array, start: Array, length: Array) -> Array:
    """Bits start .. start + length - 1, with the sign above (0, or of signed types the last)."""
    bits = 8 * a.dtype.itemsize
    start, length = (np.minimum(x & np.uint32(0xFF), bits).astype(a.dtype) for x in (start, length))
    above = a.dtype.type(bits) - length
    return a >> start << above >> above


def bfi(a: Array, b: Array, start: Array, length: Array) -> Array:
    """The low bits of a put into b."""
    start, length = ((x & np.uint32(0xFF)).astype(b.dtype) for x in (start, length))
    mask = ~(~b.dtype.type(0) << length) << start
    return (b & ~mask) | (a << start & mask)


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes chosen from the eight of b:a; a selector's bit 3 spreads the byte's sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    pick = selector[:, None] >> np.array([0, 4, 8, 12], U32)
    byte = np.take_along_axis(np.stack((a, b), 1).view(U8), (pick & 7).astype(np.intp), 1)
    return np.where(pick & 8, (byte.view(S8) >> 7).view(U8), byte).view(U32)[:, 0]


def clz(a: Array) -> Array:
    """Leading zeros."""
    bits = 8 * a.dtype.itemsize
    for k in (1, 2, 4, 8, 16, 32):
        a = a | (a >> a.dtype.type(k))
    return (bits - np.bitwise_count(a)).astype(U32)


def bfind(a: Array, shift: bool = False) -> Array:
    """Place of the highest bit that differs from the sign, or the shift that would bring it up."""
    word = (np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a).view(BITS[a.dtype.itemsize])
    above = clz(word)
    place = above if shift else 8 * a.dtype.itemsize - 1 - above
    return np.where(word == 0, 0xFFFFFFFF, place).astype(U32)


def brev(a: Array) -> Array:
    """Bits in reverse order."""
    bits = np.unpackbits(np.ascontiguousarray(a).view(U8).reshape(len(a), -1), axis=1)
    return np.packbits(bits[:, ::-1], axis=1).view(a.dtype)[:, 0]


def dp4a(a: Array, b: Array, c: Array) -> Array:
    """Four products of bytes, signed as their words are, summed into c."""
    x, y = (
        np.ascontiguousarray(v).view(f"{v.dtype.kind}1").reshape(-1, 4).astype(S64) for v in (a, b)
    )
    return ((x * y).sum(1) + c).astype(U32)


# Conversions


def to_integer(x: Array, dtype: DType) -> Array:
    """Float with an integral value -> integer, saturating, NaN -> 0 (PTX ISA, "cvt")."""
    wide, info = x.astype(F64), np.iinfo(dtype)
    low, high = wide <= float(info.min), wide >= float(info.max)
    inside = np.where(low | high | np.isnan(wide), 0.0, wide).astype(dtype)
    return np.where(low, info.min, np.where(high, info.max, inside)).astype(dtype)


def interleaved(high: Array, low: Array) -> Array:
    """The halves of packed values, the first operand in the upper one."""
    return np.stack(np.broadcast_arrays(low, high), -1).reshape(-1)


def cvt_tf32(x: Array) -> Array:
    """Round to 10 mantissa bits, ties away from zero."""
    bits = x.view(U32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits).view(F32)


# What the generated code calls: all of the above, and numpy.
HELPERS: dict[str, Any] = {n: x for n, x in globals().items() if n[0] != "_" and callable(x)}
HELPERS["np"] = np
