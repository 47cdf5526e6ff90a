"""PTX text -> functions, variables and instructions (PTX ISA, "Syntax" and "Directives")."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable

from bigkernel.testing.ptx.errors import PtxError, UnknownInstruction
from bigkernel.testing.ptx.syntax import (
    Addr,
    Function,
    Imm,
    Instruction,
    Label,
    Operand,
    Program,
    Reg,
    Sym,
    Variable,
    Vec,
    rename_item,
)
from bigkernel.testing.ptx.types import DTYPES, PACKED, size_of


def parse(text: str) -> Program:
    """Parse a PTX file; errors name the line."""
    return _Parser(text).program()


_NAME = r"[A-Za-z_$%][\w$]*"
_LABEL = re.compile(rf"({_NAME})\s*:(?!:)")
_DIRECTIVE = re.compile(r"\.([a-z_]+)")
_VARIABLE = re.compile(
    r"\.(?P<space>param|reg|local|shared|const|global)\s*"
    r"(?:\.align\s+(?P<align1>\d+)\s+)?\.(?P<type>\w+)\s*"
    r"(?P<ptr>\.ptr(?:\s*\.\w+)?(?:\s*\.align\s+\d+)?)?"
    r"(?:\.align\s+(?P<align2>\d+)\s+)?\s*"
    rf"(?P<name>{_NAME})\s*(?P<dims>(?:\[\s*\d*\s*\])*)\s*(?:=\s*(?P<init>.*))?$",
    re.DOTALL,
)


class _Parser:
    def __init__(self, text: str) -> None:
        keep_lines: Callable[[re.Match[str]], str] = lambda m: "\n" * m.group().count("\n")  # noqa: E731
        self.text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", keep_lines, text, flags=re.S))
        self.at = 0
        self.line = 1
        names = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)
        self.files = {number: path.rsplit("/", 1)[-1] for number, path in names}
        self.callers: dict[str, str] = {}  # the outermost place that an inlined one came from
        self.loc = ""
        self.scopes = 0
        self.result = Program("", {}, {})

    def fail(self, what: str) -> PtxError:
        return PtxError(f"PTX line {self.line}: {what}")

    def skip_space(self) -> bool:
        """Move to the next character that counts; False at the end."""
        match = re.compile(r"\s*").match(self.text, self.at)
        assert match
        self.advance(match.end())
        return self.at < len(self.text)

    def advance(self, to: int) -> str:
        piece = self.text[self.at : to]
        self.line += piece.count("\n")
        self.at = to
        return piece

    def until(self, stop: str) -> str:
        """The text before ``stop``, which is skipped."""
        end = self.text.find(stop, self.at)
        if end < 0:
            raise self.fail(f"'{stop}' expected before the end of the text")
        piece = self.advance(end)
        self.advance(end + len(stop))
        return piece

    def program(self) -> Program:
        """The whole file."""
        while self.skip_space():
            start = self.at
            match = _DIRECTIVE.match(self.text, self.at)
            if not match:
                raise self.fail(f"directive expected, got '{self.until(chr(10))[:40]}'")
            while match and match[1] in ("visible", "extern", "weak", "common"):
                self.advance(match.end())
                self.skip_space()
                match = _DIRECTIVE.match(self.text, self.at)
            name = match[1] if match else ""
            if name in ("version", "target", "address_size", "file"):
                line = self.until("\n")
                if name == "target":
                    self.result.target = line.split()[1].rstrip(",")
            elif name == "section":
                self.until("}")
            elif name in ("entry", "func"):
                self.function(entry=name == "entry")
            elif name in ("global", "const", "shared"):
                variable = self.variable(self.until(";"))
                self.result.variables[variable.name] = variable
            elif name in ("alias", "pragma"):
                self.until(";")
            else:
                self.at = start
                raise self.fail(f"directive .{name} is not known")
        return self.result

    def function(self, entry: bool) -> None:
        """``.entry name (params) directives { body }`` or ``.func (returns) name (params) ..``."""
        ends = [p for p in (self.text.find(c, self.at) for c in "{;") if p >= 0]
        header = self.advance(min(ends))
        match = re.match(
            rf"\.(?:entry|func)\s*(?:\.noreturn\s*)?(?:\((?P<ret>[^)]*)\))?\s*(?P<name>{_NAME})"
            r"\s*(?:\((?P<par>[^)]*)\))?(?P<rest>.*)$",
            header,
            re.DOTALL,
        )
        if not match:
            raise self.fail("function header not understood")
        params, returns = (
            [self.variable(part) for part in (match[key] or "").split(",") if part.strip()]
            for key in ("par", "ret")
        )
        function = Function(match["name"], entry, params, returns)
        threads = re.search(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", match["rest"])
        if threads:
            function.max_threads = 1
            for extent in threads[1].split(","):
                function.max_threads *= int(extent)
        opening = self.text[self.at]
        self.advance(self.at + 1)
        if opening == "{":
            self.loc = ""
            function.body = self.scope(function, "")
            self.result.functions[function.name] = function

    def scope(self, function: Function, suffix: str) -> list[Instruction | Label]:
        """Statements up to the closing brace; names declared here get ``suffix``."""
        body: list[Instruction | Label] = []
        own: dict[str, str] = {}
        while True:
            if not self.skip_space():
                raise self.fail("'}' expected before the end of the text")
            char = self.text[self.at]
            label = _LABEL.match(self.text, self.at)
            if char == "}":
                self.advance(self.at + 1)
                return [rename_item(item, own) for item in body] if own else body
            if char == "{":
                self.advance(self.at + 1)
                self.scopes += 1
                body += self.scope(function, f"${self.scopes}")
            elif char == ";":
                self.advance(self.at + 1)
            elif label:
                self.advance(label.end())
                self.skip_space()
                if self.text.startswith(".branchtargets", self.at):
                    names = self.until(";").split(None, 1)[1]
                    function.targets[label[1]] = [n.strip() for n in names.split(",")]
                    continue
                own.update({label[1]: label[1] + suffix} if suffix else {})
                body.append(Label(label[1]))
            elif char == ".":
                self.declaration(function, suffix, own)
            else:
                body.append(self.instruction())

    def declaration(self, function: Function, suffix: str, own: dict[str, str]) -> None:
        """A directive inside a body."""
        match = _DIRECTIVE.match(self.text, self.at)
        name = match[1] if match else ""
        if name == "loc":
            self.location(self.until("\n"))
        elif name == "reg":
            type_, names = self.until(";").removeprefix(".reg").split(None, 1)
            for item in names.split(","):
                ranged = re.match(r"\s*([^\s<]+)\s*<\s*(\d+)\s*>", item)
                plain = item.strip()
                every = [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [plain]
                for reg in every:
                    function.registers[reg + suffix] = type_[1:]
                    if suffix:
                        own[reg] = reg + suffix
        elif name in ("local", "shared", "param"):
            variable = self.variable(self.until(";"))
            if suffix:
                own[variable.name] = variable.name + suffix
                variable.name += suffix
            function.variables[variable.name] = variable
        elif name in ("pragma", "callprototype"):
            self.until(";")
        else:
            raise self.fail(f"directive .{name} is not known")

    def location(self, text: str) -> None:
        """``.loc file line column[, function_name label, inlined_at file line column]``."""
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
        text = re.sub(r"\.(visible|extern|weak|attribute\([^)]*\))\s*", "", text.strip())
        match = _VARIABLE.match(text)
        if not match or match["type"] not in ("pred", *_SIZES):
            raise self.fail(f"variable '{text[:60]}' not understood")
        type_ = match["type"]
        count = 1
        for extent in re.findall(r"\[\s*(\d*)\s*\]", match["dims"]):
            count *= int(extent or 0)
        size = _SIZES[type_]
        align = int(match["align1"] or match["align2"] or size)
        initial = b""
        for item in re.findall(r"[^\s{},]+", match["init"] or ""):
            imm = _immediate(item)
            if imm is None:
                return Variable(
                    match["name"], match["space"], align, type_, count * size, b"", item
                )
            initial += (imm.value & (1 << 8 * size) - 1).to_bytes(size, "little")
        return Variable(match["name"], match["space"], align, type_, count * size, initial)

    def instruction(self) -> Instruction:
        """One statement up to its semicolon."""
        line = self.line
        text = " ".join(self.until(";").split())
        rest, guard = text, None
        if text.startswith("@"):
            word, rest = text[1:].split(None, 1)
            guard = Reg(word.lstrip("!"), word.startswith("!"))
        opcode, _, tail = rest.partition(" ")
        op, *mods = opcode.replace("::", ":").split(".")
        try:
            operands = tuple(_operand(piece) for piece in _split(tail))
        except ValueError:
            raise UnknownInstruction(
                f"PTX line {line}: instruction '{opcode}' is not known with operands '{tail}'"
            ) from None
        return Instruction(op, tuple(mods), operands, guard, line, text, self.loc)


_SIZES = {t: size_of(t) for t in DTYPES if t not in PACKED and t not in ("pred", "bf16", "tf32")}


_COMMA = re.compile(r",(?![^{\[(]*[}\])])")  # no closing bracket before the next opening one


def _split(text: str) -> list[str]:
    """Operands at the commas that no bracket encloses."""
    return [part for part in map(str.strip, _COMMA.split(text)) if part]


def _immediate(text: str) -> Imm | None:
    """A number as PTX writes it (PTX ISA, "Constants")."""
    if re.fullmatch(r"-?0[fF][0-9a-fA-F]{8}", text):
        return Imm(int(text[-8:], 16), 4)
    if re.fullmatch(r"-?0[dD][0-9a-fA-F]{16}", text):
        return Imm(int(text[-16:], 16), 8)
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
        base, _, offset = text.strip("[]").replace("+-", "-").strip().partition("+")
        if not offset and "-" in base[1:]:
            base, _, offset = base.partition("-")
            offset = "-" + offset
        inner = _operand(base.strip())
        if not isinstance(inner, Reg | Sym | Imm):
            raise ValueError(text)
        return Addr(inner, int(offset.strip() or "0", 0))
    if text[0] in "{(":
        return Vec(tuple(_operand(piece) for piece in _split(text[1:-1])))
    if "|" in text:
        return Vec(tuple(_operand(piece.strip()) for piece in text.split("|")))
    if text[0] == "!":
        return Reg(text[1:].strip(), True)
    if re.fullmatch(r"[A-Za-z_$%][\w$.]*", text):
        return Reg(text) if text[0] == "%" else Sym(text)
    raise ValueError(text)
