"""Arithmetic, comparison, logic and conversion: instruction -> a numpy expression.

The semantics are those of the sections with the instructions' names in the PTX ISA, "Instruction
Set": "Integer Arithmetic", "Floating Point", "Half Precision Floating Point", "Comparison and
Selection", "Logic and Shift", "Data Movement and Conversion". A modifier that stands in no table
here ends as UnknownInstruction.
"""

from __future__ import annotations

from typing import NamedTuple

from bigkernel.testing.ptx.parser import Imm, Instruction
from bigkernel.testing.ptx.types import DTYPES, FLOATS, FORMATS, PACKED, size_of


class Rule(NamedTuple):
    """``template`` over operands of types ``sources`` gives a value of type ``result``."""

    template: str
    result: str
    sources: tuple[str, ...]


def rule(i: Instruction) -> Rule:
    """How to compute the instruction's result."""
    if i.op == "cvt":
        return _cvt(i)
    if i.op == "set":
        return _set(i)
    if i.op == "lop3":
        return _lop3(i)
    if i.mods and i.type in FLOATS and i.op in _FLOAT:
        return _float(i)
    template, *types = _INTEGER.get(".".join((i.op, *i.mods[:-1])), [""])
    if not template:
        raise i.unknown()
    t = i.type
    named = {"t": t, "wide": f"{t[0]}{16 * size_of(t)}"}
    result, *sources = [named.get(x, x) for x in (types[0] if types else "t").split()]
    return Rule(
        template.replace("BITS", str(8 * size_of(t))).replace("RESULT", name_of(result)),
        *(result, tuple(sources) or (t,) * (len(i.operands) - 1)),
    )


# By opcode without its type: the expression, and where they are not all of the instruction's type
# "t" the types of result and operands. "wide" is twice as long.
_INTEGER = {
    "add": ("{0} + {1}",),
    "add.sat": ("saturated({0}.astype(np.int64) + {1}, RESULT)",),
    "sub": ("{0} - {1}",),
    "sub.sat": ("saturated({0}.astype(np.int64) - {1}, RESULT)",),
    "mul.lo": ("{0} * {1}",),
    "mul.hi": ("mul_hi({0}, {1})",),
    "mul.wide": ("np.multiply({0}, {1}, dtype=RESULT)", "wide t t"),
    "mad.lo": ("{0} * {1} + {2}",),
    "mad.hi": ("mul_hi({0}, {1}) + {2}",),
    "mad.wide": ("np.multiply({0}, {1}, dtype=RESULT) + {2}", "wide t t wide"),
    "div": ("int_div({0}, {1})",),
    "rem": ("{0} - int_div({0}, {1}) * {1}",),  # with the dividend's sign
    "sad": ("np.where({0} < {1}, {1} - {0}, {0} - {1}) + {2}",),
    "neg": ("-{0}",),
    "abs": ("np.abs({0})",),
    "min": ("np.minimum({0}, {1})",),
    "max": ("np.maximum({0}, {1})",),
    "min.relu": ("np.maximum(np.minimum({0}, {1}), 0)",),
    "max.relu": ("np.maximum(np.maximum({0}, {1}), 0)",),
    "dp4a.u32": ("dp4a({0}, {1}, {2})", "b32 u32 t b32"),
    "dp4a.s32": ("dp4a({0}, {1}, {2})", "b32 s32 t b32"),
    "and": ("{0} & {1}",),
    "or": ("{0} | {1}",),
    "xor": ("{0} ^ {1}",),
    "not": ("~{0}",),
    "cnot": ("({0} == 0).astype({0}.dtype)",),
    "selp": ("np.where({2}, {0}, {1})", "t t t pred"),
    # numpy shifts by the word's length and more to zeros or the sign, as PTX does.
    "shl": ("{0} << np.minimum({1}, BITS).astype({0}.dtype)", "t t u32"),
    "shr": ("{0} >> np.minimum({1}, BITS).astype({0}.dtype)", "t t u32"),
    "shf.l.wrap": ("funnel({0}, {1}, 32 - ({2} & 31))", "b32 b32 b32 u32"),
    "shf.r.wrap": ("funnel({0}, {1}, {2} & 31)", "b32 b32 b32 u32"),
    "shf.l.clamp": ("funnel({0}, {1}, 32 - np.minimum({2}, 32))", "b32 b32 b32 u32"),
    "shf.r.clamp": ("funnel({0}, {1}, np.minimum({2}, 32))", "b32 b32 b32 u32"),
    "bfe": ("bfe({0}, {1}, {2})", "t t u32 u32"),
    "bfi": ("bfi({0}, {1}, {2}, {3})", "t t t u32 u32"),
    "prmt": ("prmt({0}, {1}, {2})",),
    "popc": ("np.bitwise_count({0}).astype(np.uint32)", "u32 t"),
    "clz": ("clz({0})", "u32 t"),
    "brev": ("brev({0})",),
    "bfind": ("bfind({0})", "u32 t"),
    "bfind.shiftamt": ("bfind({0}, True)", "u32 t"),
}

# bf16 operands come as float32, results are rounded to the type. .approx forms are exacter than
# the manual demands.
_FLOAT = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "mad": "fma({0}, {1}, {2})",
    "fma": "fma({0}, {1}, {2})",
    "div": "{0} / {1}",
    "rcp": "1 / {0}",
    "sqrt": "np.sqrt({0})",
    "rsqrt": "(1 / np.sqrt({0}.astype(np.float64))).astype({0}.dtype)",
    "sin": "np.sin({0})",
    "cos": "np.cos({0})",
    "lg2": "np.log2({0})",
    "ex2": "np.exp2({0})",
    "tanh": "np.tanh({0})",
    "neg": "-{0}",
    "abs": "np.abs({0})",
    "copysign": "np.copysign({1}, {0})",
    "min": "extreme({0}, {1}, np.fmin)",
    "max": "extreme({0}, {1}, np.fmax)",
    "min.NaN": "extreme({0}, {1}, np.minimum)",
    "max.NaN": "extreme({0}, {1}, np.maximum)",
}
# From float64 operands, to be rounded once more to a shorter type.
_ONCE = {
    "add": "odd_sum({0}, {1})",
    "sub": "odd_sum({0}, -{1})",
    "mad": "odd_sum({0} * {1}, {2})",
    "fma": "odd_sum({0} * {1}, {2})",
    **{op: _FLOAT[op] for op in ("mul", "div", "rcp", "sqrt")},
}
_CLAMPS = {"relu": "np.maximum({}, 0)", "sat": "np.clip(np.nan_to_num({}, nan=0), 0, 1)"}
_ROUNDINGS = {"rn", "rz", "rm", "rp"}
_INTEGRAL = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}


def _rounding(i: Instruction) -> str:
    return next((m for m in i.mods if m in _ROUNDINGS), "rn")


def _float(i: Instruction) -> Rule:
    """A float operation with its rounding, .ftz, .sat and .relu."""
    mods, kind, mode = {*i.mods[:-1]}, i.type.removesuffix("x2"), _rounding(i)
    if extra := mods - {*_ROUNDINGS, "ftz", "sat", "relu", "approx", "full", "NaN", "noftz"}:
        raise i.unknown(f"modifier .{min(extra)}")
    flushes = "ftz" in mods and kind == "f32"
    names = [f"{{{k}}}" for k in range(len(i.operands) - 1)]
    if kind == "bf16":
        names = [f"bf16_to_f32({name})" for name in names]
    if flushes:
        names = [f"ftz({name})" for name in names]
    once = mode != "rn" or (i.op in ("fma", "mad") and kind in ("f16", "bf16"))
    if once:
        if kind == "f64" or i.op not in _ONCE:
            raise i.unknown("rounding mode")
        names = [f"np.asarray({name}, np.float64)" for name in names]
    template = (_ONCE if once else _FLOAT)[f"{i.op}.NaN" if "NaN" in mods else i.op]
    out = f"({template.format(*names)})"
    for clamp in _CLAMPS.keys() & mods:
        out = _CLAMPS[clamp].format(out)
    if once or kind == "bf16":
        out = f"round_to({out}, '{kind}', '{mode}')"
    return Rule(f"ftz({out})" if flushes else out, i.type, (i.type,) * len(names))


_ORDERED = {
    "eq": "({0} == {1})",
    "ne": "(({0} < {1}) | ({0} > {1}))",
    **{"lt": "({0} < {1})", "le": "({0} <= {1})", "gt": "({0} > {1})", "ge": "({0} >= {1})"},
    "num": "(({0} == {0}) & ({1} == {1}))",
}
_OPPOSITE = {"equ": "ne", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt", "nan": "num"}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparison(i: Instruction) -> str:
    """The boolean expression of setp's or set's operator, its first modifier."""
    compare, t = i.mods[0], i.type
    if t == "pred" or compare not in {*_ORDERED, *_OPPOSITE, *_UNSIGNED, "neu"}:
        raise i.unknown(f"comparison .{compare}")
    if compare == "neu" or (compare == "ne" and t not in FLOATS):
        out = "({0} != {1})"
    elif compare in _OPPOSITE:
        out = f"~{_ORDERED[_OPPOSITE[compare]]}"
    else:
        out = _ORDERED[_UNSIGNED.get(compare, compare)]
    if t.startswith("bf16"):
        return out.format("bf16_to_f32({0})", "bf16_to_f32({1})")
    return out.format("ftz({0})", "ftz({1})") if "ftz" in i.mods and t == "f32" else out


def _set(i: Instruction) -> Rule:
    """All ones or 1.0 where true; of packed operands a mask or number for each half."""
    *mods, target, t = i.mods
    if t in PACKED and target in ("u32", "s32"):
        target = "u16x2"
    if {*mods[1:]} - {"ftz"} or (target in PACKED) != (t in PACKED) or target == "pred":
        raise i.unknown()
    dtype = name_of(target)
    one = "0x3f80" if target.startswith("bf16") else "1" if target in FLOATS else f"~{dtype}(0)"
    truth = comparison(i)
    return Rule(f"np.where({truth}, {dtype}({one}), {dtype}(0))", target, (t, t))


def _lop3(i: Instruction) -> Rule:
    """The table's bit (4a + 2b + c), as a sum of products."""
    table = i.operands[-1]
    if not isinstance(table, Imm) or i.mods != ("b32",):
        raise i.unknown("table is no constant")
    terms = [
        "(" + " & ".join(("" if k >> (2 - j) & 1 else "~") + f"{{{j}}}" for j in range(3)) + ")"
        for k in range(8)
        if table.value >> k & 1
    ]
    return Rule(" | ".join(terms) or "{0} ^ {0}", "b32", ("b32",) * 4)


def _cvt(i: Instruction) -> Rule:
    *given, to, of = i.mods
    mods, mode, kind = {*given}, _rounding(i), to.removesuffix("x2")
    known = {*_ROUNDINGS, *_INTEGRAL, "rna", "ftz", "sat", "satfinite", "relu"}
    if to not in DTYPES or of not in DTYPES or mods - known or of in PACKED:
        raise i.unknown()
    x = "ftz({0})" if "ftz" in mods and of == "f32" else "{0}"
    if of == "bf16":
        x = "bf16_to_f32({0})"
    sources: tuple[str, ...] = (of,)
    if to in PACKED:
        if of != "f32" or kind not in ("f16", "bf16"):
            raise i.unknown()
        x, sources = "interleaved({0}, {1})", (of, of)
    if to == "tf32":
        if "rna" not in mods:
            raise i.unknown("rounding mode")
        return Rule(f"cvt_tf32({x})", "f32", sources)
    if of not in FLOATS:
        if to not in FLOATS:
            call = "saturated({}, {})" if "sat" in mods else "{}.astype({})"
            return Rule(call.format(x, name_of(to)), to, sources)
        if mode == "rn" and to in ("f32", "f64"):
            return Rule(f"{x}.astype({name_of(to)})", to, sources)
        if size_of(of) == 8:  # float64 does not hold every value
            raise i.unknown("rounding mode")
        return Rule(f"round_to({x}.astype(np.float64), '{to}', '{mode}')", to, sources)
    integral = next((call for m, call in _INTEGRAL.items() if m in mods), "")
    if to not in FLOATS:
        return Rule(f"to_integer({integral or 'np.trunc'}({x}), {name_of(to)})", to, sources)
    if integral:
        x = f"{integral}({x})"
    for clamp in _CLAMPS.keys() & mods:
        x = _CLAMPS[clamp].format(x)
    if "satfinite" in mods:
        x = f"np.clip({x}, -{FORMATS[kind][2]}, {FORMATS[kind][2]})"
    if to != of or to == "bf16":
        x = f"round_to({x}, '{kind}', '{mode}')"
    return Rule(f"ftz({x})" if "ftz" in mods and to == "f32" else x, to, sources)


def name_of(type_: str) -> str:
    """numpy's name of a type: "np.uint32"."""
    return f"np.{DTYPES[type_].name}"
