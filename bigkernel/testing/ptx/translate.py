"""Each basic block -> the source of one Python function of numpy calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigkernel.testing.ptx import warp
from bigkernel.testing.ptx.alu import RULES, comparison, modifiers, unknown
from bigkernel.testing.ptx.errors import UnknownInstruction
from bigkernel.testing.ptx.memory import LOCAL_BASE, SHARED_BASE
from bigkernel.testing.ptx.numerics import HELPERS
from bigkernel.testing.ptx.parser import Addr, Imm, Instruction, Operand, Reg, Sym, Vec
from bigkernel.testing.ptx.program import Flat, successors
from bigkernel.testing.ptx.types import (
    BITS,
    BOOL,
    DTYPES,
    PACKED,
    SIGNED,
    U32,
    U64,
    bits_dtype,
    size_of,
)

_CACHE_HINTS = {
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "volatile", "relaxed", "acquire"),
    *("release", "acq_rel", "cta", "gpu", "sys", "cluster", "unified", "mmio", "noftz"),
    *("L1:evict_normal", "L1:evict_unchanged", "L1:evict_first", "L1:evict_last"),
    *("L1:no_allocate", "L2:cache_hint", "L2:64B", "L2:128B", "L2:256B", "L2:evict_last"),
    *("L2:evict_first", "L2:evict_normal"),
}
_SPACES = {"global", "shared", "shared:cta", "local", "param", "param:entry", "param:func", "const"}
_NOTHING = {"membar", "fence", "prefetch", "prefetchu", "nanosleep", "griddepcontrol", "discard"}
_NOTHING |= {"applypriority", "pmevent", "setmaxnreg"}


@dataclass(slots=True)
class Piece:
    """A translated basic block."""

    run: Callable[..., Any]
    inputs: list[str]
    outputs: list[str]
    source: str


@dataclass(slots=True)
class _Value:
    """A Python variable that holds a register's lanes."""

    name: str
    dtype: np.dtype[Any]
    constant: bool = False


def canonical(type_: str) -> np.dtype[Any]:
    """The dtype in which the register file keeps a register declared with this type."""
    return DTYPES[type_] if type_ in ("f32", "f64") else bits_dtype(type_)


class Translation:
    """All blocks of a kernel, translated."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self.namespace: dict[str, Any] = {**HELPERS, "warp": warp, "fill": _fill, "pack": _pack}
        self.namespace["unpack"] = _unpack
        flat.registers["%cc"] = "pred"  # the carry flag
        self.constants: dict[tuple[str, bytes], str] = {}
        writers = [_Writer(self, number) for number in range(len(flat.blocks))]
        live = _liveness(flat, writers)
        self.pieces = [w.finish(live[number]) for number, w in enumerate(writers)]

    def constant(self, value: Any, dtype: np.dtype[Any]) -> str:
        """A name for a numpy scalar."""
        key = (dtype.str, value.tobytes())
        if key not in self.constants:
            self.constants[key] = f"c{len(self.constants)}"
            self.namespace[self.constants[key]] = value
        return self.constants[key]

    def register_type(self, name: str) -> str | None:
        """The declared type of a register; None for other names."""
        if name in self.flat.registers:
            return self.flat.registers[name]
        if name in ("%clock64", "%globaltimer"):
            return "u64"
        return "u32" if name.startswith("%") else None


def _liveness(flat: Flat, writers: list[_Writer]) -> list[set[str]]:
    """For each block the registers that later blocks read."""
    live_in = [set(w.inputs) for w in writers]
    live_out: list[set[str]] = [set() for _ in writers]
    after = [successors(flat, number) for number in range(len(writers))]
    changed = True
    while changed:
        changed = False
        for number in range(len(writers) - 1, -1, -1):
            out = set().union(*(live_in[s] for s in after[number]))
            if out != live_out[number]:
                live_out[number] = out
                live_in[number] = set(writers[number].inputs) | (out - writers[number].written)
                changed = True
    return live_out


class _Writer:
    """Writes the function of one block."""

    def __init__(self, translation: Translation, number: int) -> None:
        self.t, self.flat, self.number = translation, translation.flat, number
        self.lines: list[str] = []
        self.values: dict[str, _Value] = {}
        self.views: dict[tuple[str, str], str] = {}
        self.fragments: dict[tuple[str, ...], str] = {}
        self.inputs: dict[str, str] = {}
        self.written: set[str] = set()
        self.count = 0
        block = self.flat.blocks[number]
        for k in block.body:
            self.instruction(k, self.flat.instructions[k])
        self.tail = self.ending(self.flat.instructions[block.end]) if block.end is not None else ""

    # Names, reading and writing

    def fresh(self) -> str:
        """A new variable name."""
        self.count += 1
        return f"v{self.count}"

    def let(self, expression: str) -> str:
        """Assign to a new variable."""
        name = self.fresh()
        self.lines.append(f"{name} = {expression}")
        return name

    def value(self, register: str) -> _Value:
        """The variable that now holds a register."""
        if register not in self.values:
            type_ = self.t.register_type(register)
            if type_ is None:
                raise UnknownInstruction(f"'{register}' is not declared in {self.flat.name}")
            self.inputs[register] = f"r{len(self.inputs)}"
            self.values[register] = _Value(self.inputs[register], canonical(type_))
        return self.values[register]

    def is_register(self, operand: Operand) -> bool:
        """Whether the operand names a register."""
        return isinstance(operand, Reg | Sym) and self.t.register_type(operand.name) is not None

    def view(self, value: _Value, dtype: np.dtype[Any]) -> str:
        """The variable's bits as ``dtype``."""
        if value.dtype == dtype:
            return value.name
        key = (value.name, dtype.str)
        if key not in self.views:
            self.views[key] = self.let(f"{value.name}.view(np.{dtype.name})")
        return self.views[key]

    def read(self, operand: Operand, type_: str) -> str:
        """An expression for the operand as ``type_``."""
        dtype = DTYPES[type_]
        if isinstance(operand, Imm):
            bits = self.immediate(operand, type_)
            if type_ in PACKED:
                return self.let(
                    f"fill(L, {self.t.constant(bits, bits.dtype)}).view(np.{dtype.name})"
                )
            return self.t.constant(bits.view(dtype), dtype)
        if not isinstance(operand, Reg | Sym):
            raise UnknownInstruction(f"operand {operand} is no register or number")
        if not self.is_register(operand):
            return self.let(f"fill(L, np.{dtype.name}({self.symbol(operand)}))")
        value = self.value(operand.name)
        if type_ == "pred":
            if value.dtype != BOOL:
                raise UnknownInstruction(f"register {operand.name} is no predicate")
            negated = isinstance(operand, Reg) and operand.negated
            return f"~{value.name}" if negated else value.name
        width = canonical(self.t.register_type(operand.name) or "").itemsize
        size = size_of(type_)
        if width > size:
            bits_name = self.view(value, BITS[width])
            narrow = self.let(f"{bits_name}.astype(np.{BITS[size].name})")
            return self.view(_Value(narrow, BITS[size]), dtype)
        if width < size:
            wide = self.let(f"{self.view(value, BITS[width])}.astype(np.{BITS[size].name})")
            return self.view(_Value(wide, BITS[size]), dtype)
        return self.view(value, dtype)

    def immediate(self, imm: Imm, type_: str) -> Any:
        """The bits of a constant as ``type_``."""
        if type_ == "pred":
            return np.bool_(imm.value != 0)
        size = size_of(type_)
        value = imm.value
        if imm.width == 8 and size == 4:  # a decimal or 0d.. where a float32 is wanted
            return np.float64(np.uint64(value).view(np.float64)).astype(np.float32).view(U32)
        if imm.width == 4 and type_ == "f64":
            return np.float64(np.uint32(value).view(np.float32)).view(U64)
        return BITS[size].type(value & (1 << 8 * size) - 1)

    def symbol(self, operand: Reg | Sym) -> str:
        """The address of a variable, as a Python expression."""
        if operand.name in self.flat.offsets:
            shared = operand.name in self.flat.shared
            return str(self.flat.offsets[operand.name] + (0 if shared else LOCAL_BASE))
        return f"M.symbol({operand.name!r})"

    def write(self, operand: Operand, expression: str, type_: str, guard: str | None) -> None:
        """Give a register the expression's value, where the guard holds."""
        if isinstance(operand, Sym) and operand.name == "_":
            return
        assert isinstance(operand, Reg | Sym), operand
        declared = self.t.register_type(operand.name)
        if declared is None:
            raise UnknownInstruction(f"register '{operand.name}' is not declared")
        want, dtype = canonical(declared), DTYPES[type_]
        if want != BOOL and size_of(type_) < want.itemsize:
            wide = SIGNED[want.itemsize] if type_[0] == "s" else BITS[want.itemsize]
            expression, dtype = f"({expression}).astype(np.{wide.name})", wide
        if guard is not None:
            old = self.view(self.value(operand.name), want)
            new = expression if dtype == want else f"({expression}).view(np.{want.name})"
            expression, dtype = f"np.where({guard}, {new}, {old})", want
        self.values[operand.name] = _Value(self.let(expression), dtype)
        self.written.add(operand.name)

    def effect(self, i: Instruction, guard: str | None, call: str, arguments: list[str],
               results: list[tuple[Operand, str]]) -> None:  # fmt: skip
        """A call that acts at the guarded lanes only, and gives its results to registers."""
        results = [(o, t) for o, t in results if not (isinstance(o, Sym) and o.name == "_")]
        if guard is None:
            out = self.let(f"{call}({', '.join(['L', *arguments])})")
            for j, (operand, type_) in enumerate(results):
                self.write(operand, f"{out}[{j}]", type_, None)
            return
        old = []
        for operand, _ in results:
            assert isinstance(operand, Reg | Sym)
            old.append(self.view(self.value(operand.name), self.want(operand.name)))
        lanes, out = self.fresh(), self.fresh()
        new = [self.fresh() for _ in results]
        self.lines += [f"{n} = {o}" for n, o in zip(new, old, strict=True)]
        self.lines.append(f"{lanes} = L.where({guard})")
        self.lines.append(f"if {lanes} is not None:")
        taken = [f"{lanes}.take({a})" if _is_variable(a) else a for a in arguments]
        self.lines.append(f"    {out} = {call}({', '.join([lanes, *taken])})")
        for j, (operand, type_) in enumerate(results):
            assert isinstance(operand, Reg | Sym)
            value = _convert(f"{out}[{j}]", type_, self.want(operand.name))
            self.lines.append(f"    {new[j]} = {lanes}.put({old[j]}, {value})")
            self.values[operand.name] = _Value(new[j], self.want(operand.name))
            self.written.add(operand.name)

    def want(self, register: str) -> np.dtype[Any]:
        """The register file's dtype for a register."""
        return canonical(self.t.register_type(register) or "")

    # Instructions

    def instruction(self, k: int, i: Instruction) -> None:
        """Append the lines of one instruction."""
        guard = self.read(i.guard, "pred") if i.guard else None
        special = getattr(self, f"op_{i.op}", None)
        if "cc" in i.mods or i.op in ("addc", "subc", "madc"):
            special = self.with_carry
        if special is not None:
            special(k, i, guard)
        elif i.op in RULES:
            try:
                rule = RULES[i.op](i)
            except (KeyError, ValueError, IndexError):
                raise unknown(i) from None
            sources = [
                self.read(operand, type_)
                for operand, type_ in zip(i.operands[1:], rule.sources, strict=True)
            ]
            if not any(self.is_register(o) for o in i.operands[1:]):
                sources[0] = self.let(f"fill(L, {sources[0]})")
            self.write(i.operands[0], rule.template.format(*sources), rule.result, guard)
        elif i.op not in _NOTHING:
            raise unknown(i)

    def with_carry(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Extended-Precision Integer Arithmetic": add.cc, addc, sub.cc, madc ..."""
        modifiers(i, "cc", "lo", "hi")
        unsigned = f"u{8 * size_of(i.type)}"
        carry = self.read(Reg("%cc"), "pred") if i.op.endswith("c") else "np.False_"
        if i.op.startswith("mad"):
            a, b = (self.array(o, i.type) for o in i.operands[1:3])
            product = f"mul_hi({a}, {b})" if "hi" in i.mods else f"{a} * {b}"
            a = self.let(f"({product}).view(np.{DTYPES[unsigned].name})")
        else:
            a = self.array(i.operands[1], unsigned)
        call = "sub_borrow" if i.op.startswith("sub") else "add_carry"
        out = self.let(f"{call}({a}, {self.read(i.operands[-1], unsigned)}, {carry})")
        self.write(i.operands[0], f"{out}[0]", unsigned, guard)
        if "cc" in i.mods:
            self.write(Reg("%cc"), f"{out}[1]", "pred", guard)

    def op_mov(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: mov", packing and unpacking included."""
        target, source = i.operands
        t = i.type
        if isinstance(source, Vec):
            part = 8 * size_of(t) // len(source.items)
            parts = [self.read(item, f"b{part}") for item in source.items]
            self.write(target, f"pack(L, np.{BITS[size_of(t)].name}, {', '.join(parts)})", t, guard)
        elif isinstance(target, Vec):
            part = 8 * size_of(t) // len(target.items)
            whole = self.read(source, f"b{8 * size_of(t)}")
            name = self.let(f"unpack({whole}, np.{BITS[part // 8].name})")
            for j, item in enumerate(target.items):
                self.write(item, f"{name}[{j}]", f"b{part}", guard)
        elif guard is None and self.is_register(source) and self.is_register(target):
            self.write(target, self.read(source, t), t, None)
        else:
            value = self.read(source, t)
            self.write(target, f"fill(L, {value})" if isinstance(source, Imm) else value, t, guard)

    def op_cvta(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: cvta": only shared addresses differ from generic ones."""
        offset = SHARED_BASE if {"shared", "shared:cta"} & {*i.mods} else 0
        sign = "-" if "to" in i.mods else "+"
        value = self.read(i.operands[1], i.type)
        narrow = f"np.{DTYPES[i.type].name}({offset})"
        self.write(i.operands[0], f"{value} {sign} {narrow}" if offset else value, i.type, guard)

    def op_isspacep(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: isspacep"."""
        address = self.read(i.operands[1], "u64")
        self.write(i.operands[0], f"M.is_space({address}, {i.mods[-1]!r})", "pred", guard)

    def op_setp(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Comparison and Selection: setp", with its two destinations."""
        combine = next((m for m in i.mods[1:-1] if m in ("and", "or", "xor")), None)
        modifiers(i, i.mods[0], "ftz", *([combine] if combine else []))
        a, b = (self.read(o, i.type) for o in i.operands[1:3])
        if isinstance(i.operands[1], Imm):
            a = self.let(f"fill(L, {a})")
        truth = self.let(comparison(i, i.mods[0], i.type).format(a, b))
        targets = i.operands[0].items if isinstance(i.operands[0], Vec) else (i.operands[0],)
        if i.type in PACKED:
            values = [f"{truth}[{j}::2]" for j in range(len(targets))]
        else:
            values = [truth, f"~{truth}"][: len(targets)]
        if combine:
            other = self.read(i.operands[3], "pred")
            sign = {"and": "&", "or": "|", "xor": "^"}[combine]
            values = [f"({v}) {sign} {other}" for v in values]
        for target, value in zip(targets, values, strict=True):
            self.write(target, value, "pred", guard)

    def address(self, i: Instruction, operand: Operand, space: str) -> list[str]:
        """Base and offset of an address operand."""
        if not isinstance(operand, Addr):
            raise unknown(i, "address expected")
        base = operand.base
        if isinstance(base, Imm):
            return [str(base.value), str(operand.offset)]
        if not self.is_register(base):
            return [self.symbol(base), str(operand.offset)]
        wide = self.want(base.name).itemsize
        return [self.read(base, f"s{8 * wide}" if space != "shared" else f"u{8 * wide}"),
                str(operand.offset)]  # fmt: skip

    def memory_operation(self, i: Instruction, *allowed: str) -> tuple[str, int]:
        """The state space and the vector length; other modifiers must be known."""
        rest = set(i.mods[:-1]) - _CACHE_HINTS - _SPACES - {"v2", "v4", "v8"} - {*allowed}
        if rest or i.type not in DTYPES or i.type == "pred":
            raise unknown(i, f"modifier .{min(rest)}" if rest else "type")
        space = next((m.split(":")[0] for m in i.mods if m in _SPACES), "generic")
        return space, next((int(m[1]) for m in i.mods if m in ("v2", "v4", "v8")), 1)

    def op_ld(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: ld"."""
        space, count = self.memory_operation(i)
        where = self.address(i, i.operands[1], space)
        size = size_of(i.type)
        items = i.operands[0].items if isinstance(i.operands[0], Vec) else (i.operands[0],)
        unsigned = f"b{8 * size}" if i.type[0] != "s" else i.type
        call = [str(k), repr(space), *where, str(size), str(count)]
        if unsigned[0] == "s" and size < 8:
            call.append("True")
        if any(isinstance(item, Sym) and item.name == "_" for item in items):
            spare = [f"%_{j}" for j in range(count)]
            self.flat.registers |= dict.fromkeys(spare, f"b{max(16, 8 * size)}")
            items = tuple(Reg(spare[j]) if isinstance(o, Sym) and o.name == "_" else o
                          for j, o in enumerate(items))  # fmt: skip
        self.effect(i, guard, "M.load", call, [(item, unsigned) for item in items])

    op_ldu = op_ld

    def op_st(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: st"."""
        space, _ = self.memory_operation(i)
        where = self.address(i, i.operands[0], space)
        source = i.operands[1]
        items = source.items if isinstance(source, Vec) else (source,)
        values = [self.read(item, f"b{8 * size_of(i.type)}") for item in items]
        size = str(size_of(i.type))
        self.effect(i, guard, "M.store", [str(k), repr(space), *where, size, *values], [])

    def op_atom(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization: atom" and "red"."""
        operations = ("add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas")
        space, _ = self.memory_operation(i, *operations)
        operation = next(m for m in i.mods if m in operations)
        result, rest = (None, i.operands) if i.op == "red" else (i.operands[0], i.operands[1:])
        base, offset = self.address(i, rest[0], space)
        size = size_of(i.type)
        count = len(rest[1].items) if isinstance(rest[1], Vec) else 1
        for j in range(count):
            operands = [o.items[j] if isinstance(o, Vec) else o for o in rest[1:]]
            operands = operands[: 2 if operation == "cas" else 1]
            values = [self.read(o, f"b{8 * size}") for o in operands]
            head = [str(k), repr(space), base, str(int(offset) + j * size)]
            wanted = result.items[j] if isinstance(result, Vec) else result
            keep = wanted is not None and not (isinstance(wanted, Sym) and wanted.name == "_")
            call = [*head, repr(operation), repr(i.type), str(keep), *values]
            results = [(wanted, f"b{8 * size}")] if wanted is not None and keep else []
            self.effect(i, guard, "M.atomic", call, results)

    op_red = op_atom

    def op_cp(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: cp.async", commit_group, wait_group, wait_all."""
        if i.mods[:2] == ("async", "commit_group"):
            self.effect(i, guard, "M.commit", [], [])
        elif i.mods[:2] in (("async", "wait_group"), ("async", "wait_all")):
            left = i.operands[0] if i.operands else Imm(-1)
            assert isinstance(left, Imm)
            self.effect(i, guard, "M.wait", [str(left.value)], [])
        elif i.mods[:2] in (("async", "ca"), ("async", "cg")):
            if set(i.mods[2:]) - _SPACES - _CACHE_HINTS:
                raise unknown(i)
            to = self.address(i, i.operands[0], "shared")
            of = self.address(i, i.operands[1], "global")
            size = i.operands[2]
            assert isinstance(size, Imm)
            hinted = "L2:cache_hint" in i.mods
            extra = [o for o in i.operands[3:] if not hinted or o is not i.operands[-1]]
            source = [self.read(extra[0], "u32")] if extra else []
            self.effect(i, guard, "M.copy", [str(k), *to, *of, str(size.value), *source], [])
        else:
            raise unknown(i)

    def op_createpolicy(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "createpolicy": caches do not matter here."""
        self.write(i.operands[0], "fill(L, np.uint64(0))", "b64", guard)

    def op_shfl(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Data Movement: shfl.sync"."""
        if i.mods[0] != "sync":
            raise unknown(i)
        first = i.operands[0]
        targets = first.items if isinstance(first, Vec) else (first,)
        value = self.array(i.operands[1], "b32")
        rest = [self.read(o, "u32") for o in i.operands[2:5]]
        results = list(zip(targets, ("b32", "pred"), strict=False))
        if isinstance(targets[0], Sym) and targets[0].name == "_":
            raise unknown(i)
        self.effect(i, guard, "M.shfl", [str(k), repr(i.mods[1]), value, *rest], results)

    def op_vote(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization: vote.sync"."""
        if i.mods[0] != "sync":
            raise unknown(i)
        predicate = self.array(i.operands[1], "pred")
        mask = self.read(i.operands[2], "u32")
        call = [str(k), repr(i.mods[1]), predicate, mask]
        self.effect(i, guard, "M.vote", call, [(i.operands[0], i.type)])

    def op_match(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization: match.sync"."""
        first = i.operands[0]
        targets = first.items if isinstance(first, Vec) else (first,)
        value = self.array(i.operands[1], i.type)
        call = [str(k), repr(i.mods[0]), value, self.read(i.operands[2], "u32")]
        results = list(zip(targets, ("b32", "pred"), strict=False))
        self.effect(i, guard, "M.match", call, results)

    def op_redux(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization: redux.sync" on integers."""
        if i.type not in ("u32", "s32", "b32") or len(i.mods) != 3:
            raise unknown(i)
        value = self.array(i.operands[1], i.type)
        call = [str(k), repr(i.mods[1]), value, self.read(i.operands[2], "u32")]
        self.effect(i, guard, "M.redux", call, [(i.operands[0], i.type)])

    def op_activemask(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization: activemask"."""
        self.effect(i, guard, "M.activemask", [], [(i.operands[0], "b32")])

    def op_elect(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Parallel Synchronization: elect.sync": the lowest lane here."""
        items = i.operands[0].items if isinstance(i.operands[0], Vec) else ()
        self.effect(i, guard, "M.elect", [], list(zip(items, ("b32", "pred"), strict=True)))

    def op_bar(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "bar.warp.sync"; the block's barriers end a basic block."""
        self.effect(i, guard, "M.bar_warp", [str(k), self.read(i.operands[0], "u32")], [])

    def op_ldmatrix(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Warp-Level Matrix Instructions: ldmatrix"."""
        count = _matrices(i)
        where = self.address(i, i.operands[1], "shared")
        call = [str(k), *where, str(count), str("trans" in i.mods)]
        items = i.operands[0].items if isinstance(i.operands[0], Vec) else (i.operands[0],)
        self.effect(i, guard, "M.ldmatrix", call, [(item, "b32") for item in items])

    def op_stmatrix(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Warp-Level Matrix Instructions: stmatrix"."""
        _matrices(i)
        where = self.address(i, i.operands[0], "shared")
        source = i.operands[1]
        items = source.items if isinstance(source, Vec) else (source,)
        values = [self.array(item, "b32") for item in items]
        call = [str(k), *where, str("trans" in i.mods), *values]
        self.effect(i, guard, "M.stmatrix", call, [])

    def op_mma(self, k: int, i: Instruction, guard: str | None) -> None:
        """PTX ISA, "Warp-Level Matrix Instructions: mma"."""
        if i.mods[:2] != ("sync", "aligned") or i.mods[3:5] != ("row", "col") or guard:
            raise unknown(i)
        shape, (d_type, kind, b_type, c_type) = i.mods[2], i.mods[5:]
        known = {("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16")}
        known |= {("m16n8k8", "bf16"), ("m16n8k8", "tf32"), ("m16n8k4", "tf32")}
        if (shape, kind) not in known or b_type != kind or d_type != c_type:
            raise unknown(i)
        d, a, b, c = (o.items if isinstance(o, Vec) else (o,) for o in i.operands)
        half = d_type == "f16"
        fragments = []
        for side, items in (("a", a), ("b", b)):
            words = [self.array(item, "b32") for item in items]
            key = (side, kind, *words)
            if key not in self.fragments:
                made = f"warp.fragment_{side}({kind!r}, {', '.join(words)})"
                self.fragments[key] = self.let(made)
            fragments.append(self.fragments[key])
        old = [self.array(item, "b32" if half else "f32") for item in c]
        call = f"warp.mma(M, L, {k}, {', '.join(fragments)}, ({', '.join(old)},), {half})"
        out = self.let(call)
        for j, item in enumerate(d):
            self.write(item, f"{out}[{j}]", "b32" if half else "f32", None)

    def array(self, operand: Operand, type_: str) -> str:
        """The operand as an array, also where it is a number."""
        value = self.read(operand, type_)
        if isinstance(operand, Imm):
            return self.let(f"fill(L, {value})")
        return value if value.isidentifier() else self.let(value)

    # The function

    def ending(self, i: Instruction) -> str:
        """What the scheduler needs from the block's last instruction: (guard, operands)."""
        guard = self.array(i.guard, "pred") if i.guard else "None"
        operands: list[str] = []
        if i.op in ("bar", "barrier"):
            reduces = "red" in i.mods
            for j, operand in enumerate(i.operands):
                if reduces and j == 0:
                    continue
                last = reduces and j == len(i.operands) - 1
                operands.append(self.array(operand, "pred" if last else "u32"))
        elif i.op == "brx":
            operands.append(self.array(i.operands[0], "u32"))
        return f"({guard}, ({', '.join(operands)}{',' if operands else ''}))"

    def finish(self, live: set[str]) -> Piece:
        """Compile the function, which returns the registers that are read later."""
        outputs = sorted(self.written & live)
        results = [self.view(self.values[name], self.want(name)) for name in outputs]
        head = ", ".join(["L", "M", *self.inputs.values()])
        body = [*self.lines, f"return ({', '.join(results)}{',' if results else ''}), "
                f"{self.tail or 'None'}"]  # fmt: skip
        source = f"def block({head}):\n" + "".join(f"    {line}\n" for line in body)
        scope = dict(self.t.namespace)
        exec(compile(source, f"<{self.flat.name} block {self.number}>", "exec"), scope)
        return Piece(scope["block"], list(self.inputs), outputs, source)


def _matrices(i: Instruction) -> int:
    count = {"x1": 1, "x2": 2, "x4": 4}.get(i.mods[3] if len(i.mods) > 3 else "", 0)
    known = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared:cta", "b16"}
    if not count or set(i.mods) - known:
        raise unknown(i)
    return count


def _is_variable(text: str) -> bool:
    return text[0] in "vr~" or (text[0] == "r" and text[1:].isdigit())


def _convert(value: str, type_: str, want: np.dtype[Any]) -> str:
    dtype = DTYPES[type_]
    if want != BOOL and dtype.itemsize < want.itemsize:
        wide = SIGNED[want.itemsize] if type_[0] == "s" else BITS[want.itemsize]
        return f"{value}.astype(np.{wide.name}).view(np.{want.name})"
    return value if dtype == want else f"{value}.view(np.{want.name})"


# What the generated functions call besides the ALU's helpers.


def _fill(lanes: Any, value: Any) -> Any:
    return np.full(lanes.n, value) if np.ndim(value) == 0 else value


def _pack(lanes: Any, dtype: Any, *parts: Any) -> Any:
    first = next((p for p in parts if np.ndim(p)), None)
    part = np.asarray(parts[0]).dtype if first is None else first.dtype
    out = np.empty((lanes.n, len(parts)), part)
    for j, value in enumerate(parts):
        out[:, j] = value
    return out.view(dtype).reshape(-1)


def _unpack(whole: Any, dtype: Any) -> Any:
    parts = np.ascontiguousarray(whole).view(dtype).reshape(len(whole), -1)
    return [np.ascontiguousarray(parts[:, j]) for j in range(parts.shape[1])]
