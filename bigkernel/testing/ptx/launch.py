"""Modules and kernels: from a file or a text to launches."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bigkernel.testing.ptx.compiler import compiled
from bigkernel.testing.ptx.counters import Counters
from bigkernel.testing.ptx.lanes import Layout
from bigkernel.testing.ptx.machine import Job, Machine
from bigkernel.testing.ptx.memory import PARAM_BASE, Memory
from bigkernel.testing.ptx.parser import Function, Program, Variable, parse
from bigkernel.testing.ptx.program import Flat, flatten
from bigkernel.testing.ptx.scheduler import Scheduler
from bigkernel.testing.ptx.shared import Shared
from bigkernel.testing.ptx.translate import translate
from bigkernel.testing.ptx.writer import Piece

_LANES = 8192  # threads that run together; more would leave the cache
_TRACKING = 64 << 20  # bytes that shared memory and its bookkeeping may take together


def compile(  # named after what it does: ptx.compile
    source: str | Path, arch: str = "sm_80", flags: Sequence[str] = ()
) -> Module:
    """Compile a CUDA source file (or source text with a newline) by ``nvcc -ptx`` and load it.

    arch: "sm_80", "sm_90" ...; flags: more options for nvcc, such as ["-I", "csrc"].
    Raises RuntimeError with nvcc's message where it fails or is missing.
    """
    options = ["-ptx", f"-arch={arch}", "-lineinfo", "-std=c++17", *flags]
    return load((compiled(source, options, "ptx.compile") / "out").read_text())


def load(text: str) -> Module:
    """Load PTX text, such as ``compiled.asm["ptx"]`` of a Triton kernel."""
    return Module(parse(text), text)


class Module:
    """The kernels of one PTX file."""

    def __init__(self, program: Program, text: str) -> None:
        self.program, self.text = program, text
        self._kernels: dict[str, Kernel] = {}

    @property
    def kernels(self) -> list[str]:
        """The (mangled) names of all kernels."""
        return [f.name for f in self.program.functions.values() if f.entry]

    def __getitem__(self, name: str) -> Kernel:
        """A kernel by its mangled name, or by its C++ name where only one has it."""
        found = [n for n in self.kernels if n == name] or [
            n for n in self.kernels if name in _identifiers(n)
        ]
        if len(found) != 1:
            why = "is ambiguous" if found else "is not there"
            raise KeyError(f"kernel '{name}' {why}; kernels: {', '.join(found or self.kernels)}")
        if found[0] not in self._kernels:
            self._kernels[found[0]] = Kernel(self.program, self.program.functions[found[0]])
        return self._kernels[found[0]]


def _identifiers(mangled: str) -> list[str]:
    """The identifiers in an Itanium-mangled name: _Z3addPf -> ["add"]."""
    names = []
    while match := re.search(r"\d+", mangled):
        rest, length = mangled[match.end() :], int(match[0])
        names.append(rest[:length])
        mangled = rest[length:]
    return names


def _symbols(program: Program, memory: Memory) -> dict[str, int]:
    """Addresses of a module's variables, which live in each Memory once."""
    known = memory.variables.setdefault(id(program), (program, {}))[1]
    for variable in program.variables.values():
        if variable.space != "shared" and variable.name not in known:
            data = np.zeros(variable.size, np.uint8)
            initial = np.frombuffer(variable.initial, np.uint8)
            data[: len(initial)] = initial
            readonly = variable.space == "const"
            known[variable.name] = memory.register(data, variable.name, readonly)
    return known


class Kernel:
    """One kernel, ready to launch."""

    def __init__(self, program: Program, function: Function) -> None:
        self.program, self.function = program, function
        self.name = function.name

    @cached_property
    def _translated(self) -> tuple[Flat, list[Piece]]:
        flat = flatten(self.program, self.function)
        return flat, translate(flat)

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        memory: Memory,
        shared: int = 0,
        max_steps: int = 10_000_000,
    ) -> Counters:
        """Run the kernel and return its counters.

        grid, block: one to three extents. shared: bytes of dynamic shared memory. args: one value
        per parameter: an address from ``memory.register``, an int or float, a numpy scalar, or
        bytes or a ctypes.Structure for a struct. max_steps: basic blocks after which a batch
        counts as endless.
        Raises a Finding for a mistake of the kernel, ValueError or TypeError for bad arguments.
        """
        shape = _extents("grid", grid), _extents("block", block)
        threads = int(np.prod(shape[1]))
        allowed = min(1024, self.function.max_threads or 1024)
        if threads > allowed:
            raise ValueError(
                f"{self.name}: block must have at most {allowed} threads, got {threads}"
            )
        params, offsets = self._pack(args)
        flat, pieces = self._translated
        counters = Counters()
        symbols = _symbols(self.program, memory) | offsets
        job = Job(flat, pieces, memory, symbols, params, shared, counters, max_steps)
        warps = -(-threads // 32)
        needed = Shared.bytes_per_block(flat.shared_bytes + shared, flat.granule, warps)
        needed += flat.local_bytes * warps * 32
        at_once = max(1, min(_LANES // (32 * warps), _TRACKING // max(1, needed)))
        blocks = int(np.prod(shape[0], dtype=np.int64))
        with np.errstate(all="ignore"):
            for first in range(0, blocks, at_once):
                layout = Layout(*shape, range(first, min(first + at_once, blocks)))
                Scheduler(Machine(job, layout)).run()
        return counters

    def _pack(self, args: Sequence[Any]) -> tuple[Any, dict[str, int]]:
        """The parameters' bytes and addresses."""
        params = self.function.params
        if len(args) != len(params):
            raise ValueError(f"{self.name} takes {len(params)} arguments, got {len(args)}")
        data, offsets = bytearray(), {}
        for number, (param, value) in enumerate(zip(params, args, strict=True)):
            data += bytes(-len(data) % param.align)
            offsets[param.name] = PARAM_BASE + len(data)
            data += self._bytes(number, param, value)
        return np.frombuffer(bytes(data) + bytes(8), np.uint8)[: len(data)].copy(), offsets

    def _bytes(self, number: int, param: Variable, value: Any) -> bytes:
        where = f"{self.name}: argument {number}"
        if isinstance(value, bytes | bytearray | ctypes.Structure | np.generic):
            raw = value.tobytes() if isinstance(value, np.generic) else bytes(value)
            if len(raw) != param.size:
                raise ValueError(f"{where} must have {param.size} bytes, got {len(raw)}")
            return raw
        if not isinstance(value, int | float) or param.size > 8:
            hint = "; pass memory.register(array)" if hasattr(value, "dtype") else ""
            raise TypeError(
                f"{where} must be a number or {param.size} bytes, got {type(value).__name__}{hint}"
            )
        if isinstance(value, float) or param.type in ("f32", "f64"):
            return struct.pack("<d" if param.size == 8 else "<f", value)
        return (int(value) & (1 << 8 * param.size) - 1).to_bytes(param.size, "little")


def _extents(what: str, given: Sequence[int]) -> tuple[int, int, int]:
    extents = (*map(int, given), 1, 1, 1)[:3]
    if not 1 <= len(given) <= 3 or min(extents) < 1:
        raise ValueError(f"launch: {what} must be one to three positive numbers, got {given}")
    return extents[0], extents[1], extents[2]
