"""A kernel as basic blocks, with the functions that it calls put in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from bigkernel.testing.ptx.errors import PtxError, UnknownInstruction
from bigkernel.testing.ptx.parser import (
    Function,
    Instruction,
    Label,
    Name,
    Program,
    Variable,
    items_of,
    names_of,
    rename,
)
from bigkernel.testing.ptx.types import size_of

_DEPTH = 16  # of calls
_ENDS = ("bra", "brx", "ret", "exit", "trap")


@dataclass(slots=True)
class BasicBlock:
    """Instructions that run one after another, and how they end."""

    body: list[int] = field(default_factory=list)  # places in Flat.instructions
    end: int | None = None  # the branch, barrier or return, if there is one
    targets: list[int] = field(default_factory=list)  # the blocks that a branch names


@dataclass(slots=True)
class Flat:
    """A kernel without calls."""

    name: str
    registers: dict[str, str]  # and their types
    variables: dict[str, Variable]  # shared and local ones
    targets: dict[str, list[str]]  # .branchtargets
    instructions: list[Instruction] = field(default_factory=list)
    blocks: list[BasicBlock] = field(default_factory=lambda: [BasicBlock()])
    offsets: dict[str, int] = field(default_factory=dict)  # of variables in their memory
    shared_bytes: int = 0  # static
    local_bytes: int = 0
    granule: int = 4  # shortest access that may touch shared memory


def flatten(program: Program, function: Function) -> Flat:
    """Put calls in place, lay out shared and local memory, cut into basic blocks."""
    flat = Flat(function.name, {**function.registers}, {**function.variables}, {**function.targets})
    body = list(_inline(program, function.body, flat, 0))
    used = {n for i in body if isinstance(i, Instruction) for n in names_of(i.operands)}
    for name, variable in program.variables.items():
        if variable.space == "shared" and name in used:
            flat.variables[name] = variable
        if variable.address and name in used:
            raise UnknownInstruction(f"'{name}' holds the address of '{variable.address}'")
    sizes = {True: 0, False: 0}
    for variable in sorted(flat.variables.values(), key=lambda v: v.size == 0):  # dynamic last
        shared = variable.space == "shared"
        sizes[shared] += -sizes[shared] % max(variable.align, 16 if variable.size == 0 else 1)
        flat.offsets[variable.name] = sizes[shared]
        sizes[shared] += variable.size
    flat.shared_bytes, flat.local_bytes = sizes[True], sizes[False]
    labels: dict[str, int] = {}
    for item in body:
        if isinstance(item, Label):
            if flat.blocks[-1].body:
                flat.blocks.append(BasicBlock())
            labels[item.name] = len(flat.blocks) - 1
            continue
        here = len(flat.instructions)
        flat.instructions.append(item)
        flat.granule = min(flat.granule, _granule(item))
        waits = item.op in ("bar", "barrier") and item.mods[0] != "warp"
        if waits or item.op in _ENDS:
            flat.blocks[-1].end = here
            flat.blocks.append(BasicBlock())
        else:
            flat.blocks[-1].body.append(here)
    for block in flat.blocks:
        last = flat.instructions[block.end] if block.end is not None else None
        if last is not None and last.op in ("bra", "brx"):
            (name,) = names_of(last.operands[-1])
            names = flat.targets.get(name, []) if last.op == "brx" else [name]
            if not names or not labels.keys() >= {*names}:
                raise PtxError(f"PTX line {last.line}: label not found: {last.text}")
            block.targets = [labels[n] for n in names]
    return flat


def _granule(i: Instruction) -> int:
    if i.op not in ("ld", "st", "atom", "red") or {"global", "local", "param", "const"} & {*i.mods}:
        return 4
    return min(4, size_of(i.type)) if i.type != "b128" else 4


def _inline(
    program: Program, body: list[Instruction | Label], flat: Flat, depth: int
) -> Iterator[Instruction | Label]:
    """The body with each called function's statements, under names of their own, in its place."""
    for item in body:
        if not isinstance(item, Instruction) or item.op != "call":
            yield item
            continue
        # (results), function, (arguments); either list may be missing
        at = next(k for k, o in enumerate(item.operands) if isinstance(o, Name))
        (name,) = names_of(item.operands[at])
        given = [o for k, group in enumerate(item.operands) if k != at for o in items_of(group)]
        if name == "__assertfail":
            yield replace(item, op="trap", mods=(), operands=())
            continue
        callee = program.functions.get(name)
        if callee is None or item.guard is not None:
            raise item.unknown(f"call of '{name}'")
        if depth == _DEPTH:
            raise PtxError(f"PTX line {item.line}: calls of '{name}' nest deeper than {_DEPTH}")
        suffix = f"@{len(flat.variables)}.{len(flat.registers)}"
        own = [*callee.registers, *callee.variables, *callee.targets]
        own += [label.name for label in callee.body if isinstance(label, Label)]
        names = {n: n + suffix for n in own}
        for formal, actual in zip(callee.returns + callee.params, given, strict=True):
            if not isinstance(actual, Name):
                raise item.unknown("an argument is no .param variable")
            names[formal.name] = actual.name
        flat.registers |= {names[n]: t for n, t in callee.registers.items()}
        flat.variables |= {names[n]: replace(v, name=names[n]) for n, v in callee.variables.items()}
        flat.targets |= {names[n]: [names[t] for t in ts] for n, ts in callee.targets.items()}
        done = Label(f"$return{suffix}")
        renamed = [
            replace(inner, op="bra", operands=(Name(done.name),))
            if isinstance(inner, Instruction) and inner.op == "ret"
            else inner
            for inner in rename(callee.body, names)
        ]
        yield from _inline(program, renamed, flat, depth + 1)
        yield done
