"""Names, reads and writes of registers in the Python function that a basic block becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bigkernel.testing.ptx import atomics, warp
from bigkernel.testing.ptx.errors import UnknownInstruction
from bigkernel.testing.ptx.memory import LOCAL_BASE
from bigkernel.testing.ptx.numerics import HELPERS
from bigkernel.testing.ptx.program import Flat, Piece
from bigkernel.testing.ptx.syntax import Imm, Instruction, Operand, Reg, Sym
from bigkernel.testing.ptx.types import (
    BITS,
    BOOL,
    DTYPES,
    PACKED,
    SIGNED,
    U32,
    U64,
    canonical,
    size_of,
)


@dataclass(slots=True)
class _Value:
    """A Python variable that holds a register's lanes."""

    name: str
    dtype: np.dtype[Any]
    constant: bool = False


class Scope:
    """What all blocks of a kernel share: its registers, and the names that their code uses."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self.namespace: dict[str, Any] = {**HELPERS, "warp": warp, "atomics": atomics}
        self.namespace |= {"fill": _fill, "pack": _pack, "unpack": _unpack}
        flat.registers["%cc"] = "pred"  # the carry flag
        self.constants: dict[tuple[str, bytes], str] = {}

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


class Writer:
    """Writes the function of one block."""

    def __init__(self, scope: Scope, number: int) -> None:
        self.t, self.flat, self.number = scope, scope.flat, number
        self.lines: list[str] = []
        self.values: dict[str, _Value] = {}
        self.views: dict[tuple[str, str], str] = {}
        self.fragments: dict[tuple[str, ...], str] = {}
        self.inputs: dict[str, str] = {}
        self.written: set[str] = set()
        self.count = 0
        self.tail = ""

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
        machine = [] if call.startswith("M.") else ["M"]
        results = [(o, t) for o, t in results if not (isinstance(o, Sym) and o.name == "_")]
        if guard is None:
            out = self.let(f"{call}({', '.join([*machine, 'L', *arguments])})")
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
        self.lines.append(f"    {out} = {call}({', '.join([*machine, lanes, *taken])})")
        for j, (operand, type_) in enumerate(results):
            assert isinstance(operand, Reg | Sym)
            value = _convert(f"{out}[{j}]", type_, self.want(operand.name))
            self.lines.append(f"    {new[j]} = {lanes}.put({old[j]}, {value})")
            self.values[operand.name] = _Value(new[j], self.want(operand.name))
            self.written.add(operand.name)

    def want(self, register: str) -> np.dtype[Any]:
        """The register file's dtype for a register."""
        return canonical(self.t.register_type(register) or "")

    def array(self, operand: Operand, type_: str) -> str:
        """The operand as an array, also where it is a number."""
        value = self.read(operand, type_)
        if isinstance(operand, Imm):
            return self.let(f"fill(L, {value})")
        return value if value.isidentifier() else self.let(value)

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
