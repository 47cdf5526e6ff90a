"""The arithmetic that numpy lacks: roundings, fma, bit fields, saturation, conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bigkernel.testing.ptx.types import BITS, DTYPES, FORMATS, Array, DType


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
    fix = (error != 0) & ((s.view(np.uint64) & 1) == 0) & np.isfinite(s)
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
    if mode == "rn" and x.dtype == np.float32:
        u: Array = x.view(np.uint32)
        r = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
        nan = np.isnan(x)
        return np.where(nan, np.uint16(0x7FFF), r) if nan.any() else r
    wide = x.astype(np.float64)
    bits, least, largest = FORMATS[type_]
    unit = np.maximum(np.frexp(wide)[1] - bits, least)  # log2 of the last place
    rounded = np.ldexp(_ROUND[mode](np.ldexp(wide, -unit)), unit)
    inward = {"rn": False, "rz": True, "rm": wide > 0, "rp": wide < 0}[mode] & np.isfinite(wide)
    rounded = np.where(inward, np.clip(rounded, -largest, largest), rounded)
    return round_to(rounded.astype(np.float32), type_)  # now exact


def bf16_to_f32(x: Array) -> Array:
    """Bits of bf16 -> the same values in float32 (exact)."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float32 or float64 with one rounding to nearest."""
    if np.result_type(a, b, c) == np.float64:
        return _fma_f64(a, b, c)
    product = np.multiply(a, b, dtype=np.float64)
    s = product + c
    # A second rounding can differ only from half way between two float32 values, or where float32
    # has fewer bits.
    risky = (s.view(np.uint64) & 0x1FFFFFFF) == 0x10000000
    risky |= np.abs(s) < 2.0**-126
    return (odd_sum(product, np.asarray(c, np.float64)) if risky.any() else s).astype(np.float32)


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
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return (np.multiply(a, b, dtype=wide) >> 8 * size).astype(a.dtype)


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
    return (((high.astype(np.uint64) << 32) | low) >> n.astype(np.uint64)).astype(np.uint32)


def bfe(a: Array, start: Array, length: Array) -> Array:
    """Bits start .. start + length - 1, with the sign above (0, or of signed types the last)."""
    bits = 8 * a.dtype.itemsize
    start, length = (np.minimum(x & 0xFF, bits).astype(a.dtype) for x in (start, length))
    above = a.dtype.type(bits) - length
    return a >> start << above >> above


def bfi(a: Array, b: Array, start: Array, length: Array) -> Array:
    """The low bits of a put into b."""
    start, length = ((x & 0xFF).astype(b.dtype) for x in (start, length))
    mask = ~(~b.dtype.type(0) << length) << start
    return (b & ~mask) | (a << start & mask)


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes chosen from the eight of b:a; a selector's bit 3 spreads the byte's sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    pick = selector[:, None] >> np.array([0, 4, 8, 12], np.uint32)
    byte = np.take_along_axis(np.stack((a, b), 1).view(np.uint8), (pick & 7).astype(np.intp), 1)
    return np.where(pick & 8, (byte.view(np.int8) >> 7).view(np.uint8), byte).view(np.uint32)[:, 0]


def clz(a: Array) -> Array:
    """Leading zeros."""
    bits = 8 * a.dtype.itemsize
    for k in (1, 2, 4, 8, 16, 32):
        a = a | (a >> a.dtype.type(k))
    return (bits - np.bitwise_count(a)).astype(np.uint32)


def bfind(a: Array, shift: bool = False) -> Array:
    """Place of the highest bit that differs from the sign, or the shift that would bring it up."""
    word = (np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a).view(BITS[a.dtype.itemsize])
    above = clz(word)
    place = above if shift else 8 * a.dtype.itemsize - 1 - above
    return np.where(word == 0, 0xFFFFFFFF, place).astype(np.uint32)


def brev(a: Array) -> Array:
    """Bits in reverse order."""
    bits = np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(len(a), -1), axis=1)
    return np.packbits(bits[:, ::-1], axis=1).view(a.dtype)[:, 0]


def dp4a(a: Array, b: Array, c: Array) -> Array:
    """Four products of bytes, signed as their words are, summed into c."""
    x, y = (np.ascontiguousarray(v).view(f"{v.dtype.kind}1").reshape(-1, 4) for v in (a, b))
    return ((x.astype(np.int64) * y).sum(1) + c).astype(np.uint32)


# Conversions


def to_integer(x: Array, dtype: DType) -> Array:
    """Float with an integral value -> integer, saturating, NaN -> 0 (PTX ISA, "cvt")."""
    wide, info = x.astype(np.float64), np.iinfo(dtype)
    low, high = wide <= float(info.min), wide >= float(info.max)
    inside = np.where(low | high | np.isnan(wide), 0.0, wide).astype(dtype)
    return np.where(low, info.min, np.where(high, info.max, inside)).astype(dtype)


def interleaved(high: Array, low: Array) -> Array:
    """The halves of packed values, the first operand in the upper one."""
    return np.stack(np.broadcast_arrays(low, high), -1).reshape(-1)


def cvt_tf32(x: Array) -> Array:
    """Round to 10 mantissa bits, ties away from zero."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x1000) & 0xFFFFE000
    return np.where(np.isfinite(x), rounded, bits).view(np.float32)
