"""Arithmetic, comparison and logic: instruction -> a numpy expression.

Each ``@rule`` names the section of the PTX ISA ("Instruction Set") whose semantics it gives. A rule
returns the expression with ``{0}`` .. for its operands, the operands' types and the result's.
Modifiers that a rule does not know end as UnknownInstruction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bigkernel.testing.ptx.errors import UnknownInstruction
from bigkernel.testing.ptx.syntax import Imm, Instruction
from bigkernel.testing.ptx.types import DTYPES, FLOATS, PACKED, size_of


@dataclass(frozen=True, slots=True)
class Rule:
    """``template`` over operands of types ``sources`` gives a value of type ``result``."""

    template: str
    result: str
    sources: tuple[str, ...]


RULES: dict[str, Callable[[Instruction], Rule]] = {}
ROUNDINGS = {"rn", "rz", "rm", "rp"}


def rule(*names: str) -> Callable[[Callable[[Instruction], Rule]], Callable[[Instruction], Rule]]:
    """Register a function as the rule of these opcodes."""

    def register(function: Callable[[Instruction], Rule]) -> Callable[[Instruction], Rule]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def unknown(i: Instruction, why: str = "") -> UnknownInstruction:
    """The error for an instruction that the emulator does not run."""
    opcode = ".".join((i.op, *i.mods))
    return UnknownInstruction(
        f"PTX line {i.line}: instruction '{opcode}' is not known to the emulator"
        f"{f' ({why})' if why else ''}: {i.text}"
    )


def modifiers(i: Instruction, *allowed: str) -> set[str]:
    """The modifiers before the type, each of which must be among ``allowed``."""
    mods = set(i.mods[:-1])
    if extra := mods - set(allowed):
        raise unknown(i, f"modifier .{min(extra)}")
    return mods


def _floating(i: Instruction, template: str, count: int, *allowed: str) -> Rule:
    """A float operation: adds bf16 widening, .ftz, .sat, .relu around ``template``."""
    t = i.type
    if t not in FLOATS:
        raise unknown(i, f"type .{t}")
    mods = modifiers(i, *allowed)
    names = [f"{{{k}}}" for k in range(count)]
    if t.startswith("bf16"):
        names = [f"bf16_to_f32({name})" for name in names]
    if "ftz" in mods and t == "f32":
        names = [f"ftz({name})" for name in names]
    out = template.format(*names)
    if "ftz" in mods and t == "f32":
        out = f"ftz({out})"
    if "sat" in mods:
        out = f"saturate({out})"
    if "relu" in mods:
        out = f"relu({out})"
    if t.startswith("bf16"):
        out = f"round_to({out}, 'bf16')"
    return Rule(out, t, (t,) * count)


def rounding(i: Instruction) -> str:
    """The rounding modifier, "rn" where there is none."""
    return next((m for m in i.mods if m in ROUNDINGS), "rn")


@rule("add", "sub")
def _add(i: Instruction) -> Rule:
    """PTX ISA, "Integer Arithmetic", "Floating Point", "Half Precision": add, sub."""
    sign = "+" if i.op == "add" else "-"
    t = i.type
    if t not in FLOATS:
        if "sat" in modifiers(i, "sat"):
            return Rule(f"saturating({{0}}.astype(np.int64) {sign} {{1}})", t, (t, t))
        return Rule(f"{{0}} {sign} {{1}}", t, (t, t))
    if rounding(i) == "rn":
        return _floating(i, f"({{}} {sign} {{}})", 2, "rn", "ftz", "sat", "noftz")
    if t != "f32":
        raise unknown(i, "rounding mode")
    exact = f"odd_sum({{}}.astype(np.float64), np.asarray({sign}{{}}, np.float64))"
    return _floating(i, f"round_to({exact}, 'f32', '{rounding(i)}')", 2, *ROUNDINGS, "ftz", "sat")


@rule("mul")
def _mul(i: Instruction) -> Rule:
    """PTX ISA, "Integer Arithmetic: mul", "Floating Point: mul"."""
    t = i.type
    if t in FLOATS:
        if rounding(i) == "rn":
            return _floating(i, "({} * {})", 2, "rn", "ftz", "sat")
        if t != "f32":
            raise unknown(i, "rounding mode")
        exact = "np.multiply({}, {}, dtype=np.float64)"
        return _floating(
            i, f"round_to({exact}, 'f32', '{rounding(i)}')", 2, *ROUNDINGS, "ftz", "sat"
        )
    mods = modifiers(i, "lo", "hi", "wide")
    if "wide" in mods:
        wide = f"{t[0]}{16 * size_of(t)}"
        return Rule(f"np.multiply({{0}}, {{1}}, dtype=np.{name_of(wide)})", wide, (t, t))
    return Rule("mul_hi({0}, {1})" if "hi" in mods else "{0} * {1}", t, (t, t))


@rule("mad", "fma")
def _mad(i: Instruction) -> Rule:
    """PTX ISA, "Integer Arithmetic: mad", "Floating Point: fma", "Half Precision: fma"."""
    t = i.type
    if t in FLOATS:
        modifiers(i, "rn", "rz", "rm", "rp", "ftz", "sat", "relu")
        kind, flush = t.removesuffix("x2"), "ftz" in i.mods and t == "f32"
        names = [f"ftz({{{k}}})" if flush else f"{{{k}}}" for k in range(3)]
        out = f"fma({', '.join(names)}, '{kind}', '{rounding(i)}')"
        out = f"ftz({out})" if flush else out
        if "relu" in i.mods or "sat" in i.mods:
            if kind == "bf16":
                out = f"bf16_to_f32({out})"
            out = f"relu({out})" if "relu" in i.mods else f"saturate({out})"
            out = f"round_to({out}, 'bf16')" if kind == "bf16" else out
        return Rule(out, t, (t, t, t))
    mods = modifiers(i, "lo", "hi", "wide")
    if "wide" in mods:
        wide = f"{t[0]}{16 * size_of(t)}"
        product = f"np.multiply({{0}}, {{1}}, dtype=np.{name_of(wide)})"
        return Rule(f"{product} + {{2}}", wide, (t, t, wide))
    return Rule("mul_hi({0}, {1}) + {2}" if "hi" in mods else "{0} * {1} + {2}", t, (t, t, t))


@rule("div")
def _div(i: Instruction) -> Rule:
    """PTX ISA, "Integer Arithmetic: div", "Floating Point: div"; .approx and .full are exact."""
    t = i.type
    if t in FLOATS:
        if rounding(i) == "rn":
            return _floating(i, "({} / {})", 2, "rn", "approx", "full", "ftz")
        exact = "({}.astype(np.float64) / {})"
        return _floating(i, f"round_to({exact}, 'f32', '{rounding(i)}')", 2, *ROUNDINGS, "ftz")
    modifiers(i)
    return Rule("int_div({0}, {1})", t, (t, t))


@rule("rem")
def _rem(i: Instruction) -> Rule:
    """PTX ISA, "Integer Arithmetic: rem"; the sign is the dividend's."""
    modifiers(i)
    return Rule("{0} - int_div({0}, {1}) * {1}", i.type, (i.type,) * 2)


@rule("sad")
def _sad(i: Instruction) -> Rule:
    """PTX ISA, "Integer Arithmetic: sad"."""
    modifiers(i)
    return Rule("np.where({0} < {1}, {1} - {0}, {0} - {1}) + {2}", i.type, (i.type,) * 3)


@rule("rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh")
def _function(i: Instruction) -> Rule:
    """PTX ISA, "Floating Point": rcp .. tanh; .approx forms are more exact than stated."""
    template = {
        "rcp": "reciprocal({})",
        "sqrt": "np.sqrt({})",
        "rsqrt": "rsqrt({})",
        "sin": "np.sin({})",
        "cos": "np.cos({})",
        "lg2": "np.log2({})",
        "ex2": "np.exp2({})",
        "tanh": "np.tanh({})",
    }[i.op]
    mode = rounding(i)
    if mode != "rn":
        if i.op not in ("rcp", "sqrt") or i.type != "f32":
            raise unknown(i, "rounding mode")
        template = f"round_to({template.format('{}.astype(np.float64)')}, 'f32', '{mode}')"
    return _floating(i, template, 1, "approx", "ftz", *ROUNDINGS)


@rule("neg", "abs")
def _neg(i: Instruction) -> Rule:
    """PTX ISA, "Integer Arithmetic" and "Floating Point": neg, abs."""
    t = i.type
    mods = modifiers(i, "ftz")
    if t.startswith("bf16"):
        bits = "{0} ^ np.uint16(0x8000)" if i.op == "neg" else "{0} & np.uint16(0x7fff)"
        return Rule(bits, t, (t,))
    out = "-{0}" if i.op == "neg" else "np.abs({0})"
    return Rule(f"ftz({out})" if "ftz" in mods and t == "f32" else out, t, (t,))


@rule("copysign")
def _copysign(i: Instruction) -> Rule:
    """PTX ISA, "Floating Point: copysign": the sign of the first operand on the second."""
    modifiers(i)
    return Rule("np.copysign({1}, {0})", i.type, (i.type,) * 2)


@rule("testp")
def _testp(i: Instruction) -> Rule:
    """PTX ISA, "Floating Point: testp"."""
    tests = {
        "finite": "np.isfinite({0})",
        "infinite": "np.isinf({0})",
        "number": "~np.isnan({0})",
        "notanumber": "np.isnan({0})",
        "normal": "np.isfinite({0}) & (np.abs({0}) >= np.finfo({0}.dtype).tiny)",
        "subnormal": "({0} != 0) & (np.abs({0}) < np.finfo({0}.dtype).tiny)",
    }
    (test,) = modifiers(i, *tests)
    return Rule(tests[test], "pred", (i.type,))


@rule("min", "max")
def _min(i: Instruction) -> Rule:
    """PTX ISA, "Integer Arithmetic", "Floating Point": min, max; -0 is below +0."""
    t = i.type
    if t not in FLOATS:
        mods = modifiers(i, "relu")
        out = f"np.{i.op}imum({{0}}, {{1}})"
        return Rule(f"np.maximum({out}, 0)" if "relu" in mods else out, t, (t, t))
    nan = "NaN" in i.mods
    return _floating(i, f"extreme({{}}, {{}}, {nan}, {i.op == 'min'})", 2, "ftz", "NaN", "relu")


_ORDERED = {
    "eq": "({0} == {1})",
    "ne": "(({0} < {1}) | ({0} > {1}))",
    **{"lt": "({0} < {1})", "le": "({0} <= {1})", "gt": "({0} > {1})", "ge": "({0} >= {1})"},
    "num": "(({0} == {0}) & ({1} == {1}))",
}
_OPPOSITE = {"equ": "ne", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt", "nan": "num"}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparison(i: Instruction, compare: str, t: str) -> str:
    """PTX ISA, "Comparison and Selection": the boolean expression of one comparison operator."""
    if t == "pred" or compare not in {*_ORDERED, *_OPPOSITE, *_UNSIGNED, "neu"}:
        raise unknown(i, f"comparison .{compare}")
    if compare == "neu" or (compare == "ne" and t not in FLOATS):
        out = "({0} != {1})"
    elif compare in _OPPOSITE:
        out = f"~{_ORDERED[_OPPOSITE[compare]]}"
    else:
        out = _ORDERED[_UNSIGNED.get(compare, compare)]
    if t.startswith("bf16"):
        return out.format("bf16_to_f32({0})", "bf16_to_f32({1})")
    return out.format("ftz({0})", "ftz({1})") if "ftz" in i.mods and t == "f32" else out


@rule("set")
def _set(i: Instruction) -> Rule:
    """PTX ISA, "Comparison and Selection: set": all ones or 1.0 where true."""
    modifiers(i, i.mods[0], "ftz", *DTYPES)
    target, t = i.mods[-2:]
    if t in PACKED and target in ("u32", "s32"):
        target = "u16x2"  # a mask for each half
    if (target in PACKED) != (t in PACKED):
        raise unknown(i, "packed into plain")
    truth = comparison(i, i.mods[0], t)
    one = {"f32": "np.float32(1)", "f16": "np.float16(1)", "f16x2": "np.float16(1)"}
    ones = {"u32": "np.uint32(0xffffffff)", "s32": "np.int32(-1)", "u16": "np.uint16(0xffff)"}
    ones["u16x2"] = ones["u16"]
    bf16 = dict.fromkeys(("bf16", "bf16x2"), "np.uint16(0x3f80)")
    value = (one | ones | bf16).get(target)
    if value is None:
        raise unknown(i, f"type .{target}")
    return Rule(f"np.where({truth}, {value}, {value[: value.index('(')]}(0))", target, (t, t))


@rule("selp")
def _selp(i: Instruction) -> Rule:
    """PTX ISA, "Comparison and Selection: selp"."""
    modifiers(i)
    return Rule("np.where({2}, {0}, {1})", i.type, (i.type, i.type, "pred"))


@rule("and", "or", "xor", "not")
def _logic(i: Instruction) -> Rule:
    """PTX ISA, "Logic and Shift": and, or, xor, not."""
    modifiers(i)
    if i.op == "not":
        return Rule("~{0}", i.type, (i.type,))
    sign = {"and": "&", "or": "|", "xor": "^"}[i.op]
    return Rule(f"{{0}} {sign} {{1}}", i.type, (i.type,) * 2)


@rule("cnot")
def _cnot(i: Instruction) -> Rule:
    """PTX ISA, "Logic and Shift: cnot"."""
    return Rule("({0} == 0).astype({0}.dtype)", i.type, (i.type,))


@rule("lop3")
def _lop3(i: Instruction) -> Rule:
    """PTX ISA, "Logic and Shift: lop3": the table's bit (4a + 2b + c), as a sum of products."""
    modifiers(i)
    table = i.operands[-1]
    if not isinstance(table, Imm):
        raise unknown(i, "table is no constant")
    terms = [
        "(" + " & ".join(("" if k >> (2 - j) & 1 else "~") + f"{{{j}}}" for j in range(3)) + ")"
        for k in range(8)
        if table.value >> k & 1
    ]
    t = i.type
    return Rule(" | ".join(terms) or "{0} ^ {0}", t, (t, t, t, t))


@rule("shl", "shr")
def _shift(i: Instruction) -> Rule:
    """PTX ISA, "Logic and Shift": shl, shr; larger amounts leave zeros or the sign."""
    modifiers(i)
    t, amount = i.type, i.operands[-1]
    bits = 8 * size_of(t)
    sign = "<<" if i.op == "shl" else ">>"
    if isinstance(amount, Imm) and amount.value < bits:
        return Rule(f"{{0}} {sign} np.{name_of(t)}({amount.value})", t, (t, "u32"))
    if t[0] == "s" and i.op == "shr":
        return Rule(f"{{0}} >> np.minimum({{1}}, {bits - 1}).astype({{0}}.dtype)", t, (t, "u32"))
    shifted = f"{{0}} {sign} ({{1}} & {bits - 1}).astype({{0}}.dtype)"
    return Rule(f"np.where({{1}} > {bits - 1}, {{0}}.dtype.type(0), {shifted})", t, (t, "u32"))


@rule("shf")
def _shf(i: Instruction) -> Rule:
    """PTX ISA, "Logic and Shift: shf": 32 bits of the 64-bit word {1}:{0}."""
    mods = modifiers(i, "l", "r", "wrap", "clamp")
    n = "np.minimum({2}, 32)" if "clamp" in mods else "({2} & 31)"
    word = "(({1}.astype(np.uint64) << np.uint64(32)) | {0})"
    if "l" in mods:
        return Rule(f"({word} >> (32 - {n}).astype(np.uint64)).astype(np.uint32)", "b32", _B32)
    return Rule(f"({word} >> {n}.astype(np.uint64)).astype(np.uint32)", "b32", _B32)


_B32 = ("b32", "b32", "u32")


@rule("bfe", "bfi", "prmt", "popc", "clz", "brev", "bfind", "dp4a", "bmsk")
def _bits(i: Instruction) -> Rule:
    """PTX ISA, "Integer Arithmetic": bfe .. dp4a; "Data Movement: prmt"."""
    t = i.type
    if i.op == "bfe":
        modifiers(i)
        return Rule("bfe({0}, {1}, {2})", t, (t, "u32", "u32"))
    if i.op == "bfi":
        modifiers(i)
        return Rule("bfi({0}, {1}, {2}, {3})", t, (t, t, "u32", "u32"))
    if i.op == "prmt":
        modifiers(i)
        return Rule("prmt({0}, {1}, {2})", "b32", _B32)
    if i.op == "popc":
        modifiers(i)
        return Rule("np.bitwise_count({0}).astype(np.uint32)", "u32", (t,))
    if i.op in ("clz", "bfind"):
        shift = "shiftamt" in modifiers(i, "shiftamt") or i.op == "clz"
        return Rule(f"{i.op}({{0}}{'' if i.op == 'clz' else f', {shift}'})", "u32", (t,))
    if i.op == "brev":
        modifiers(i)
        return Rule("brev({0})", t, (t,))
    if i.op == "bmsk" and i.mods == ("clamp", "b32"):
        return Rule("bfi(np.uint32(0xffffffff), {0} & 0, {0}, {1})", "b32", ("b32", "b32"))
    if i.op == "dp4a":
        a, b = i.mods
        return Rule(f"dp4a({{0}}, {{1}}, {{2}}, '{a[0]}8', '{b[0]}8')", "b32", _B32)
    raise unknown(i)


def name_of(type_: str) -> str:
    """numpy's name of a type."""
    return str(DTYPES[type_].name)
