"""Each basic block -> the source of one Python function of numpy calls."""

from __future__ import annotations

from typing import Any

import numpy as np

from bigkernel.testing.ptx import numerics, warp
from bigkernel.testing.ptx.alu import comparison, name_of, rule
from bigkernel.testing.ptx.lanes import Lanes, Layout, guarded
from bigkernel.testing.ptx.machine import Machine
from bigkernel.testing.ptx.memory import SHARED_BASE
from bigkernel.testing.ptx.parser import Imm, Instruction, Name, Operand, items_of
from bigkernel.testing.ptx.program import Flat
from bigkernel.testing.ptx.types import BITS, DTYPES, FLOATS, PACKED, Array, size_of
from bigkernel.testing.ptx.writer import Piece, Writer

# Modifiers of memory instructions that change nothing here; vectors show in the operands.
_NO_MATTER = {
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "volatile", "relaxed", "acquire"),
    *("release", "acq_rel", "cta", "gpu", "sys", "cluster", "unified", "mmio", "noftz"),
    *("L1:evict_normal", "L1:evict_unchanged", "L1:evict_first", "L1:evict_last"),
    *("L1:no_allocate", "L2:cache_hint", "L2:64B", "L2:128B", "L2:256B", "L2:evict_last"),
    *("L2:evict_first", "L2:evict_normal", "v2", "v4", "v8"),
}
_SPACES = {"global", "shared", "shared:cta", "local", "param", "param:entry", "param:func", "const"}
_NOTHING = {"membar", "fence", "prefetch", "prefetchu", "nanosleep", "griddepcontrol", "discard"}
_NOTHING |= {"applypriority", "pmevent", "setmaxnreg"}
# The special registers and their types; %cc, which PTX does not name, is the carry flag.
_SPECIAL = dict.fromkeys(("%dynamic_smem_size", "%total_smem_size"), "u32") | {
    name: f"u{8 * lanes.itemsize}"
    for name, lanes in Layout((1, 1, 1), (1, 1, 1), range(1)).special.items()
}
_ATOMIC = {"add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas"}
# Warp-wide: modes, types of results, types of operands ("t": the instruction's).
_WARP = {
    "shfl": ("up down bfly idx", "b32 pred", "b32 u32 u32 u32"),
    "vote": ("all any uni ballot", "t", "pred u32"),
    "match": ("any all", "b32 pred", "t u32"),
    "redux": ("add min max and or xor", "t", "t u32"),
    "activemask": ("", "b32", ""),
    "elect": ("", "b32 pred", "u32"),
    "bar": ("warp", "", "u32"),  # the block's barriers end a basic block
}


def translate(flat: Flat) -> list[Piece]:
    """All blocks of a kernel as functions."""
    flat.registers |= {"%cc": "pred", **_SPECIAL}
    writers = [_BlockWriter(flat, number) for number in range(len(flat.blocks))]
    read: set[str] = set().union(*(w.inputs for w in writers))
    return [w.finish(w.tail, read, _HELPERS) for w in writers]


class _BlockWriter(Writer):
    """Writes one basic block, instruction by instruction."""

    def __init__(self, flat: Flat, number: int) -> None:
        super().__init__(flat)
        block = flat.blocks[number]
        for k in block.body:
            self.instruction(k, flat.instructions[k])
        self.tail = "None" if block.end is None else self.ending(flat.instructions[block.end])

    def instruction(self, k: int, i: Instruction) -> None:
        """Append the lines of one instruction."""
        guard = self.read(i.guard, "pred") if i.guard else None
        try:
            if "cc" in i.mods or i.op in ("addc", "subc", "madc"):
                self.with_carry(i, guard)
            elif i.op in _WARP:
                self.warp_wide(k, i, guard)
            elif hasattr(self, f"op_{i.op}"):
                getattr(self, f"op_{i.op}")(k, i, guard)
            elif i.op not in _NOTHING:
                self.expression(i, guard)
        except (KeyError, ValueError, IndexError) as error:  # missing in a table, or operands
            raise i.unknown() from error

    def expression(self, i: Instruction, guard: str | None) -> None:
        """What alu.py knows."""
        template, result, types = rule(i)
        operands = list(zip(i.operands[1:], types, strict=True))
        sources = [self.read(operand, type_) for operand, type_ in operands]
        if all(isinstance(operand, Imm) for operand, _ in operands):
            sources[0] = self.array(*operands[0])
        self.write(i.operands[0], template.format(*sources), result, guard)

    def with_carry(self, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Extended-Precision Integer Arithmetic": add.cc, addc, sub.cc, madc ..."""
        if {*i.mods[:-1]} - {"cc", "lo", "hi"}:
            raise i.unknown()
        unsigned = f"u{8 * size_of(i.type)}"
        carry = self.read(Name("%cc"), "pred") if i.op.endswith("c") else "np.False_"
        if i.op.startswith("mad"):
            a, b = (self.array(o, i.type) for o in i.operands[1:3])
            product = f"mul_hi({a}, {b})" if "hi" in i.mods else f"({a} * {b})"
            a = self.let(f"{product}.view({name_of(unsigned)})")
        else:
            a = self.array(i.operands[1], unsigned)
        call = "sub_borrow" if i.op.startswith("sub") else "add_carry"
        out = self.let(f"{call}({a}, {self.read(i.operands[-1], unsigned)}, {carry})")
        self.write(i.operands[0], f"{out}[0]", unsigned, guard)
        if "cc" in i.mods:
            self.write(Name("%cc"), f"{out}[1]", "pred", guard)

    def warp_wide(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization": vote .. elect; "Data Movement: shfl.sync"."""
        modes, gives, takes = (column.split() for column in _WARP[i.op])
        mode = [m for m in i.mods if m not in ("sync", i.type)]
        synced = i.op in ("bar", "activemask") or "sync" in i.mods
        if not synced or len(mode) != bool(modes) or {*mode} - {*modes}:
            raise i.unknown()
        if i.op == "redux" and i.type in FLOATS:
            raise i.unknown("type")
        results, operands = (items_of(i.operands[0]), i.operands[1:]) if gives else ((), i.operands)
        types = [i.type if t == "t" else t for t in gives]
        call = [k, repr("".join(mode))]
        for operand, t in zip(operands, takes, strict=True):
            call.append(self.array(operand, i.type if t == "t" else t))
        self.effect(guard, f"warp.{i.op}", call, list(zip(results, types, strict=False)))

    def op_mov(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: mov", packing and unpacking included."""
        target, source = i.operands
        size = size_of(i.type)
        if isinstance(source, tuple):
            parts = [self.read(item, f"b{8 * size // len(source)}") for item in source]
            packed = f"pack(L, {', '.join(parts)}).view(np.{BITS[size].name})[:, 0]"
            self.write(target, packed, f"b{8 * size}", guard)
        elif isinstance(target, tuple):
            part = f"b{8 * size // len(target)}"
            whole = self.let(f"unpack({self.read(source, f'b{8 * size}')}, {name_of(part)})")
            for j, item in enumerate(target):
                self.write(item, f"{whole}[{j}]", part, guard)
        else:
            self.write(target, self.array(source, i.type), i.type, guard)

    def op_cvta(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: cvta": only shared addresses differ from generic ones."""
        value = self.array(i.operands[1], i.type)
        if {"shared", "shared:cta"} & {*i.mods}:
            value = f"{value} {'-' if 'to' in i.mods else '+'} {SHARED_BASE}"
        self.write(i.operands[0], value, i.type, guard)

    def op_isspacep(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: isspacep"."""
        address = self.read(i.operands[1], "s64")
        self.write(i.operands[0], f"M.is_space({address}, {i.mods[-1]!r})", "pred", guard)

    def op_setp(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Comparison and Selection: setp", with its two destinations."""
        signs = {"and": "&", "or": "|", "xor": "^"}
        combine = [m for m in i.mods[1:-1] if m != "ftz"]
        if {*combine} - signs.keys():
            raise i.unknown()
        a, b = self.array(i.operands[1], i.type), self.read(i.operands[2], i.type)
        truth = self.let(comparison(i).format(a, b))
        targets = items_of(i.operands[0])
        values = [f"{truth}[{j}::2]" if i.type in PACKED else f"{'~' * j}{truth}" for j in (0, 1)]
        for target, value in zip(targets, values, strict=False):
            for m in combine:
                value = f"{value} {signs[m]} {self.read(i.operands[3], 'pred')}"
            self.write(target, value, "pred", guard)

    def space(self, i: Instruction, *allowed: str) -> str:
        """The state space; other modifiers must be known."""
        rest = {*i.mods[:-1]} - _NO_MATTER - _SPACES - {*allowed}
        if rest or i.type not in DTYPES or i.type == "pred":
            raise i.unknown(f"modifier .{min(rest)}" if rest else "type")
        return repr(next((m.split(":")[0] for m in i.mods if m in _SPACES), "generic"))

    def op_ld(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: ld"."""
        items = items_of(i.operands[0])
        at = self.address(i.operands[1])
        call = [k, self.space(i), at, size_of(i.type), len(items)]
        self.effect(guard, "Machine.load", call, [(item, i.type) for item in items])

    op_ldu = op_ld

    def op_st(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: st"."""
        size, at = size_of(i.type), self.address(i.operands[0])
        values = [self.array(item, f"b{8 * size}") for item in items_of(i.operands[1])]
        self.effect(guard, "Machine.store", [k, self.space(i), at, size, *values])

    def op_atom(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization: atom" and "red"."""
        space = self.space(i, *_ATOMIC)
        (operation,) = (m for m in i.mods if m in _ATOMIC)
        results, (place, *sources) = i.operands[: i.op == "atom"], i.operands[i.op == "atom" :]
        bits = f"b{8 * size_of(i.type)}"
        values = [self.array(o, bits) for o in sources[: 2 if operation == "cas" else 1]]
        keep = [(o, bits) for o in results if o != Name("_")]
        call = [k, space, self.address(place), repr(operation), repr(i.type)]
        self.effect(guard, "Machine.update", [*call, bool(keep), *values], keep)

    op_red = op_atom

    def op_cp(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: cp.async", commit_group, wait_group, wait_all."""
        kind = i.mods[1] if i.mods[0] == "async" else ""
        if kind == "commit_group":
            self.effect(guard, "Machine.commit", [])
        elif kind in ("wait_group", "wait_all"):
            left = i.operands[0] if i.operands else Imm(-1)
            assert isinstance(left, Imm)
            self.effect(guard, "Machine.wait", [left.value])
        elif kind in ("ca", "cg") and not {*i.mods[2:]} - _SPACES - _NO_MATTER:
            to, of = (self.address(o) for o in i.operands[:2])
            size = i.operands[2]
            assert isinstance(size, Imm)
            rest = i.operands[3 : len(i.operands) - ("L2:cache_hint" in i.mods)]
            taken = self.array(rest[0] if rest else size, "u32")
            self.effect(guard, "Machine.copy", [k, to, of, size.value, taken])
        else:
            raise i.unknown()

    def op_createpolicy(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "createpolicy": caches do not matter here."""
        self.write(i.operands[0], self.array(Imm(0), "b64"), "b64", guard)

    def op_ldmatrix(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Warp-Level Matrix Instructions: ldmatrix"."""
        items = self.matrices(i, i.operands[0])
        call = [k, self.address(i.operands[1]), len(items), "trans" in i.mods]
        self.effect(guard, "warp.ldmatrix", call, [(item, "b32") for item in items])

    def op_stmatrix(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Warp-Level Matrix Instructions: stmatrix"."""
        values = [self.array(item, "b32") for item in self.matrices(i, i.operands[1])]
        call = [k, self.address(i.operands[0]), "trans" in i.mods, *values]
        self.effect(guard, "warp.stmatrix", call)

    def matrices(self, i: Instruction, operand: Operand) -> tuple[Operand, ...]:
        """The registers of 8 x 8 matrices of 16 bits."""
        items = items_of(operand)
        known = {"sync", "aligned", "m8n8", "trans", "shared", "shared:cta", "b16"}
        if {*i.mods} - known != {f"x{len(items)}"}:
            raise i.unknown()
        return items

    def op_mma(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Warp-Level Matrix Instructions: mma"."""
        shape, (d_type, kind, b_type, c_type) = i.mods[2], i.mods[5:]
        known = {("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16")}
        known |= {("m16n8k8", "bf16"), ("m16n8k8", "tf32"), ("m16n8k4", "tf32")}
        if i.mods[:2] != ("sync", "aligned") or i.mods[3:5] != ("row", "col") or guard:
            raise i.unknown()
        if (shape, kind) not in known or b_type != kind or d_type != c_type:
            raise i.unknown()
        d, a, b, c = map(items_of, i.operands)
        fragments = []
        for side, items in (("a", a), ("b", b)):
            words = ", ".join(self.array(item, "b32") for item in items)
            fragments.append(self.let(f"warp.fragment_{side}({kind!r}, {words})"))
        type_ = "b32" if d_type == "f16" else "f32"
        old = ", ".join(self.array(item, type_) for item in c)
        self.effect(None, "warp.mma", [k, *fragments, f"({old})"], [(item, type_) for item in d])

    def ending(self, i: Instruction) -> str:
        """What the scheduler needs from the block's last instruction: (guard, operands)."""
        guard = self.read(i.guard, "pred") if i.guard else "None"
        operands = [*i.operands] if i.op in ("bar", "barrier") else [*i.operands][: i.op == "brx"]
        types = ["u32"] * len(operands)
        if "red" in i.mods:  # its result comes first, its predicate last
            types[-1] = "pred"
            del operands[0], types[0]
        values = "".join(f"{self.array(o, t)}, " for o, t in zip(operands, types, strict=True))
        return f"({guard}, ({values}))"


# What the generated functions call.


def _fill(lanes: Lanes, value: Any) -> Array:
    return np.full(lanes.n, value)


def _pack(lanes: Lanes, *parts: Any) -> Array:
    """[lanes, parts], from arrays and numbers."""
    return np.stack([np.broadcast_to(part, (lanes.n,)) for part in parts], axis=1)


def _unpack(whole: Array, dtype: Any) -> list[Array]:
    parts = np.ascontiguousarray(whole).view(dtype).reshape(len(whole), -1)
    return [np.ascontiguousarray(parts[:, j]) for j in range(parts.shape[1])]


_HELPERS = vars(numerics) | {
    "warp": warp,
    "Machine": Machine,
    "guarded": guarded,
    "fill": _fill,
    "pack": _pack,
    "unpack": _unpack,
}
