"""Conversions: cvt -> a numpy expression, by a rule as in alu.py."""

from __future__ import annotations

from bigkernel.testing.ptx.alu import ROUNDINGS, Rule, name_of, rounding, rule, unknown
from bigkernel.testing.ptx.syntax import Instruction
from bigkernel.testing.ptx.types import DTYPES, FLOATS, HALF_MAX, PACKED, size_of


@rule("cvt")
def _cvt(i: Instruction) -> Rule:
    """PTX ISA, "Data Movement and Conversion: cvt"."""
    mods = set(i.mods[:-2])
    to, of = i.mods[-2:]
    if i.mods[0] == "pack":
        return _cvt_pack(i)
    if to not in DTYPES or of not in DTYPES or mods - _CVT_MODS:
        raise unknown(i)
    mode = rounding(i)
    integral = next((m for m in i.mods if m in ("rni", "rzi", "rmi", "rpi")), None)
    if to in PACKED:
        if of != "f32" or to not in ("f16x2", "bf16x2"):
            raise unknown(i)
        kind, relu = to.removesuffix("x2"), "relu" in mods
        return Rule(f"cvt_pair({{0}}, {{1}}, '{kind}', '{mode}', {relu})", to, ("f32", "f32"))
    if to == "tf32":
        if "rna" not in mods:
            raise unknown(i, "rounding mode")
        return Rule("cvt_tf32({0})", "f32", ("f32",))
    if to not in FLOATS and of not in FLOATS:
        if "sat" in mods:
            return Rule(f"cvt_clip({{0}}, '{to}')", to, (of,))
        return Rule(f"{{0}}.astype(np.{name_of(to)})", to, (of,))
    if of not in FLOATS:
        if mode == "rn" and to != "bf16":
            return Rule(f"{{0}}.astype(np.{name_of(to)})", to, (of,))
        if size_of(of) == 8:
            raise unknown(i, "rounding mode")
        return Rule(f"round_to({{0}}.astype(np.float64), '{to}', '{mode}')", to, (of,))
    value = "bf16_to_f32({0})" if of == "bf16" else "{0}"
    if "ftz" in mods and of == "f32":
        value = f"ftz({value})"
    if to not in FLOATS:
        return Rule(f"to_integer({value}, '{to}', '{integral or 'rzi'}')", to, (of,))
    if integral:
        call = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}[integral]
        value = f"np.{call}({value})"
    if "relu" in mods:
        value = f"relu({value})"
    if "satfinite" in mods:
        value = f"np.clip({value}, -{HALF_MAX[to]}, {HALF_MAX[to]})"
    widened = size_of(to) >= size_of(of) and to != "bf16" and not integral
    if to == "bf16" or (not widened and to != of):
        value = f"round_to({value}, '{to}', '{mode}')"
    elif to != of:
        value = f"{value}.astype(np.{name_of(to)})"
    if "sat" in mods:
        value = f"saturate({value})"
    if "ftz" in mods and to == "f32":
        value = f"ftz({value})"
    return Rule(value, to, (of,))


_CVT_MODS = {*ROUNDINGS, "rna", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "satfinite", "relu"}


def _cvt_pack(i: Instruction) -> Rule:
    """PTX ISA, "Data Movement and Conversion: cvt.pack" to 8 and 16 bits."""
    _, sat, to, of, *rest = i.mods
    if sat != "sat" or of != "s32" or to not in ("u8", "s8", "u16", "s16"):
        raise unknown(i)
    sources = ("s32", "s32", "b32") if rest else ("s32", "s32")
    return Rule(f"cvt_pack('{to}', {', '.join(f'{{{k}}}' for k in range(len(sources)))})", "b32",
                sources)  # fmt: skip
