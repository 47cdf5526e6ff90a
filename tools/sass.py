"""What the assembler made of a kernel: resources, occupancy, machine code (SASS) and its loops.

`assemble` turns PTX into a cubin and reads what ptxas says, `disassemble` cuts a cubin's
instructions into basic blocks and finds the loops. No GPU is needed: ptxas belongs to the CUDA
toolkit, nvdisasm and cuobjdump are looked for there, among PyPI's nvidia-* packages, and in Triton.
"""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

FLOAT = ("FFMA", "FADD", "FMUL", "DFMA", "DADD", "DMUL", "HFMA2", "HADD2", "HMUL2", "MUFU")
MATRIX = ("HMMA", "IMMA", "DMMA", "QMMA", "OMMA", "HGMMA", "QGMMA", "IGMMA")


@cache
def find_tool(name: str) -> str:
    """The path of a program of the CUDA toolkit; FileNotFoundError says where it was looked for."""
    folders = []
    nvcc = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc")
    if os.path.exists(nvcc):  # may be a wrapper: it knows its toolkit
        dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dryrun.stdout + dryrun.stderr, re.M)
        folders += [Path(top[1].strip(), "bin")] if top else []
    for packages in map(Path, [*site.getsitepackages(), site.getusersitepackages(), *sys.path]):
        folders += [*sorted(packages.glob("nvidia/*/bin"), reverse=True)]
        folders += [packages / "triton/backends/nvidia/bin"]
    for folder in folders:
        if (folder / name).is_file():
            return str((folder / name).resolve())
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(
            f"{name} is neither in the CUDA toolkit that nvcc belongs to, nor in PyPI's "
            f"nvidia-cuda-{name}, nor in Triton, nor on the path: pip install nvidia-cuda-{name}."
        )
    return found


def _run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Resources:
    """What a kernel takes, per thread but for ``shared``, its static bytes a block.

    ``stack`` bytes hold local arrays and spills; the spills' loads and stores are bytes of code,
    -1 where only the cubin is known.
    """

    registers: int
    stack: int
    shared: int
    spill_stores: int = -1
    spill_loads: int = -1


def assemble(ptx: str, arch: str, entry: str | None = None) -> tuple[bytes, dict[str, Resources]]:
    """(cubin, resources of each kernel) of PTX text; ``entry`` leaves the other kernels out."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        only = ["--entry", entry] if entry else []
        options = [f"-arch={arch}", "-v", *only]
        command = [find_tool("ptxas"), *options, str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas failed:\n{done.stdout}{done.stderr}")
        return target.read_bytes(), _ptxas_log(done.stdout + done.stderr)


def _ptxas_log(log: str) -> dict[str, Resources]:
    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    kernels = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        # Functions that a kernel calls follow with properties of their own: the first are its.
        kernels[name] = Resources(
            number(r"Used (\d+) registers", part),
            number(r"(\d+) bytes stack frame", part),
            number(r"(\d+) bytes smem", part),
            number(r"(\d+) bytes spill stores", part),
            number(r"(\d+) bytes spill loads", part),
        )
    return kernels


def resources(cubin: bytes) -> dict[str, Resources]:
    """Resources of each kernel in a cubin that someone else assembled."""
    with _file(cubin) as path:
        text = _run(find_tool("cuobjdump"), "--dump-resource-usage", path)
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    return {name: Resources(*map(int, n)) for name, *n in re.findall(pattern, text)}


class _file(tempfile.TemporaryDirectory):  # type: ignore[type-arg]
    """A cubin's bytes as a file, for as long as a ``with`` block."""

    def __init__(self, cubin: bytes) -> None:
        super().__init__()
        self.cubin = cubin

    def __enter__(self) -> Path:  # type: ignore[override]
        path = Path(super().__enter__(), "kernel.cubin")
        path.write_bytes(self.cubin)
        return path


@dataclass(frozen=True)
class Instruction:
    """A line of machine code."""

    opcode: str  # "LDG.E.128"
    operands: str
    predicate: str = ""  # "@!P0"

    @property
    def conditional(self) -> bool:
        """Whether a branch may not be taken: a predicate in front or among the operands."""
        guards = r"!?U?P[0-9T]|U?R\d+," if self.name == "BRA" else r"!?U?P[0-9T]"
        return bool(self.predicate or re.match(guards, self.operands))

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]


@dataclass
class Code:
    """Instructions, and what is counted in them."""

    instructions: list[Instruction]

    @cached_property
    def names(self) -> Counter[str]:
        return Counter(i.name for i in self.instructions)

    def __len__(self) -> int:
        return len(self.instructions)

    @property
    def matrix(self) -> int:
        """Tensor-core products."""
        return sum(self.names[name] for name in MATRIX)

    @property
    def arithmetic(self) -> int:
        """Floating-point instructions other than tensor-core products."""
        return sum(self.names[name] for name in FLOAT)

    @property
    def local(self) -> int:
        """Loads and stores of local memory: spills, unless the source has local arrays."""
        return self.names["LDL"] + self.names["STL"]

    @property
    def loaded(self) -> int:
        """Bytes that a thread loads from global memory, by LDG or LDGSTS."""
        return sum(width(i) for i in self.instructions if i.name in ("LDG", "LDGSTS"))

    @property
    def widest(self) -> int:
        """Bytes of the widest load from global memory."""
        widths = [width(i) for i in self.instructions if i.name in ("LDG", "LDGSTS")]
        return max(widths, default=0)


def width(access: Instruction) -> int:
    """Bytes that one thread moves by a load or store."""
    for modifier in reversed(access.opcode.split(".")):
        if modifier in ("128", "64", "32"):
            return int(modifier) // 8
        if modifier in ("U8", "S8", "U16", "S16"):
            return int(modifier[1:]) // 8
    return 4


@dataclass
class Kernel:
    """A kernel's reachable basic blocks; the first is the entry."""

    name: str
    blocks: list[list[Instruction]]
    successors: list[list[int]]
    loops: list[frozenset[int]] = field(init=False)  # natural loops, as sets of blocks

    def __post_init__(self) -> None:
        self.loops = natural_loops(self.successors)

    @property
    def code(self) -> Code:
        """Everything."""
        return self.part(range(len(self.blocks)))

    def part(self, blocks: "frozenset[int] | range") -> Code:
        return Code([i for block in sorted(blocks) for i in self.blocks[block]])

    @cached_property
    def main_loop(self) -> Code | None:
        """The loop in which the kernel spends its time; None where there is no loop.

        Among the loops with tensor-core products, and no loop with such products within, the one
        with most of them; where two have as many (a masked and an unmasked one), the shorter,
        which is the one without the rare cases. Without any, the innermost loop with most
        floating-point arithmetic (a copy has none), then with the widest loads from global memory.
        """
        code = {loop: self.part(loop) for loop in self.loops}
        matrix = [loop for loop in self.loops if code[loop].matrix]
        among = matrix or self.loops
        inner = [loop for loop in among if not any(other < loop for other in among)]

        def worth(c: Code) -> tuple[int, ...]:
            return (c.matrix, -len(c)) if matrix else (c.arithmetic, c.widest, c.loaded)

        return max((code[loop] for loop in inner), key=worth, default=None)


def natural_loops(successors: list[list[int]]) -> list[frozenset[int]]:
    """The natural loops of a flow graph whose node 0 is the entry and reaches every node.

    An edge to a node that dominates its origin closes a loop: that node and everything that reaches
    the edge without passing it. Loops with one head are one loop.
    """
    count = len(successors)
    predecessors: list[list[int]] = [[] for _ in range(count)]
    for node, after in enumerate(successors):
        for other in after:
            predecessors[other].append(node)
    every = (1 << count) - 1
    dominators = [1] + [every] * (count - 1)
    changed = True
    while changed:
        changed = False
        for node in range(1, count):
            meet = every
            for other in predecessors[node]:
                meet &= dominators[other]
            if dominators[node] != meet | 1 << node:
                dominators[node], changed = meet | 1 << node, True
    loops: dict[int, set[int]] = {}
    for node, after in enumerate(successors):
        for head in after:
            if dominators[node] >> head & 1:
                body = loops.setdefault(head, {head})
                stack = [node]
                while stack:
                    if (at := stack.pop()) not in body:
                        body.add(at)
                        stack += predecessors[at]
    return [frozenset(body) for body in loops.values()]


def disassemble(cubin: bytes) -> dict[str, Kernel]:
    """The kernels (and functions that they call) of a cubin, by name."""
    with _file(cubin) as path:
        listing = json.loads(_run(find_tool("nvdisasm"), "-json", path))
    return {function["function-name"]: _kernel(function) for function in listing[1]}


_ENDS = ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "EXIT", "RET", "BSYNC")
_LENGTH = 16  # bytes of an instruction


def _kernel(function: dict[str, Any]) -> Kernel:
    """One function of nvdisasm's listing, cut into blocks, without those that nothing reaches."""
    code = [
        Instruction(i["opcode"], i.get("operands", ""), i.get("predicate", ""))
        for i in function["sass-instructions"]
    ]
    start = function["start"]
    aims = [(_target(i) - start) // _LENGTH for i in code]
    heads = {0, *(k for k in aims if 0 <= k < len(code))}
    heads |= {k + 1 for k, i in enumerate(code) if i.name in _ENDS and k + 1 < len(code)}
    order = sorted(heads)
    number = {head: k for k, head in enumerate(order)}
    ends = [*order[1:], len(code)]
    meets: dict[str, set[int]] = {}  # where threads go on that meet at a barrier register
    for i, aim in zip(code, aims, strict=True):
        if i.name == "BSSY":
            meets.setdefault(_barrier(i), set()).add(aim)
    after = []
    for end in ends:
        last, aim = code[end - 1], aims[end - 1]
        to = {end}
        if last.name == "BSYNC":
            # One that stands anywhere but in front of the meeting point jumps there.
            meeting = meets.get(_barrier(last), {end})
            to = {end} if end in meeting else meeting
        elif last.name in _ENDS:
            to = ({end} if last.conditional else set()) | ({aim} if last.name == "BRA" else set())
        after.append([number[k] for k in sorted(to) if k in number])
    if tables := [k for k, end in enumerate(ends) if code[end - 1].name in ("BRX", "BRXU")]:
        # A jump through a table: to whatever nothing else leads to, but for the padding at the end.
        lone = {*range(1, len(order))}.difference(*after)
        lone = {k for k in lone if any(i.name != "NOP" for i in code[order[k] : ends[k]])}
        for k in tables:
            after[k] += sorted(lone)
    seen, stack = set[int](), [0]
    while stack:
        if (at := stack.pop()) not in seen:
            seen.add(at)
            stack += after[at]
    kept = sorted(seen)
    place = {old: new for new, old in enumerate(kept)}
    blocks = [code[order[k] : ends[k]] for k in kept]
    return Kernel(function["function-name"], blocks, [[place[t] for t in after[k]] for k in kept])


def _target(i: Instruction) -> int:
    """The address that a branch names, -1 where there is none in this function."""
    found = re.search(r"(?:^|,)(0x[0-9a-f]+)$", i.operands) if i.name in ("BRA", "BSSY") else None
    return int(found[1], 16) if found else -1


def _barrier(i: Instruction) -> str:
    return next(iter(re.findall(r"\bB\d+\b", i.operands)), "")


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor holds at a time, and the most shared memory of one block."""

    warps: int
    blocks: int
    shared: int
    shared_per_block: int


# CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute Capability"; how registers
# and shared memory are handed out: cuda_occupancy.h of the toolkit, with which a test compares.
LIMITS = {
    "sm_80": Limits(64, 32, 164 << 10, 163 << 10),
    "sm_86": Limits(48, 16, 100 << 10, 99 << 10),
    "sm_89": Limits(48, 24, 100 << 10, 99 << 10),
    "sm_90": Limits(64, 32, 228 << 10, 227 << 10),
    "sm_100": Limits(64, 32, 228 << 10, 227 << 10),
    "sm_120": Limits(48, 24, 100 << 10, 99 << 10),
}
_REGISTERS, _PARTITIONS, _REGISTER_UNIT = 65536, 4, 256
_SHARED_UNIT, _SHARED_RESERVED = 128, 1024


def occupancy(arch: str, registers: int, threads: int, shared: int) -> tuple[int, float]:
    """(blocks on a multiprocessor at a time, share of its warps), theoretical.

    registers: per thread; threads: of a block; shared: bytes of a block, static and dynamic.
    """
    limits = LIMITS[arch]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // _PARTITIONS // max(per_warp, 1) * _PARTITIONS // warps
    if per_warp * -(-warps // _PARTITIONS) * _PARTITIONS > _REGISTERS:
        by_registers = 0
    taken = -(-(shared + _SHARED_RESERVED) // _SHARED_UNIT) * _SHARED_UNIT
    by_shared = limits.shared // taken if shared <= limits.shared_per_block else 0
    blocks = min(limits.warps // warps, limits.blocks, by_registers, by_shared)
    return blocks, blocks * warps / limits.warps
