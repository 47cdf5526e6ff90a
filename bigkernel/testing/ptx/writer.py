"""Registers in the Python function that a basic block becomes: names, reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigkernel.testing.ptx.alu import name_of
from bigkernel.testing.ptx.errors import UnknownInstruction
from bigkernel.testing.ptx.memory import LOCAL_BASE
from bigkernel.testing.ptx.parser import Addr, Imm, Name, Operand
from bigkernel.testing.ptx.program import Flat
from bigkernel.testing.ptx.types import BITS, DTYPES, PACKED, SIGNED, DType, canonical, size_of


@dataclass(slots=True)
class Piece:
    """A translated basic block: registers in, registers and what its end needs out."""

    run: Callable[..., Any]
    inputs: list[str]
    outputs: list[str]


class Writer:
    """Writes the function of one block, each value to a variable of its own."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self.lines: list[str] = []
        self.known: dict[str, str] = {}  # variables by their expressions
        self.values: dict[str, tuple[str, DType]] = {}  # the variable that now holds a register
        self.inputs: dict[str, str] = {}
        self.written: set[str] = set()
        self.constants: dict[str, Any] = {}

    def let(self, expression: str) -> str:
        """A variable with the expression's value."""
        if expression.isidentifier():
            return expression
        if expression not in self.known:
            self.known[expression] = f"v{len(self.lines)}"
            self.lines.append(f"{self.known[expression]} = {expression}")
        return self.known[expression]

    def dtype(self, register: Name) -> DType:
        """The register file's dtype of a register."""
        if register.name not in self.flat.registers:
            raise UnknownInstruction(f"'{register.name}' is not declared in {self.flat.name}")
        return canonical(self.flat.registers[register.name])

    def value(self, register: Name) -> tuple[str, DType]:
        """The variable that now holds a register."""
        name = register.name
        if name not in self.values:
            self.inputs[name] = f"r{len(self.inputs)}"
            self.values[name] = self.inputs[name], self.dtype(register)
        return self.values[name]

    def view(self, value: tuple[str, DType], dtype: DType) -> str:
        """The variable's bits as ``dtype``."""
        return value[0] if value[1] == dtype else self.let(f"{value[0]}.view(np.{dtype.name})")

    def read(self, operand: Operand, type_: str) -> str:
        """The variable or constant for the operand as ``type_``."""
        dtype, size = DTYPES[type_], size_of(type_)
        if isinstance(operand, Imm):
            return self.constant(operand, type_)
        if not isinstance(operand, Name):
            raise UnknownInstruction(f"operand {operand} is no register or number")
        if operand.name not in self.flat.registers and operand.name[0] != "%":
            return self.let(f"fill(L, {name_of(type_)}({self.symbol(operand)}))")
        width = self.dtype(operand).itemsize
        value = self.value(operand)
        if type_ == "pred":
            if value[1] != DTYPES["pred"]:
                raise UnknownInstruction(f"register {operand.name} is no predicate")
            return self.let(f"~{value[0]}") if operand.negated else value[0]
        if width != size:  # zeros above, or the lower part
            bits = self.view(value, BITS[width])
            value = self.let(f"{bits}.astype(np.{BITS[size].name})"), BITS[size]
        return self.view(value, dtype)

    def array(self, operand: Operand, type_: str) -> str:
        """The operand as a variable that holds an array, also where it is a number."""
        value = self.read(operand, type_)
        scalar = isinstance(operand, Imm) and type_ not in PACKED
        return self.let(f"fill(L, {value})") if scalar else value

    def constant(self, imm: Imm, type_: str) -> str:
        """A name for a number as ``type_``."""
        dtype, size, value = DTYPES[type_], size_of(type_), imm.value
        bits: Any = BITS[size].type(value & (1 << 8 * size) - 1)
        if imm.width == 8 and size == 4:  # a decimal or 0d.. where a float32 is wanted
            bits = np.uint64(value).view(np.float64).astype(np.float32).view(np.uint32)
        if imm.width == 4 and size == 8:
            bits = np.uint32(value).view(np.float32).astype(np.float64).view(np.uint64)
        if type_ == "pred":
            bits = np.bool_(value != 0)
        name = f"c{bits}_{type_}"
        self.constants[name] = bits if type_ in PACKED else bits.view(dtype)
        return self.let(f"fill(L, {name}).view(np.{dtype.name})") if type_ in PACKED else name

    def symbol(self, operand: Name) -> str:
        """The address of a variable, as a Python expression."""
        if operand.name not in self.flat.offsets:
            return f"M.symbols[{operand.name!r}]"
        shared = self.flat.variables[operand.name].space == "shared"
        return str(self.flat.offsets[operand.name] + (0 if shared else LOCAL_BASE))

    def address(self, operand: Operand) -> str:
        """The array of ``[base + offset]`` at each lane."""
        if not isinstance(operand, Addr):
            raise UnknownInstruction(f"operand {operand} is no address")
        base = self.array(operand.base, "s64")
        return self.let(f"{base} + {operand.offset}") if operand.offset else base

    def write(self, operand: Operand, expression: str, type_: str, guard: str | None) -> None:
        """Give a register the expression's value, where the guard holds."""
        if operand == Name("_"):
            return
        assert isinstance(operand, Name), operand
        want, dtype = self.dtype(operand), DTYPES[type_]
        if type_ != "pred" and size_of(type_) < want.itemsize:
            dtype = (SIGNED if type_[0] == "s" else BITS)[want.itemsize]
            expression = f"({expression}).astype(np.{dtype.name})"
        if guard is not None:
            old = self.view(self.value(operand), want)
            new = expression if dtype == want else f"({expression}).view(np.{want.name})"
            expression, dtype = f"np.where({guard}, {new}, {old})", want
        self.values[operand.name] = self.let(expression), dtype
        self.written.add(operand.name)

    def effect(self, guard: str | None, call: str, arguments: list[Any],
               results: Sequence[tuple[Operand, str]] = ()) -> None:  # fmt: skip
        """A call that acts at the guarded lanes only, and gives its results to registers.

        Of the arguments, strings are code; a call is never the same as another.
        """
        code = ", ".join(map(str, arguments))
        if guard is not None:
            dtypes = "".join(f"{name_of(t)}, " for _, t in results)
            call, code = "guarded", f"{guard}, {call}, ({dtypes}), {code}"
        out = f"v{len(self.lines)}"
        self.lines.append(f"{out} = {call}(M, L, {code})")
        for j, (operand, type_) in enumerate(results):
            self.write(operand, f"{out}[{j}].view({name_of(type_)})", type_, guard)

    def finish(self, tail: str, live: set[str], helpers: dict[str, Any]) -> Piece:
        """Compile the function, which returns the registers that others read."""
        outputs = sorted(self.written & live)
        results = "".join(
            f"{self.view(self.values[name], self.dtype(Name(name)))}, " for name in outputs
        )
        head = ", ".join(["L", "M", *self.inputs.values()])
        body = [*self.lines, f"return ({results}), {tail}"]
        source = f"def block({head}):\n" + "".join(f"    {line}\n" for line in body)
        scope = helpers | self.constants
        exec(compile(source, f"<{self.flat.name}>", "exec"), scope)
        return Piece(scope["block"], list(self.inputs), outputs)
