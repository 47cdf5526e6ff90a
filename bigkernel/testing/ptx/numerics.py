"""The arithmetic that numpy lacks: roundings, fma, bit fields, saturation, conversions."""

from __future__ import annotations

from typing import Any

import numpy as np

from bigkernel.testing.ptx.types import (
    DTYPES,
    F32,
    F64,
    S64,
    U8,
    U16,
    U32,
    U64,
    Array,
    size_of,
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


def _odd_f32(x: Array) -> Array:
    """float64 -> float32 rounded to odd."""
    r = x.astype(F32)
    fix = (r.astype(F64) != x) & ((r.view(U32) & np.uint32(1)) == 0) & np.isfinite(x)
    if fix.any():
        inward = np.where(r.astype(F64) > x, -np.inf, np.inf).astype(F32)
        r = np.where(fix, np.nextafter(r, inward), r)
    return r


def round_to(x: Array, type_: str, mode: str = "rn") -> Array:
    """float32 or float64 values -> values of ``type_`` ("f16", "bf16", "f32", "f64").

    mode: "rn" to nearest even, "rz" towards zero, "rm" down, "rp" up (PTX ISA, "Rounding
    Modifiers").
    """
    if type_ == "bf16":
        return _round_bf16(x, mode)
    dtype = DTYPES[type_]
    r = x.astype(dtype)
    if mode == "rn" or dtype == x.dtype:
        return r
    wide, exact = r.astype(F64), x.astype(F64)
    over = {"rz": np.abs(wide) > np.abs(exact), "rm": wide > exact, "rp": wide < exact}[mode]
    towards = {"rz": 0.0, "rm": -np.inf, "rp": np.inf}[mode]
    return np.where(over & ~np.isnan(x), np.nextafter(r, dtype.type(towards)), r)


def _round_bf16(x: Array, mode: str) -> Array:
    single = x if x.dtype == F32 else _odd_f32(x)
    u = single.view(U32)
    if mode == "rn":
        r = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    else:
        r = u >> np.uint32(16)
        if mode != "rz":
            away = (u & np.uint32(0xFFFF) != 0) & ((u >> np.uint32(31) == 1) == (mode == "rm"))
            r = r + away
    nan = np.isnan(single)
    r = r.astype(U16)
    return np.where(nan, np.uint16(0x7FFF), r) if nan.any() else r


def bf16_to_f32(x: Array) -> Array:
    """Bits of bf16 -> the same values in float32 (exact)."""
    return (x.astype(U32) << np.uint32(16)).view(F32)


def fma(a: Array, b: Array, c: Array, type_: str, mode: str = "rn") -> Array:
    """a * b + c with one rounding (PTX ISA, "Floating Point Instructions: fma")."""
    if type_ == "f64":
        return _fma_f64(a, b, c)
    if type_ == "bf16":
        a, b, c = bf16_to_f32(a), bf16_to_f32(b), bf16_to_f32(c)
    product = np.multiply(a, b, dtype=F64)
    if type_ == "f32" and mode == "rn":
        s = product + c
        # A second rounding can differ only from half way between two float32 values, or where
        # float32 has fewer bits.
        risky = (s.view(U64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
        risky |= np.abs(s) < 2.0**-126
        if not risky.any():
            return s.astype(F32)
    return round_to(odd_sum(product, np.asarray(c, F64)), type_, mode)


def _fma_f64(a: Array, b: Array, c: Array) -> Array:
    """The same for float64: Dekker's product, then Boldo and Melquiond's sum."""
    a, b, c = np.broadcast_arrays(a, b, c)
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


def to_integer(x: Array, type_: str, mode: str) -> Array:
    """Float -> integer, saturating, NaN -> 0 (PTX ISA, "cvt")."""
    wide = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(F64))
    info = np.iinfo(DTYPES[type_])
    low, high = wide <= float(info.min), wide >= float(info.max)
    inside = np.where(low | high | np.isnan(wide), 0.0, wide).astype(DTYPES[type_])
    return np.where(low, info.min, np.where(high, info.max, inside)).astype(DTYPES[type_])


def saturate(x: Array) -> Array:
    """Clamp to [0, 1], NaN to 0."""
    return np.clip(np.nan_to_num(x, nan=0.0), x.dtype.type(0), x.dtype.type(1))


def relu(x: Array) -> Array:
    """Negative to 0, NaN stays."""
    return np.maximum(x, x.dtype.type(0))


def saturating(x: Array) -> Array:
    """int64 -> int32, clamped."""
    return np.clip(x, -(2**31), 2**31 - 1).astype(np.int32)


def reciprocal(x: Array) -> Array:
    """1 / x in x's type."""
    return x.dtype.type(1) / x


def rsqrt(x: Array) -> Array:
    """1 / sqrt(x), rounded once to x's type."""
    return (1.0 / np.sqrt(x.astype(F64))).astype(x.dtype)


def extreme(a: Array, b: Array, nan: bool, minimum: bool) -> Array:
    """The lesser or greater; a NaN only if both are, or with ``nan`` if one is."""
    pick = np.minimum if minimum else np.maximum
    r: Array = pick(a, b) if nan else (np.fmin if minimum else np.fmax)(a, b)
    zero = r == 0
    if zero.any():  # numpy may give either zero of -0 and +0
        bits = np.dtype(f"u{r.itemsize}")
        both = (a.view(bits) | b.view(bits)) if minimum else (a.view(bits) & b.view(bits))
        r = np.where(zero & (a == b), both.view(r.dtype), r)
    return r


def mul_hi(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    size = a.dtype.itemsize
    if size < 8:
        wide = S64 if a.dtype.kind == "i" else U64
        return (np.multiply(a, b, dtype=wide) >> wide.type(8 * size)).astype(a.dtype)
    signed = a.dtype.kind == "i"
    a, b = np.broadcast_arrays(a, b)
    ua, ub = (np.ascontiguousarray(x).view(U64) for x in (a, b))
    low, s = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = ua & low, ua >> s, ub & low, ub >> s
    middle = a1 * b0 + (a0 * b0 >> s)
    high = a1 * b1 + (middle >> s) + (((middle & low) + a0 * b1) >> s)
    if signed:
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return high.view(a.dtype)


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
    a, b = np.broadcast_arrays(a, b)
    zero = b == 0
    q = a // np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "i":
        q = q + ((a - q * b != 0) & ((a < 0) != (b < 0)))
    return np.where(zero, ~a.dtype.type(0), q)


def bfe(a: Array, start: Array, length: Array) -> Array:
    """Bits start .. start + length - 1, sign-extended for signed types."""
    bits, dtype = 8 * a.dtype.itemsize, a.dtype
    start, length = (np.minimum(x & np.uint32(0xFF), np.uint32(bits)) for x in (start, length))
    u = np.dtype(f"u{dtype.itemsize}")
    word = a.view(u)
    empty = start >= bits
    taken = np.where(empty, u.type(0), word >> np.where(empty, 0, start).astype(u))
    full = length >= bits
    mask = np.where(
        full, ~u.type(0), (u.type(1) << np.where(full, 0, length).astype(u)) - u.type(1)
    )
    r = taken & mask
    if dtype.kind == "i":
        at = np.minimum(start + length - np.uint32(1), np.uint32(bits - 1)).astype(u)
        sign = (word >> at) & u.type(1) & (length > 0)
        valid = np.minimum(length, np.where(start > bits, 0, bits - start))
        keep = (u.type(1) << np.minimum(valid, bits - 1).astype(u)) - u.type(1)
        r = np.where((sign == 1) & (valid < bits), r | ~keep, r)
    return r.astype(u).view(dtype)


def bfi(a: Array, b: Array, start: Array, length: Array) -> Array:
    """The low bits of a put into b."""
    u = b.dtype
    bits = 8 * u.itemsize
    start, length = (np.asarray(x) & np.uint32(0xFF) for x in (start, length))
    full, out = length >= bits, start >= bits
    mask = np.where(
        full, ~u.type(0), (u.type(1) << np.where(full, 0, length).astype(u)) - u.type(1)
    )
    shift = np.where(out, 0, start).astype(u)
    mask = np.where(out, u.type(0), mask << shift)
    return (b & ~mask) | ((a << shift) & mask)


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes chosen from the eight of b:a; a selector's bit 3 spreads the byte's sign."""
    both = a.astype(U64) | (b.astype(U64) << np.uint64(32))
    r = np.zeros(both.shape, U32)
    for k in range(4):
        pick = (np.asarray(selector).astype(U64) >> np.uint64(4 * k)) & np.uint64(15)
        byte = (both >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
        spread = np.where(byte > 127, np.uint64(0xFF), np.uint64(0))
        byte = np.where(pick > 7, spread, byte)
        r |= byte.astype(U32) << np.uint32(8 * k)
    return r


def clz(a: Array) -> Array:
    """Leading zeros."""
    bits = 8 * a.dtype.itemsize
    for k in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
        a = a | (a >> a.dtype.type(k))
    return (bits - np.bitwise_count(a)).astype(U32)


def bfind(a: Array, shift: bool) -> Array:
    """Place of the highest bit that differs from the sign, or the shift that would bring it up."""
    bits = 8 * a.dtype.itemsize
    word = np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a
    place = np.uint32(bits - 1) - clz(word.view(np.dtype(f"u{a.dtype.itemsize}")))
    found = word != 0
    return np.where(found, (bits - 1 - place) if shift else place, 0xFFFFFFFF).astype(U32)


def brev(a: Array) -> Array:
    """Bits in reverse order."""
    flat = np.ascontiguousarray(a).view(U8).reshape(len(a), -1)
    reversed_ = np.packbits(np.unpackbits(flat, axis=1)[:, ::-1], axis=1)
    return np.ascontiguousarray(reversed_).view(a.dtype).reshape(-1)


def dp4a(a: Array, b: Array, c: Array, a_type: str, b_type: str) -> Array:
    """Four products of bytes, summed into c."""
    x, y = (
        np.ascontiguousarray(v).view(DTYPES[t]).reshape(-1, 4).astype(np.int64)
        for v, t in ((a, a_type), (b, b_type))
    )
    return ((x * y).sum(1) + c).astype(U32)


def cvt_pair(high: Array, low: Array, kind: str, mode: str, positive: bool) -> Array:
    """Two float32 arrays -> interleaved halves, the first operand in the upper one."""
    high, low = np.broadcast_arrays(high, low)
    pair = np.stack((low, high), -1).reshape(-1)
    return round_to(relu(pair) if positive else pair, kind, mode)


def cvt_tf32(x: Array) -> Array:
    """Round to 10 mantissa bits, ties away from zero."""
    bits = x.view(U32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits).view(F32)


def cvt_clip(x: Array, to: str) -> Array:
    """Integer to integer, saturating."""
    info, own = np.iinfo(DTYPES[to]), np.iinfo(x.dtype)
    return np.clip(x, max(info.min, own.min), min(info.max, own.max)).astype(DTYPES[to])


def cvt_pack(to: str, a: Array, b: Array, *c: Array) -> Array:
    """a and b saturated into the low half, c's low half above them."""
    bits, mask = 8 * size_of(to), (1 << 8 * size_of(to)) - 1
    first, second = (cvt_clip(x, to).astype(np.int64) & mask for x in (a, b))
    packed = (first << bits) | second
    if c:
        packed = packed | (c[0].astype(np.int64) << (2 * bits))
    return packed.astype(U32)


# What the generated code calls: all of the above, and numpy.
HELPERS: dict[str, Any] = {n: x for n, x in globals().items() if n[0] != "_" and callable(x)}
HELPERS["np"] = np
