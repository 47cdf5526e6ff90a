"""What PTX text consists of: operands, instructions, variables, functions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Reg:
    """A register, ``%r1`` or ``%tid.x``; negated where the text says ``!%p1``."""

    name: str
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Imm:
    """A constant: an integer, or a float with ``width`` 4 or 8 and its bits as value."""

    value: int
    width: int = 0


@dataclass(frozen=True, slots=True)
class Sym:
    """The name of a variable, label or function."""

    name: str


@dataclass(frozen=True, slots=True)
class Addr:
    """``[base + offset]``."""

    base: Reg | Sym | Imm
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Vec:
    """``{a, b, ..}``, or the two destinations ``a|b``."""

    items: tuple[Operand, ...]


Operand = Reg | Imm | Sym | Addr | Vec


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: ``@guard op.mods operands;`` in ``line`` of the PTX text."""

    op: str
    mods: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Reg | None
    line: int
    text: str
    source: str = ""  # "kernel.cu:12" where the compiler wrote .loc

    @property
    def type(self) -> str:
        """The last modifier, which is the type of the operation."""
        return self.mods[-1]


@dataclass(frozen=True, slots=True)
class Label:
    """A place that branches name."""

    name: str


@dataclass(slots=True)
class Variable:
    """``.space .align n .type name[size]`` with its first bytes, if the text gives them."""

    name: str
    space: str
    align: int
    type: str
    size: int  # bytes; 0: as much as the launch gives (extern shared)
    initial: bytes = b""
    address: str = ""  # a name whose address is an initial value, which is not supported


@dataclass(slots=True)
class Function:
    """A kernel (``entry``) or a device function."""

    name: str
    entry: bool
    params: list[Variable]
    returns: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    body: list[Instruction | Label] = field(default_factory=list)
    targets: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets
    max_threads: int | None = None


@dataclass(slots=True)
class Program:
    """One PTX file."""

    target: str
    functions: dict[str, Function]
    variables: dict[str, Variable]


def rename_operand(operand: Operand, names: dict[str, str]) -> Operand:
    """The operand with its registers and symbols called by their new names."""
    if isinstance(operand, Reg | Sym) and operand.name in names:
        return replace(operand, name=names[operand.name])
    if isinstance(operand, Addr):
        base = rename_operand(operand.base, names)
        assert isinstance(base, Reg | Sym | Imm)
        return Addr(base, operand.offset)
    if isinstance(operand, Vec):
        return Vec(tuple(rename_operand(item, names) for item in operand.items))
    return operand


def rename_item(item: Instruction | Label, names: dict[str, str]) -> Instruction | Label:
    if isinstance(item, Label):
        return Label(names.get(item.name, item.name))
    guard = item.guard and replace(item.guard, name=names.get(item.guard.name, item.guard.name))
    operands = tuple(rename_operand(operand, names) for operand in item.operands)
    return replace(item, guard=guard, operands=operands)


def rename(body: list[Instruction | Label], names: dict[str, str]) -> list[Instruction | Label]:
    """Statements with registers, symbols and labels called by their new names."""
    return [rename_item(item, names) for item in body]
