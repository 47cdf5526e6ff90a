"""PTX text -> functions, variables and instructions (PTX ISA, "Syntax" and "Directives")."""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from bigkernel.testing.ptx.errors import PtxError, UnknownInstruction
from bigkernel.testing.ptx.types import DTYPES, size_of


@dataclass(frozen=True, slots=True)
class Name:
    """A register, variable, label or function; negated where the text says ``!%p1``."""

    name: str
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Imm:
    """A constant: an integer, or a float with ``width`` 4 or 8 and its bits as value."""

    value: int
    width: int = 0


@dataclass(frozen=True, slots=True)
class Addr:
    """``[base + offset]``."""

    base: Name | Imm
    offset: int = 0


# The tuple: ``{a, b, ..}``, or the two destinations ``a|b``.
Operand = Name | Imm | Addr | tuple["Operand", ...]


def items_of(operand: Operand) -> tuple[Operand, ...]:
    """The operand's parts, itself where it is no tuple."""
    return operand if isinstance(operand, tuple) else (operand,)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: ``@guard op.mods operands;`` in ``line`` of the PTX text."""

    op: str
    mods: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Name | None
    line: int
    text: str
    source: str = ""  # "kernel.cu:12" where the compiler wrote .loc

    @property
    def type(self) -> str:
        """The last modifier, which is the type of the operation."""
        return self.mods[-1]

    @property
    def opcode(self) -> str:
        """With its modifiers: "fma.rn.f32"."""
        return ".".join((self.op, *self.mods))

    def unknown(self, why: str = "") -> UnknownInstruction:
        """The error for an instruction that the emulator does not run."""
        return UnknownInstruction(
            f"PTX line {self.line}: instruction '{self.opcode}' is not known to the emulator"
            f"{f' ({why})' if why else ''}: {self.text}"
        )


@dataclass(frozen=True, slots=True)
class Label:
    """A place that branches name."""

    name: str


@dataclass(frozen=True, slots=True)
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
    max_threads: int | None
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    body: list[Instruction | Label] = field(default_factory=list)
    targets: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets


@dataclass(slots=True)
class Program:
    """One PTX file."""

    functions: dict[str, Function]
    variables: dict[str, Variable]


def names_of(operand: Operand) -> Iterator[str]:
    """Every name in an operand."""
    if isinstance(operand, Name):
        yield operand.name
    for part in operand if isinstance(operand, tuple) else ():
        yield from names_of(part)
    if isinstance(operand, Addr):
        yield from names_of(operand.base)


def _rename_operand(operand: Operand, names: dict[str, str]) -> Operand:
    if isinstance(operand, Name):
        return replace(operand, name=names.get(operand.name, operand.name))
    if isinstance(operand, Addr):
        base = _rename_operand(operand.base, names)
        assert isinstance(base, Name | Imm)
        return Addr(base, operand.offset)
    if isinstance(operand, tuple):
        return tuple(_rename_operand(part, names) for part in operand)
    return operand


def rename(body: list[Instruction | Label], names: dict[str, str]) -> list[Instruction | Label]:
    """Statements with registers, symbols and labels called by their new names."""
    out: list[Instruction | Label] = []
    for item in body:
        if isinstance(item, Label):
            out.append(Label(names.get(item.name, item.name)))
            continue
        guard = item.guard and replace(item.guard, name=names.get(item.guard.name, item.guard.name))
        operands = tuple(_rename_operand(operand, names) for operand in item.operands)
        out.append(replace(item, guard=guard, operands=operands))
    return out


_NAME = r"[A-Za-z_$%][\w$]*"
_STATEMENT = re.compile(
    rf"""\s*(?:(?P<label>{_NAME})\s*:(?!:)
    | (?P<opening>{{) | (?P<closing>}})
    | (?P<location>\.(?:version|target|address_size|file|loc)\b[^\n]*)
    | (?P<section>\.section\b[^}}]*}})
    | (?P<header>(?:\.(?:visible|extern|weak|common)\s+)*\.(?:entry|func)\b[^{{;]*)
    | (?P<directive>\.[^;]*);
    | (?P<instruction>[^;]*);)""",
    re.VERBOSE,
)
_HEADER = re.compile(
    rf".*?\.(?P<kind>entry|func)\s*(?:\.noreturn\s*)?(?:\((?P<returns>[^)]*)\))?\s*"
    rf"(?P<name>{_NAME})\s*(?:\((?P<params>[^)]*)\))?(?P<rest>.*)",
    re.DOTALL,
)
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common|attribute\([^)]*\))\s*)*"
    r"\.(?P<space>param|local|shared|const|global)\s*"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s*"
    r"(?:\.ptr(?:\s*\.\w+)?(?:\s*\.align\s+\d+)?)?\s*"
    rf"(?P<name>{_NAME})\s*(?P<extents>(?:\[\s*\d*\s*\])*)\s*(?:=\s*(?P<initial>.*))?",
    re.DOTALL,
)


def parse(text: str) -> Program:
    """Parse a PTX file; errors name the line."""
    return _Parser(text).program


class _Parser:
    """Statement by statement: each kind has a method, called with the statement's text."""

    def __init__(self, text: str) -> None:
        self.program = Program({}, {})
        names = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)
        self.files = {number: path.rsplit("/", 1)[-1] for number, path in names}
        self.callers: dict[str, str] = {}  # the outermost place that an inlined one came from
        self.loc = ""
        self.function: Function | None = None  # the last header's
        # Open braces: the statements in them, and new names for what an inner one declares.
        self.scopes: list[tuple[list[Instruction | Label], dict[str, str]]] = []
        self.renamed = 0
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text).rstrip()
        self.line, at = 1, 0
        while at < len(text):
            match = _STATEMENT.match(text, at)
            if match is None:
                raise self.fail(f"';' expected after '{text[at : at + 40].strip()}'")
            kind = match.lastgroup or ""
            start = match.start(kind)
            self.line += text.count("\n", at, start)
            if kind in ("label", "instruction") and match[kind] and not self.scopes:
                raise self.fail(f"directive expected, got '{match[kind][:40]}'")
            getattr(self, kind)(match[kind])
            self.line += text.count("\n", start, match.end())
            at = match.end()
        if self.scopes:
            raise self.fail("'}' expected before the end of the text")

    def fail(self, what: str) -> PtxError:
        return PtxError(f"PTX line {self.line}: {what}")

    def section(self, text: str) -> None:
        """Debugging information."""

    def header(self, text: str) -> None:
        """``.entry name (params) directives``, or ``.func (returns) name (params)``."""
        match = _HEADER.match(text)
        if not match:
            raise self.fail("function header not understood")
        params, returns = (
            [self.variable(part) for part in (match[key] or "").split(",") if part.strip()]
            for key in ("params", "returns")
        )
        threads = re.search(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", match["rest"])
        limit = math.prod(map(int, threads[1].split(","))) if threads else None
        self.function = Function(match["name"], match["kind"] == "entry", params, returns, limit)
        self.loc = ""

    def opening(self, text: str) -> None:
        self.scopes.append(([], {}))

    def closing(self, text: str) -> None:
        if self.function is None or not self.scopes:
            raise self.fail("'}' without '{'")
        body, names = self.scopes.pop()
        if self.scopes:
            self.scopes[-1][0].extend(rename(body, names) if names else body)
        else:
            self.function.body = body
            self.program.functions[self.function.name] = self.function

    def declare(self, name: str) -> str:
        """What a name that is declared here is called in the whole function."""
        if len(self.scopes) == 1:
            return name
        self.renamed += 1
        return self.scopes[-1][1].setdefault(name, f"{name}${self.renamed}")

    def label(self, name: str) -> None:
        self.declare(name)
        self.scopes[-1][0].append(Label(name))

    def directive(self, text: str) -> None:
        """What begins with a dot and ends with a semicolon."""
        name, rest = text[1:].split(None, 1)
        if name in ("alias", "pragma", "callprototype"):
            return
        if name == "reg" and self.function:
            type_, names = rest.split(None, 1)
            for item in names.split(","):
                reg, _, count = item.strip(" >\n\t").partition("<")
                for own in [f"{reg.strip()}{k}" for k in range(int(count))] if count else [reg]:
                    self.function.registers[self.declare(own)] = type_[1:]
        elif name == "branchtargets" and self.function:
            table = self.scopes[-1][0].pop()
            assert isinstance(table, Label)
            self.function.targets[table.name] = [n.strip() for n in rest.split(",")]
        else:
            variable = self.variable(text)
            if self.scopes and self.function:
                variable = replace(variable, name=self.declare(variable.name))
                self.function.variables[variable.name] = variable
            else:
                self.program.variables[variable.name] = variable

    def location(self, text: str) -> None:
        """``.loc file line column[, function_name label, inlined_at file line column]``."""
        if not text.startswith(".loc"):
            return
        own, _, outer = text.partition(", function_name")
        place, caller = " ".join(own.split()[1:4]), " ".join(outer.split()[2:5])
        self.callers[place] = self.callers.get(caller, caller) or place
        names = [
            f"{self.files.get(p.split()[0], '?')}:{p.split()[1]}"
            for p in (self.callers[place], place)
        ]
        self.loc = names[0] if names[0] == names[1] else f"{names[0]}, inside {names[1]}"

    def variable(self, text: str) -> Variable:
        """A variable's declaration without its semicolon."""
        match = _VARIABLE.fullmatch(text.strip())
        if not match or match["type"] not in DTYPES:
            raise self.fail(f"declaration '{text.strip()[:60]}' not understood")
        type_ = match["type"]
        size = size_of(type_)
        count = math.prod(int(n or 0) for n in re.findall(r"\[\s*(\d*)\s*\]", match["extents"]))
        align = int(match["align"] or size)
        initial, address = b"", ""
        for item in re.findall(r"[^\s{},]+", match["initial"] or ""):
            imm = _immediate(item)
            if imm is None:
                address = item
            else:
                initial += (imm.value & (1 << 8 * size) - 1).to_bytes(size, "little")
        return Variable(match["name"], match["space"], align, type_, count * size, initial, address)

    def instruction(self, text: str) -> None:
        """One instruction without its semicolon."""
        rest = text = " ".join(text.split())
        if not text:
            return
        guard = None
        if text.startswith("@"):
            word, rest = text[1:].split(None, 1)
            guard = Name(word.lstrip("!"), word.startswith("!"))
        opcode, _, tail = rest.partition(" ")
        op, *mods = opcode.replace("::", ":").split(".")
        try:
            operands = tuple(_operand(piece) for piece in _split(tail))
        except ValueError:
            raise UnknownInstruction(
                f"PTX line {self.line}: instruction '{opcode}' is not known with operands '{tail}'"
            ) from None
        self.scopes[-1][0].append(
            Instruction(op, tuple(mods), operands, guard, self.line, text, self.loc)
        )


_COMMA = re.compile(r",(?![^{\[(]*[}\])])")  # no closing bracket before the next opening one


def _split(text: str) -> list[str]:
    """Operands at the commas that no bracket encloses."""
    return [part for part in map(str.strip, _COMMA.split(text)) if part]


def _immediate(text: str) -> Imm | None:
    """A number as PTX writes it (PTX ISA, "Constants")."""
    if match := re.fullmatch(r"-?0([fFdD])([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", text):
        return Imm(int(match[2], 16), len(match[2]) // 2)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        digits = text.rstrip("U")
        octal = re.fullmatch(r"-?0[0-7]+", digits)
        return Imm(int(digits, 8 if octal else 0))
    if re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?", text):
        return Imm(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 8)
    return Imm(32) if text == "WARP_SZ" else None


@functools.lru_cache(maxsize=1 << 16)  # most occur many times
def _operand(text: str) -> Operand:
    imm = _immediate(text)
    if imm is not None:
        return imm
    if text[0] == "[":
        match = re.fullmatch(r"\[\s*([^\s+-]+)\s*(?:\+\s*)?(-?\s*\w+)?\s*\]", text)
        base = _operand(match[1]) if match else None
        if not match or not isinstance(base, Name | Imm):
            raise ValueError(text)
        return Addr(base, int((match[2] or "0").replace(" ", ""), 0))
    if text[0] in "{(":
        return tuple(_operand(piece) for piece in _split(text[1:-1]))
    if "|" in text:
        return tuple(_operand(piece.strip()) for piece in text.split("|"))
    if text[0] == "!":
        return Name(text[1:].strip(), True)
    if re.fullmatch(r"[A-Za-z_$%][\w$.]*", text):
        return Name(text)
    raise ValueError(text)
