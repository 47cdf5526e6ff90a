"""Each arithmetic, logic and conversion instruction by name, against numpy, on edge values.

One kernel per row of the table below, with the instruction as inline PTX, all in one file.
"""

from fractions import Fraction

import numpy as np
import pytest

from bigkernel.testing import ptx

C_TYPES = {2: ("unsigned short", "h"), 4: ("unsigned int", "r"), 8: ("unsigned long long", "l")}
SIZES = {"b16": 2, "f16": 2, "bf16": 2, "u16": 2, "s16": 2, "f64": 8, "u64": 8, "s64": 8, "b64": 8}
NUMPY = {
    **{"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32},
    **{"u64": np.uint64, "s64": np.int64, "b64": np.uint64, "f16": np.float16, "f32": np.float32},
    **{"f64": np.float64, "bf16": np.uint16, "b16": np.uint16, "f16x2": np.float16},
    **{"bf16x2": np.uint16, "tf32": np.float32},
}
COUNT = 256


def bf(x):
    """bf16 bits -> float32."""
    return (np.asarray(x).astype(np.uint32) << 16).view(np.float32)


def to_bf(x):
    """float32 -> bf16 bits by torch's rounding."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy().view("u2")


def exact_fma(dtype, bf16=False):
    """a * b + c in rational arithmetic, rounded once (for bf16 to 8 bits, as float32)."""
    bits, least = {np.float16: (11, -24), np.float32: (24, -149), np.float64: (53, -1074)}[dtype]
    if bf16:
        bits, least = 8, -133

    def one(a, b, c):
        if not np.isfinite([a, b, c]).all():
            return dtype(np.float64(a) * np.float64(b) + np.float64(c))
        value = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        if value == 0:
            return dtype(np.float64(a) * np.float64(b) + np.float64(c))
        exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
        if abs(value) < Fraction(2) ** exponent:
            exponent -= 1
        unit = Fraction(2) ** max(exponent - bits + 1, least)
        rounded = round(value / unit) * unit  # half to even
        top = bf(np.uint16(0x7F7F)) if bf16 else np.finfo(dtype).max
        if abs(rounded) > Fraction(float(top)):
            return dtype(np.copysign(np.inf, float(np.sign(rounded.numerator))))
        return dtype(float(rounded))

    return lambda *args: np.array([one(*x) for x in zip(*args, strict=True)], dtype)


def fixed(dtype, function):
    """A reference in exact integers, wrapped to the type."""

    def run(*args):
        bits = 8 * np.dtype(dtype).itemsize
        values = [int(function(*map(int, x))) & (1 << bits) - 1 for x in zip(*args, strict=True)]
        return np.array(values, np.dtype(f"u{bits // 8}")).view(dtype)

    return run


def bfe(bits, signed):
    def one(a, start, length):
        start, length = start & 255, length & 255
        a &= (1 << bits) - 1
        sign = (a >> min(start + length - 1, bits - 1)) & 1 if signed and length else 0
        out = 0
        for k in range(bits):
            bit = (a >> (start + k)) & 1 if k < length and start + k < bits else sign
            out |= bit << k
        return out

    return one


def bfi(bits):
    def one(a, b, start, length):
        start, length = start & 255, length & 255
        for k in range(min(length, bits)):
            if start + k < bits:
                b = (b & ~(1 << (start + k))) | (((a >> k) & 1) << (start + k))
        return b

    return one


def prmt(a, b, s):
    both, out = a | b << 32, 0
    for k in range(4):
        pick = s >> 4 * k & 15
        byte = both >> 8 * (pick & 7) & 255
        out |= ((255 if byte > 127 else 0) if pick > 7 else byte) << 8 * k
    return out


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def saturated(dtype, rounding):
    info = np.iinfo(dtype)

    def one(x):
        if np.isnan(x):
            return 0
        if np.isinf(x):
            return info.max if x > 0 else info.min
        return max(info.min, min(info.max, int(rounding(np.float64(x)))))

    return lambda x: np.array([one(v) for v in x], dtype)


def directed(towards):
    """float64 -> float32 towards 0, -inf or inf."""

    def run(wide):
        r = wide.astype(np.float32)
        back = r.astype(np.float64)
        over = {
            0: np.abs(back) > np.abs(wide), -np.inf: back > wide, np.inf: back < wide
        }[towards]  # fmt: skip
        return np.where(over, np.nextafter(r, np.float32(towards)), r)

    return run


def flush(x):
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x).astype(np.float32)


def halves(high, low):
    return np.stack([low, high], -1).reshape(-1)


f16, f32, f64 = np.float16, np.float32, np.float64
ROWS = [
    # integers
    ("add.s32", "s32 s32 s32", fixed("i4", lambda a, b: a + b)),
    ("add.sat.s32", "s32 s32 s32", lambda a, b: np.clip(a.astype("i8") + b, -(2**31), 2**31 - 1)),
    ("add.u64", "u64 u64 u64", fixed("u8", lambda a, b: a + b)),
    ("add.s16", "s16 s16 s16", fixed("i2", lambda a, b: a + b)),
    ("sub.s32", "s32 s32 s32", fixed("i4", lambda a, b: a - b)),
    ("mul.lo.s32", "s32 s32 s32", fixed("i4", lambda a, b: a * b)),
    ("mul.lo.u16", "u16 u16 u16", fixed("u2", lambda a, b: a * b)),
    ("mul.hi.s32", "s32 s32 s32", fixed("i4", lambda a, b: a * b >> 32)),
    ("mul.hi.u32", "u32 u32 u32", fixed("u4", lambda a, b: a * b >> 32)),
    ("mul.hi.s64", "s64 s64 s64", fixed("i8", lambda a, b: a * b >> 64)),
    ("mul.hi.u64", "u64 u64 u64", fixed("u8", lambda a, b: a * b >> 64)),
    ("mul.wide.s32", "s64 s32 s32", fixed("i8", lambda a, b: a * b)),
    ("mul.wide.u32", "u64 u32 u32", fixed("u8", lambda a, b: a * b)),
    ("mul.wide.u16", "u32 u16 u16", fixed("u4", lambda a, b: a * b)),
    ("mad.lo.s32", "s32 s32 s32 s32", fixed("i4", lambda a, b, c: a * b + c)),
    ("mad.hi.u32", "u32 u32 u32 u32", fixed("u4", lambda a, b, c: (a * b >> 32) + c)),
    ("mad.wide.s32", "s64 s32 s32 s64", fixed("i8", lambda a, b, c: a * b + c)),
    ("mad.wide.u32", "u64 u32 u32 u64", fixed("u8", lambda a, b, c: a * b + c)),
    ("div.s32", "s32 s32 s32", fixed("i4", quotient)),
    ("div.u32", "u32 u32 u32", fixed("u4", quotient)),
    ("div.s64", "s64 s64 s64", fixed("i8", quotient)),
    ("rem.s32", "s32 s32 s32", fixed("i4", lambda a, b: a - quotient(a, b) * b)),
    ("rem.u32", "u32 u32 u32", fixed("u4", lambda a, b: a - quotient(a, b) * b)),
    ("sad.u32", "u32 u32 u32 u32", fixed("u4", lambda a, b, c: abs(a - b) + c)),
    ("neg.s32", "s32 s32", fixed("i4", lambda a: -a)),
    ("abs.s32", "s32 s32", fixed("i4", abs)),
    ("min.s32", "s32 s32 s32", np.minimum),
    ("max.u32", "u32 u32 u32", np.maximum),
    ("max.s64", "s64 s64 s64", np.maximum),
    ("and.b32", "b32 b32 b32", np.bitwise_and),
    ("or.b64", "b64 b64 b64", np.bitwise_or),
    ("xor.b16", "b16 b16 b16", np.bitwise_xor),
    ("not.b32", "b32 b32", np.invert),
    ("cnot.b32", "b32 b32", fixed("u4", lambda a: a == 0)),
    ("shl.b32", "b32 b32 u32", fixed("u4", lambda a, n: a << n if n < 32 else 0)),
    ("shl.b64", "b64 b64 u32", fixed("u8", lambda a, n: a << n if n < 64 else 0)),
    ("shr.u32", "u32 u32 u32", fixed("u4", lambda a, n: a >> n)),
    ("shr.s32", "s32 s32 u32", fixed("i4", lambda a, n: a >> n)),
    ("shr.s64", "s64 s64 u32", fixed("i8", lambda a, n: a >> n)),
    ("shr.u16", "u16 u16 u32", fixed("u2", lambda a, n: a >> n)),
    ("shf.l.wrap.b32", "b32 b32 b32 u32",
     fixed("u4", lambda a, b, n: (b << 32 | a) << (n & 31) >> 32)),
    ("shf.r.wrap.b32", "b32 b32 b32 u32", fixed("u4", lambda a, b, n: (b << 32 | a) >> (n & 31))),
    ("shf.l.clamp.b32", "b32 b32 b32 u32",
     fixed("u4", lambda a, b, n: (b << 32 | a) << min(n, 32) >> 32)),
    ("shf.r.clamp.b32", "b32 b32 b32 u32",
     fixed("u4", lambda a, b, n: (b << 32 | a) >> min(n, 32))),
    ("bfe.u32", "u32 u32 u32 u32", fixed("u4", bfe(32, False))),
    ("bfe.s32", "s32 s32 u32 u32", fixed("i4", bfe(32, True))),
    ("bfe.u64", "u64 u64 u32 u32", fixed("u8", bfe(64, False))),
    ("bfe.s64", "s64 s64 u32 u32", fixed("i8", bfe(64, True))),
    ("bfi.b32", "b32 b32 b32 u32 u32", fixed("u4", bfi(32))),
    ("bfi.b64", "b64 b64 b64 u32 u32", fixed("u8", bfi(64))),
    ("prmt.b32", "b32 b32 b32 b32", fixed("u4", prmt)),
    ("popc.b32", "u32 b32", fixed("u4", lambda a: a.bit_count())),
    ("popc.b64", "u32 b64", fixed("u4", lambda a: a.bit_count())),
    ("clz.b32", "u32 b32", fixed("u4", lambda a: 32 - a.bit_length())),
    ("clz.b64", "u32 b64", fixed("u4", lambda a: 64 - a.bit_length())),
    ("brev.b32", "b32 b32", fixed("u4", lambda a: int(f"{a:032b}"[::-1], 2))),
    ("bfind.u32", "u32 u32", fixed("u4", lambda a: a.bit_length() - 1)),
    ("bfind.s32", "u32 s32", fixed("u4", lambda a: (a if a >= 0 else ~a).bit_length() - 1)),
    ("bfind.shiftamt.u32", "u32 u32", fixed("u4", lambda a: 32 - a.bit_length() if a else -1)),
    ("dp4a.u32.u32", "u32 b32 b32 u32", fixed(
        "u4", lambda a, b, c: c + sum((a >> s & 255) * (b >> s & 255) for s in (0, 8, 16, 24)))),
    # float32
    ("add.rn.f32", "f32 f32 f32", np.add),
    ("add.ftz.f32", "f32 f32 f32", lambda a, b: flush(flush(a) + flush(b))),
    ("add.rz.f32", "f32 f32 f32", None),
    ("sub.f32", "f32 f32 f32", np.subtract),
    ("mul.f32", "f32 f32 f32", np.multiply),
    ("mul.rz.f32", "f32 f32 f32", lambda a, b: directed(0)(a.astype(f64) * b)),
    ("mul.rm.f32", "f32 f32 f32", lambda a, b: directed(-np.inf)(a.astype(f64) * b)),
    ("mul.rp.f32", "f32 f32 f32", lambda a, b: directed(np.inf)(a.astype(f64) * b)),
    ("add.sat.f32", "f32 f32 f32", lambda a, b: np.clip(np.nan_to_num(a + b, nan=0), 0, 1)),
    ("fma.rn.f32", "f32 f32 f32 f32", exact_fma(np.float32)),
    ("fma.rn.ftz.f32", "f32 f32 f32 f32",
     lambda a, b, c: flush(exact_fma(np.float32)(flush(a), flush(b), flush(c)))),
    ("div.rn.f32", "f32 f32 f32", np.divide),
    ("div.full.f32", "f32 f32 f32", np.divide),
    ("div.approx.f32", "f32 f32 f32", np.divide),
    ("rcp.rn.f32", "f32 f32", lambda a: f32(1) / a),
    ("rcp.approx.ftz.f32", "f32 f32", lambda a: flush(f32(1) / flush(a))),
    ("sqrt.rn.f32", "f32 f32", np.sqrt),
    ("sqrt.approx.f32", "f32 f32", np.sqrt),
    ("rsqrt.approx.f32", "f32 f32", lambda a: (1 / np.sqrt(a.astype(f64))).astype(f32)),
    ("ex2.approx.f32", "f32 f32", lambda a: np.exp2(a.astype(f64))),
    ("ex2.approx.ftz.f32", "f32 f32", lambda a: flush(np.exp2(flush(a).astype(f64)).astype(f32))),
    ("lg2.approx.f32", "f32 f32", lambda a: np.log2(a.astype(f64))),
    ("sin.approx.f32", "f32 f32", lambda a: np.sin(a.astype(f64))),
    ("cos.approx.f32", "f32 f32", lambda a: np.cos(a.astype(f64))),
    ("tanh.approx.f32", "f32 f32", lambda a: np.tanh(a.astype(f64))),
    ("neg.f32", "f32 f32", np.negative),
    ("abs.f32", "f32 f32", np.abs),
    ("min.f32", "f32 f32 f32", np.fmin),
    ("max.f32", "f32 f32 f32", np.fmax),
    ("max.NaN.f32", "f32 f32 f32", np.maximum),
    ("copysign.f32", "f32 f32 f32", lambda a, b: np.copysign(b, a)),
    # float64
    ("add.f64", "f64 f64 f64", np.add),
    ("mul.f64", "f64 f64 f64", np.multiply),
    ("fma.rn.f64", "f64 f64 f64 f64", exact_fma(np.float64)),
    ("div.rn.f64", "f64 f64 f64", np.divide),
    ("sqrt.rn.f64", "f64 f64", np.sqrt),
    ("rcp.rn.f64", "f64 f64", lambda a: 1 / a),
    # half and bf16, plain and packed
    ("add.f16", "f16 f16 f16", np.add),
    ("mul.f16", "f16 f16 f16", np.multiply),
    ("fma.rn.f16", "f16 f16 f16 f16", exact_fma(np.float16)),
    ("max.f16", "f16 f16 f16", np.fmax),
    ("neg.f16", "f16 f16", np.negative),
    ("abs.f16", "f16 f16", np.abs),
    ("ex2.approx.f16", "f16 f16", lambda a: np.exp2(a.astype(f64)).astype(f16)),
    ("tanh.approx.f16", "f16 f16", lambda a: np.tanh(a.astype(f64)).astype(f16)),
    ("add.f16x2", "f16x2 f16x2 f16x2", np.add),
    ("sub.f16x2", "f16x2 f16x2 f16x2", np.subtract),
    ("mul.f16x2", "f16x2 f16x2 f16x2", np.multiply),
    ("fma.rn.f16x2", "f16x2 f16x2 f16x2 f16x2", exact_fma(np.float16)),
    ("fma.rn.relu.f16x2", "f16x2 f16x2 f16x2 f16x2",
     lambda a, b, c: np.maximum(exact_fma(np.float16)(a, b, c), f16(0))),
    ("min.f16x2", "f16x2 f16x2 f16x2", np.fmin),
    ("fma.rn.bf16", "bf16 bf16 bf16 bf16",
     lambda a, b, c: to_bf(exact_fma(np.float32, True)(bf(a), bf(b), bf(c)))),
    ("fma.rn.bf16x2", "bf16x2 bf16x2 bf16x2 bf16x2",
     lambda a, b, c: to_bf(exact_fma(np.float32, True)(bf(a), bf(b), bf(c)))),
    ("max.bf16", "bf16 bf16 bf16", lambda a, b: to_bf(np.fmax(bf(a), bf(b)))),
    ("min.bf16x2", "bf16x2 bf16x2 bf16x2", lambda a, b: to_bf(np.fmin(bf(a), bf(b)))),
    ("neg.bf16x2", "bf16x2 bf16x2", lambda a: a ^ 0x8000),
    ("abs.bf16", "bf16 bf16", lambda a: a & 0x7FFF),
    ("set.gt.u32.f16x2", "f16x2 f16x2 f16x2",
     lambda a, b: np.where(a > b, np.uint16(0xFFFF), np.uint16(0)).view(f16)),
    # conversions
    ("cvt.rn.f32.s32", "f32 s32", lambda a: a.astype(f32)),
    ("cvt.rn.f32.u64", "f32 u64", lambda a: a.astype(f32)),
    ("cvt.rz.f32.s32", "f32 s32", lambda a: directed(0)(a.astype(f64))),
    ("cvt.rn.f64.s32", "f64 s32", lambda a: a.astype(f64)),
    ("cvt.rn.f16.s32", "f16 s32", lambda a: a.astype(f64).astype(f16)),
    ("cvt.rni.s32.f32", "s32 f32", saturated("i4", np.rint)),
    ("cvt.rzi.s32.f32", "s32 f32", saturated("i4", np.trunc)),
    ("cvt.rmi.s32.f32", "s32 f32", saturated("i4", np.floor)),
    ("cvt.rpi.s32.f32", "s32 f32", saturated("i4", np.ceil)),
    ("cvt.rzi.u32.f32", "u32 f32", saturated("u4", np.trunc)),
    ("cvt.rzi.u64.f32", "u64 f32", saturated("u8", np.trunc)),
    ("cvt.rzi.s64.f64", "s64 f64", saturated("i8", np.trunc)),
    ("cvt.rni.s16.f16", "s16 f16", saturated("i2", np.rint)),
    ("cvt.rni.f32.f32", "f32 f32", np.rint),
    ("cvt.rzi.f32.f32", "f32 f32", np.trunc),
    ("cvt.rmi.f32.f32", "f32 f32", np.floor),
    ("cvt.rpi.f32.f32", "f32 f32", np.ceil),
    ("cvt.sat.f32.f32", "f32 f32", lambda a: np.clip(np.nan_to_num(a, nan=0), 0, 1)),
    ("cvt.rn.f16.f32", "f16 f32", lambda a: a.astype(f16)),
    ("cvt.rz.f16.f32", "f16 f32", None),
    ("cvt.rn.bf16.f32", "bf16 f32", to_bf),
    ("cvt.rz.bf16.f32", "bf16 f32", lambda a: (a.view("u4") >> 16).astype("u2")),
    ("cvt.f32.f16", "f32 f16", lambda a: a.astype(f32)),
    ("cvt.f64.f32", "f64 f32", lambda a: a.astype(f64)),
    ("cvt.rn.f32.f64", "f32 f64", lambda a: a.astype(f32)),
    ("cvt.rm.f32.f64", "f32 f64", directed(-np.inf)),
    ("cvt.rn.f16x2.f32", "f16x2 f32 f32", lambda a, b: halves(a, b).astype(f16)),
    ("cvt.rn.bf16x2.f32", "bf16x2 f32 f32", lambda a, b: to_bf(halves(a, b))),
    ("cvt.rn.relu.bf16x2.f32", "bf16x2 f32 f32",
     lambda a, b: to_bf(np.maximum(halves(a, b), f32(0)))),
    ("cvt.rna.tf32.f32", "tf32 f32", None),
    ("cvt.s64.s32", "s64 s32", lambda a: a.astype("i8")),
    ("cvt.u64.u32", "u64 u32", lambda a: a.astype("u8")),
    ("cvt.u16.u32", "u16 u32", lambda a: a.astype("u2")),
    ("cvt.s32.s16", "s32 s16", lambda a: a.astype("i4")),
    ("cvt.s32.s8", "s32 s32", lambda a: a.astype("i1").astype("i4")),
    ("cvt.u32.u8", "u32 u32", lambda a: a.astype("u1").astype("u4")),
    ("cvt.sat.u8.s32", "u32 s32", lambda a: np.clip(a, 0, 255).astype("u4")),
    ("cvt.sat.s32.s64", "s32 s64", lambda a: np.clip(a, -(2**31), 2**31 - 1)),
]  # fmt: skip
# sm_90 has these as instructions of its own.
ROWS_90 = [
    ("add.rn.bf16", "bf16 bf16 bf16", lambda a, b: to_bf(bf(a) + bf(b))),
    ("mul.rn.bf16x2", "bf16x2 bf16x2 bf16x2", lambda a, b: to_bf(bf(a) * bf(b))),
    ("sub.rn.bf16x2", "bf16x2 bf16x2 bf16x2", lambda a, b: to_bf(bf(a) - bf(b))),
    ("cvt.f32.bf16", "f32 bf16", bf),
    ("tanh.approx.bf16x2", "bf16x2 bf16x2", lambda a: to_bf(np.tanh(bf(a)))),
    ("ex2.approx.ftz.bf16x2", "bf16x2 bf16x2", lambda a: to_bf(np.exp2(bf(a)))),
    ("add.u16x2", "u32 u32 u32", lambda a, b: (a.view("u2") + b.view("u2")).view("u4")),
]
APPROXIMATE = {"ex2", "lg2", "sin", "cos", "tanh", "rsqrt"}
COMPARISONS = [
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "equ",
    "neu",
    "ltu",
    "leu",
    "gtu",
    "geu",
    "num",
    "nan",
]


def kernel_name(opcode):
    return "k_" + opcode.replace(".", "_")


def kernel(opcode, types):
    """A kernel that applies one instruction to each element."""
    c_types = [C_TYPES[SIZES.get(t, 4)] for t in types.split()]
    params = ", ".join(f"const {c}* p{k}" for k, (c, _) in enumerate(c_types[1:]))
    places = ", ".join(f"%{k}" for k in range(len(c_types)))
    inputs = ", ".join(f'"{letter}"(p{k}[i])' for k, (_, letter) in enumerate(c_types[1:]))
    out_type, out_letter = c_types[0]
    return (
        f'extern "C" __global__ void {kernel_name(opcode)}({params}, {out_type}* out) {{\n'
        f"  int i = blockIdx.x * blockDim.x + threadIdx.x; {out_type} r;\n"
        f'  asm volatile("{opcode} {places};" : "={out_letter}"(r) : {inputs}); out[i] = r;\n}}\n'
    )


def comparison(compare, t, letter, c):
    return (
        f'extern "C" __global__ void k_setp_{compare}_{t}(const {c}* a, const {c}* b, unsigned* o) '
        f'{{ int i = threadIdx.x; unsigned r; asm volatile("{{ .reg .pred p, q, s; '
        f"setp.ne.u32 s, %3, 0; setp.{compare}.and.{t} p|q, %1, %2, s; selp.u32 %0, 1, 0, p; "
        f'@q or.b32 %0, %0, 2; }}" : "=r"(r) : "{letter}"(a[i]), "{letter}"(b[i]), "r"(i & 3)); '
        "o[i] = r; }\n"
    )


def more_kernels():
    text = "".join(comparison(c, "f32", "f", "float") for c in COMPARISONS)
    text += "".join(comparison(c, "s32", "r", "int") for c in COMPARISONS[:6])
    text += "".join(comparison(c, "u32", "r", "unsigned") for c in ("lo", "ls", "hi", "hs"))
    for table in (0x00, 0x80, 0x96, 0xE8, 0xCA, 0x1B, 0xFF):
        text += (
            f'extern "C" __global__ void k_lop3_{table}(const unsigned* a, const unsigned* b, '
            "const unsigned* c, unsigned* o) { int i = threadIdx.x; unsigned r; "
            f'asm volatile("lop3.b32 %0, %1, %2, %3, {table};" : "=r"(r) : "r"(a[i]), "r"(b[i]), '
            '"r"(c[i])); o[i] = r; }\n'
        )
    return text


@pytest.fixture(scope="module")
def module():
    source = "".join(kernel(opcode, types) for opcode, types, _ in ROWS)
    return ptx.compile(source + more_kernels() + "\n", arch="sm_80")


@pytest.fixture(scope="module")
def module90():
    return ptx.compile("".join(kernel(o, t) for o, t, _ in ROWS_90) + "\n", arch="sm_90")


def values(type_, seed, count=COUNT):
    """Edge values of the type and random ones."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(NUMPY[type_])
    n = count * (2 if type_.endswith("x2") else 1)
    raw = rng.integers(0, 1 << 8 * dtype.itemsize, n, dtype=np.uint64)
    bits = np.dtype(f"u{dtype.itemsize}")
    out = raw.astype(bits).view(dtype)
    if dtype.kind == "f":
        usual = rng.normal(0, 3, n).astype(dtype)
        out = np.where(rng.random(n) < 0.5, usual, out)
        info = np.finfo(dtype)
        edges = [0.0, -0.0, 1, -1, 0.5, 1.5, 2.5, np.inf, -np.inf, np.nan, info.max, info.tiny]
        edges += [info.smallest_subnormal, -info.tiny / 2, 65504, 65520, 2.0**10, -3.5]
        with np.errstate(over="ignore"):
            out[: len(edges)] = np.array(edges).astype(dtype)
    elif type_.startswith("bf16"):
        out = to_bf(values("f32", seed, n))
    else:
        info = np.iinfo(dtype)
        edges = np.array([0, 1, 2, 31, 32, 33, 63, 64, 255, 256, info.max, info.min], object)
        low = (1 << 8 * dtype.itemsize) - 1
        out[: len(edges)] = np.array([int(e) & low for e in edges], bits).view(dtype)
        small = rng.random(n) < 0.3
        out = np.where(small, out & dtype.type(63), out)
    return np.ascontiguousarray(rng.permutation(out))


def run(module, name, inputs, out):
    memory = ptx.Memory()
    pointers = [memory.register(x) for x in (*inputs, out)]
    module[name].launch((1,), (COUNT,), pointers, memory)
    return out


def check(module, opcode, types, reference):
    out_type, *in_types = types.split()
    inputs = [values(t, 7 + k) for k, t in enumerate(in_types)]
    count = COUNT * (2 if out_type.endswith("x2") else 1)
    out = run(module, kernel_name(opcode), inputs, np.zeros(count, NUMPY[out_type]))
    with np.errstate(all="ignore"):
        want = np.asarray(reference(*inputs)).astype(NUMPY[out_type])
    if out_type.startswith("bf16"):
        out, want = bf(out), bf(want)
    if opcode.split(".")[0] in APPROXIMATE:
        np.testing.assert_allclose(out, want, rtol=4e-7 if out_type == "f32" else 2e-3, atol=1e-38)
    else:
        np.testing.assert_array_equal(out, want)
        if np.asarray(out).dtype.kind == "f" and not opcode.startswith(("neg", "min", "max")):
            known = ~np.isnan(want)
            np.testing.assert_array_equal(np.signbit(out)[known], np.signbit(want)[known])


@pytest.mark.parametrize(("opcode", "types", "reference"), [r for r in ROWS if r[2]],
                         ids=[r[0] for r in ROWS if r[2]])  # fmt: skip
def test_instruction(module, opcode, types, reference):
    check(module, opcode, types, reference)


@pytest.mark.parametrize(("opcode", "types", "reference"), ROWS_90, ids=[r[0] for r in ROWS_90])
def test_instruction_sm90(module90, opcode, types, reference):
    check(module90, opcode, types, reference)


def test_add_rz_f32(module):
    a, b = values("f32", 1), values("f32", 2)
    out = run(module, "k_add_rz_f32", [a, b], np.zeros(COUNT, np.float32))
    for x, y, r in zip(a, b, out, strict=True):
        if np.isfinite([x, y, r]).all() and abs(r) < 1e38:
            exact = Fraction(float(x)) + Fraction(float(y))
            away = np.nextafter(r, np.float32(np.copysign(np.inf, r)))
            assert abs(Fraction(float(r))) <= abs(exact)
            assert abs(Fraction(float(away))) > abs(exact)


def test_cvt_rz_f16_f32(module):
    a = values("f32", 1)
    out = run(module, "k_cvt_rz_f16_f32", [a], np.zeros(COUNT, np.float16))
    finite = np.isfinite(a)
    assert (np.abs(out[finite].astype(f64)) <= np.abs(a[finite].astype(f64))).all()
    inside = finite & (np.abs(a) < 65504)
    away = np.nextafter(out[inside], np.copysign(np.float16(np.inf), a[inside]).astype(f16))
    assert (np.abs(away.astype(f64)) > np.abs(a[inside].astype(f64))).all()


def test_cvt_rna_tf32_f32(module):
    a = values("f32", 1)
    out = run(module, "k_cvt_rna_tf32_f32", [a], np.zeros(COUNT, np.float32))
    usual = np.isfinite(a) & (np.abs(a) < 1e38) & (np.abs(a) > 1e-30)
    assert ((out.view("u4")[usual] & 0x1FFF) == 0).all()
    np.testing.assert_allclose(out[usual], a[usual], rtol=2.0**-11)


@pytest.mark.parametrize("compare", COMPARISONS)
def test_setp_f32(module, compare):
    a, b = values("f32", 1), values("f32", 2)
    b[::3] = a[::3]
    out = run(module, f"k_setp_{compare}_f32", [a, b], np.zeros(COUNT, np.uint32))
    nan = np.isnan(a) | np.isnan(b)
    with np.errstate(invalid="ignore"):
        want = {
            "eq": a == b, "ne": (a != b) & ~nan, "lt": a < b, "le": a <= b, "gt": a > b,
            "ge": a >= b, "equ": (a == b) | nan, "neu": a != b, "ltu": (a < b) | nan,
            "leu": (a <= b) | nan, "gtu": (a > b) | nan, "geu": (a >= b) | nan,
            "num": ~nan, "nan": nan,
        }[compare]  # fmt: skip
    allowed = np.arange(COUNT) % 4 != 0
    np.testing.assert_array_equal(out, (want & allowed) + 2 * (~want & allowed))


@pytest.mark.parametrize("compare", COMPARISONS[:6])
def test_setp_s32(module, compare):
    a, b = values("s32", 1), values("s32", 2)
    out = run(module, f"k_setp_{compare}_s32", [a, b], np.zeros(COUNT, np.uint32))
    want = getattr(np, {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal",
                        "gt": "greater", "ge": "greater_equal"}[compare])(a, b)  # fmt: skip
    allowed = np.arange(COUNT) % 4 != 0
    np.testing.assert_array_equal(out, (want & allowed) + 2 * (~want & allowed))


@pytest.mark.parametrize(("compare", "ufunc"), [
    ("lo", np.less), ("ls", np.less_equal), ("hi", np.greater), ("hs", np.greater_equal)
])  # fmt: skip
def test_setp_u32(module, compare, ufunc):
    a, b = values("u32", 1), values("u32", 2)
    out = run(module, f"k_setp_{compare}_u32", [a, b], np.zeros(COUNT, np.uint32))
    want, allowed = ufunc(a, b), np.arange(COUNT) % 4 != 0
    np.testing.assert_array_equal(out, (want & allowed) + 2 * (~want & allowed))


@pytest.mark.parametrize("table", [0x00, 0x80, 0x96, 0xE8, 0xCA, 0x1B, 0xFF])
def test_lop3(module, table):
    a, b, c = (values("u32", k) for k in range(3))
    out = run(module, f"k_lop3_{table}", [a, b, c], np.zeros(COUNT, np.uint32))
    want = np.zeros(COUNT, np.uint32)
    for bit in range(32):
        row = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        want |= (table >> row & 1).astype(np.uint32) << np.uint32(bit)
    np.testing.assert_array_equal(out, want)


def test_unknown_instruction_is_named():
    text = """.version 9.0
.target sm_80
.address_size 64
.visible .entry k() { .reg .b32 %r<3>; tex.1d.v4.f32.s32 {%r1}, [t, {%r2}]; ret; }
"""
    with pytest.raises(ptx.UnknownInstruction, match=r"line 4: instruction 'tex\.1d\.v4"):
        ptx.load(text)["k"].launch((1,), (32,), [], ptx.Memory())
