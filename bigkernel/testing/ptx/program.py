"""A kernel as basic blocks, with the functions that it calls put in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from bigkernel.testing.ptx.alu import unknown
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
    rename,
)
from bigkernel.testing.ptx.types import size_of

_DEPTH = 16


@dataclass(slots=True)
class BasicBlock:
    """Instructions that run one after another, and how they end."""

    body: list[int]  # places in Flat.instructions
    end: int | None = None  # the branch, barrier or return, if there is one


@dataclass(slots=True)
class Flat:
    """A kernel without calls."""

    name: str
    function: Function
    instructions: list[Instruction]
    blocks: list[BasicBlock]
    labels: dict[str, int]  # block numbers
    registers: dict[str, str]
    offsets: dict[str, int]  # of shared and local variables in their memories
    shared: set[str]  # which of those are shared
    shared_bytes: int  # static
    local_bytes: int
    granule: int  # shortest access that may touch shared memory


@dataclass(slots=True)
class Piece:
    """A translated basic block."""

    run: Callable[..., Any]
    inputs: list[str]
    outputs: list[str]
    source: str


def flatten(program: Program, function: Function) -> Flat:
    """Put calls in place, lay out shared and local memory, cut into basic blocks."""
    registers = dict(function.registers)
    variables = dict(function.variables)
    targets = dict(function.targets)
    body = list(_inline(program, function.body, registers, variables, targets, 0))
    used = {name for item in body if isinstance(item, Instruction) for name in _names(item)}
    for name, variable in program.variables.items():
        if variable.space == "shared" and name in used:
            variables[name] = variable
        if variable.address and name in used:
            raise UnknownInstruction(f"'{name}' holds the address of '{variable.address}'")
    offsets: dict[str, int] = {}
    sizes = {"shared": 0, "local": 0}
    for variable in sorted(variables.values(), key=lambda v: v.size == 0):  # dynamic comes last
        space = "shared" if variable.space == "shared" else "local"
        sizes[space] += -sizes[space] % max(variable.align, 16 if variable.size == 0 else 1)
        offsets[variable.name] = sizes[space]
        sizes[space] += variable.size
    flat = Flat(
        *(function.name, function, [], [BasicBlock([])], {}, registers, offsets),
        {v.name for v in variables.values() if v.space == "shared"},
        *(sizes["shared"], sizes["local"], 4),
    )
    for item in body:
        if isinstance(item, Label):
            if flat.blocks[-1].body:
                flat.blocks.append(BasicBlock([]))
            flat.labels[item.name] = len(flat.blocks) - 1
            continue
        here = len(flat.instructions)
        flat.instructions.append(item)
        flat.granule = min(flat.granule, _granule(item))
        if ends_block(item):
            flat.blocks[-1].end = here
            flat.blocks.append(BasicBlock([]))
        else:
            flat.blocks[-1].body.append(here)
    function.targets = targets
    return flat


def ends_block(i: Instruction) -> bool:
    """Whether threads may part, end or wait after the instruction."""
    if i.op in ("bar", "barrier"):
        return i.mods[0] != "warp"
    return i.op in ("bra", "brx", "ret", "exit", "trap")


def _granule(i: Instruction) -> int:
    if i.op not in ("ld", "st", "atom", "red") or {"global", "local", "param", "const"} & {*i.mods}:
        return 4
    return min(4, size_of(i.type)) if i.type != "b128" else 4


def _names(i: Instruction) -> Iterator[str]:
    """Every name among the operands."""
    stack: list[Operand] = list(i.operands)
    while stack:
        operand = stack.pop()
        if isinstance(operand, Vec):
            stack += operand.items
        elif isinstance(operand, Addr):
            stack.append(operand.base)
        elif not isinstance(operand, Imm):
            yield operand.name


def _inline(
    program: Program,
    body: list[Instruction | Label],
    registers: dict[str, str],
    variables: dict[str, Variable],
    targets: dict[str, list[str]],
    depth: int,
) -> Iterator[Instruction | Label]:
    """The body with each called function's statements, under names of their own, in its place."""
    for item in body:
        if not isinstance(item, Instruction) or item.op != "call":
            yield item
            continue
        name, returns, arguments = _call(item)
        if name == "__assertfail":
            yield replace(item, op="trap", mods=(), operands=())
            continue
        callee = program.functions.get(name)
        if callee is None or item.guard is not None:
            raise unknown(item, f"call of '{name}'")
        if depth == _DEPTH:
            raise PtxError(f"PTX line {item.line}: calls of '{name}' nest deeper than {_DEPTH}")
        suffix = f"@{len(variables)}.{len(registers)}"
        own = [*callee.registers, *callee.variables, *callee.targets]
        own += [label.name for label in callee.body if isinstance(label, Label)]
        names = {n: n + suffix for n in own}
        for formal, actual in zip(callee.returns + callee.params, returns + arguments, strict=True):
            names[formal.name] = actual
        registers |= {names[n]: t for n, t in callee.registers.items()}
        variables |= {names[n]: replace(v, name=names[n]) for n, v in callee.variables.items()}
        targets |= {names[n]: [names[t] for t in ts] for n, ts in callee.targets.items()}
        done = f"$return{suffix}"
        renamed = [
            replace(inner, op="bra", operands=(Sym(done),))
            if isinstance(inner, Instruction) and inner.op == "ret"
            else inner
            for inner in rename(callee.body, names)
        ]
        yield from _inline(program, renamed, registers, variables, targets, depth + 1)
        yield Label(done)


def _call(i: Instruction) -> tuple[str, list[str], list[str]]:
    """The called function, the variables for its results, and those with its arguments."""
    operands = list(i.operands)
    returns = operands.pop(0) if isinstance(operands[0], Vec) else Vec(())
    target = operands.pop(0)
    arguments = operands.pop(0) if operands else Vec(())
    names: list[list[str]] = []
    for group in (returns, arguments):
        items = group.items if isinstance(group, Vec) else ()
        names.append([item.name for item in items if isinstance(item, Sym)])
        if len(names[-1]) != len(items):
            raise unknown(i, "an argument is no .param variable")
    if not isinstance(target, Sym) or operands:
        raise unknown(i, "indirect call")
    return target.name, names[0], names[1]


def successors(flat: Flat, number: int) -> list[int]:
    """The blocks that may follow a block."""
    end = flat.blocks[number].end
    following = [number + 1] if number + 1 < len(flat.blocks) else []
    if end is None:
        return following
    i = flat.instructions[end]
    goes_on = following if i.guard else []
    if i.op == "bra":
        return [*goes_on, target(flat, i, i.operands[0])]
    if i.op == "brx":
        return [*goes_on, *branch_targets(flat, i)]
    return goes_on if i.op in ("ret", "exit", "trap") else following


def target(flat: Flat, i: Instruction, operand: Operand) -> int:
    """The block that a branch names."""
    if not isinstance(operand, Sym | Reg) or operand.name not in flat.labels:
        raise PtxError(f"PTX line {i.line}: label not found: {i.text}")
    return flat.labels[operand.name]


def branch_targets(flat: Flat, i: Instruction) -> list[int]:
    """The blocks of brx.idx's table."""
    table = i.operands[1]
    assert isinstance(table, Sym | Reg)
    return [target(flat, i, Sym(name)) for name in flat.function.targets[table.name]]
