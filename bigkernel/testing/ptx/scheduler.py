"""Runs a batch of blocks: the lanes at the lowest program counter go first.

So lanes that part at a branch meet again where the compiler laid the code after it. Barriers hold
a block's lanes until all it waits for are there (PTX ISA, "Parallel Synchronization: bar").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bigkernel.testing.ptx.errors import BarrierError, NoProgress, Trap
from bigkernel.testing.ptx.lanes import Lanes
from bigkernel.testing.ptx.machine import Machine
from bigkernel.testing.ptx.parser import Instruction, names_of
from bigkernel.testing.ptx.types import Array


@dataclass(slots=True)
class _Arrival:
    """Lanes at a barrier."""

    index: Array
    goes_to: int
    k: int
    waits: bool
    warps: Array
    seen: Array  # the latest of their vector clocks
    predicate: Array  # of bar.red


class Scheduler:
    """The program counters of a batch."""

    def __init__(self, machine: Machine) -> None:
        self.m = machine
        self.ready: dict[int, list[Array]] = {}
        self.arrivals: dict[tuple[int, int], list[_Arrival]] = {}  # by (block, barrier)
        self.executed = np.zeros(len(machine.job.pieces), np.int64)

    def run(self) -> None:
        """Until every thread has ended."""
        m = self.m
        everyone = m.everyone.index
        self.ready = {0: [everyone if m.alive.all() else everyone[m.alive]]}
        steps = 0
        while self.ready:
            pc = min(self.ready)
            groups = self.ready.pop(pc)
            if pc >= len(m.job.pieces):
                m.alive[np.concatenate(groups)] = False
            else:
                index = groups[0] if len(groups) == 1 else np.sort(np.concatenate(groups))
                self.step(pc, index)
            steps += 1
            if steps > m.job.max_steps:
                block = m.flat.blocks[pc]
                k = block.body[0] if block.body else block.end or 0
                what = f"still running after {steps - 1} basic blocks; raise max_steps if it should"
                raise m.fail(NoProgress, index[0], k, what)
            if not self.ready and self.arrivals:
                self.stuck()
        m.count_instructions(self.executed)

    def go(self, pc: int, index: Array) -> None:
        """Lanes continue at a basic block."""
        if len(index):
            self.ready.setdefault(pc, []).append(index)

    def step(self, pc: int, index: Array) -> None:
        """Run one basic block."""
        m = self.m
        piece, block = m.job.pieces[pc], m.flat.blocks[pc]
        lanes = m.everyone if len(index) == m.layout.lanes else Lanes(m.layout, index, index)
        inputs = [lanes.take(m.register(name)) for name in piece.inputs]
        outputs, tail = piece.run(lanes.alone(), m, *inputs)
        self.executed[pc] += lanes.warp_count
        for name, value in zip(piece.outputs, outputs, strict=True):
            m.registers[name] = lanes.put(m.register(name), value)
        if block.end is None:
            self.go(pc + 1, index)
            return
        guard, operands = tail
        taken, rest = index, index[:0]
        if guard is not None and not guard.all():
            taken, rest = index[guard], index[~guard]
            operands = tuple(o[guard] for o in operands)
        self.go(pc + 1, rest)
        if len(taken):
            self.finish(pc, taken, operands)

    def finish(self, pc: int, index: Array, operands: Any) -> None:
        """Lanes execute the last instruction of a basic block."""
        m = self.m
        k, targets = m.flat.blocks[pc].end, m.flat.blocks[pc].targets
        assert k is not None
        i = m.flat.instructions[k]
        if i.op == "bra":
            self.go(targets[0], index)
        elif i.op == "brx":
            for value in np.unique(operands[0]):
                self.go(targets[int(value)], index[operands[0] == value])
        elif i.op in ("ret", "exit"):
            m.alive[index] = False
        elif i.op == "trap":
            raise m.fail(Trap, index[0], k, "the kernel gave up (trap or failed assert)")
        else:
            self.barrier(i, k, pc, index, operands)

    def barrier(self, i: Instruction, k: int, pc: int, index: Array, operands: Any) -> None:
        """bar.sync, bar.arrive, bar.red, and their barrier.cta forms."""
        m = self.m
        mods = set(i.mods)
        if mods - {"sync", "arrive", "red", "aligned", "cta", "popc", "and", "or", "u32", "pred"}:
            raise i.unknown()
        numbers = operands[:-1] if "red" in mods else operands
        predicate = operands[-1] if "red" in mods else np.zeros(len(index), bool)
        everyone = len(index) == m.layout.lanes and m.alive.all() and not self.arrivals
        if everyone and len(numbers) == 1 and "sync" in mods:
            m.shared.synchronize()
            self.go(pc + 1, index)
            return
        lanes = Lanes(m.layout, index)
        for block, barrier in np.unique(np.stack((lanes.block, numbers[0]), 1), axis=0).tolist():
            mine = (lanes.block == block) & (numbers[0] == barrier)
            warps = np.unique(lanes.warp[mine])
            seen = m.shared.clock[block, warps].max(0)
            waits = "arrive" not in mods
            arrival = _Arrival(index[mine], pc + 1, k, waits, warps, seen, predicate[mine])
            self.arrivals.setdefault((block, barrier), []).append(arrival)
            if not waits:
                m.shared.advance(lanes.block[mine], lanes.warp[mine])
                self.go(pc + 1, index[mine])
            expected = int(numbers[1][mine][0]) if len(numbers) > 1 else m.layout.threads
            self.release(block, barrier, expected)

    def release(self, block: int, barrier: int, expected: int) -> None:
        """Let a barrier's lanes go on if all are there."""
        m = self.m
        here = self.arrivals[block, barrier]
        count = sum(len(a.index) for a in here)
        if count < expected:
            return
        if count > expected:
            what = f"{count} threads arrived at barrier {barrier}, which expects {expected}"
            raise m.fail(BarrierError, here[-1].index[0], here[-1].k, what)
        del self.arrivals[block, barrier]
        self.check_aligned(here, barrier)
        waiting = [a for a in here if a.waits]
        warps = np.unique(np.concatenate([a.warps for a in waiting]))
        m.shared.synchronize_warps(block, np.max([a.seen for a in here], axis=0), warps)
        votes = np.concatenate([a.predicate for a in here])
        for a in waiting:
            if "red" in m.flat.instructions[a.k].mods:
                self.give(a, votes)
            self.go(a.goes_to, a.index)

    def give(self, arrival: _Arrival, votes: Array) -> None:
        """bar.red's result."""
        i = self.m.flat.instructions[arrival.k]
        (name,) = names_of(i.operands[0])
        value = votes.sum() if "popc" in i.mods else votes.all() if "and" in i.mods else votes.any()
        merged = self.m.register(name).copy()
        merged[arrival.index] = value
        self.m.registers[name] = merged

    def check_aligned(self, here: list[_Arrival], barrier: int) -> None:
        """A warp executes one and the same aligned barrier together."""
        m = self.m
        places: dict[int, _Arrival] = {}
        for a in here:
            i = m.flat.instructions[a.k]
            if i.op == "barrier" and "aligned" not in i.mods:
                continue
            for warp in a.warps.tolist():
                other = places.setdefault(warp, a)
                if other.k != a.k:
                    what = (f"its warp reaches barrier {barrier} in two places, the other in PTX "
                            f"line {m.line(other.k)}")  # fmt: skip
                    raise m.fail(BarrierError, a.index[0], a.k, what)

    def stuck(self) -> None:
        """Nobody can go on: some barrier is not reached by all."""
        m = self.m
        (block, barrier), here = next(iter(self.arrivals.items()))
        threads = np.arange(m.layout.threads) + block * m.layout.padded
        absent = np.setdiff1d(threads, np.concatenate([a.index for a in here]))
        what = f"{len(threads) - len(absent)} of {len(threads)} threads reach barrier {barrier}"
        if len(absent):
            lane = int(absent[0])
            place = "has returned"
            for (_, other), arrivals in self.arrivals.items():
                for a in arrivals:
                    if lane in a.index:
                        place = f"waits at barrier {other} in PTX line {m.line(a.k)}"
            what += f"; {m.layout.thread_name(lane)} {place}"
        raise m.fail(BarrierError, here[0].index[0], here[0].k, what)
