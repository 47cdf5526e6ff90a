"""What a launch did: instructions, traffic, conflicts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from bigkernel.testing.ptx.lanes import Lanes
from bigkernel.testing.ptx.types import Array

SECTOR = 32


@dataclass
class Traffic:
    """Accesses of one kind to one array, per warp and instruction.

    ``sectors``: 32-byte sectors requested. ``minimum``: sectors that the same distinct bytes would
    fill if they lay side by side. ``bytes``: distinct bytes asked for.
    """

    sectors: int = 0
    minimum: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.sectors + other.sectors, self.minimum + other.minimum, self.bytes + other.bytes
        )


@dataclass
class Counters:
    """Counts over a launch; an instruction counts once per warp that executes it."""

    instructions: Counter[str] = field(default_factory=Counter)  # by opcode: "fma.rn.f32"
    loads: dict[str, Traffic] = field(default_factory=dict)  # by array name
    stores: dict[str, Traffic] = field(default_factory=dict)
    shared_wavefronts: int = 0
    shared_wavefronts_minimum: int = 0
    shared_by_line: dict[int, tuple[int, int]] = field(default_factory=dict)
    global_atomics: int = 0  # per thread
    shared_atomics: int = 0

    @property
    def classes(self) -> Counter[str]:
        """Instructions by class, the opcode up to its first dot: "fma", "ld", "mma"."""
        out: Counter[str] = Counter()
        for opcode, count in self.instructions.items():
            out[opcode.split(".")[0]] += count
        return out

    @property
    def total(self) -> int:
        """Warp instructions."""
        return self.instructions.total()

    @property
    def mma(self) -> int:
        """mma instructions, once per warp."""
        return self.classes["mma"]

    @property
    def global_loads(self) -> Traffic:
        """All arrays' loads."""
        return sum(self.loads.values(), Traffic())

    @property
    def global_stores(self) -> Traffic:
        """All arrays' stores."""
        return sum(self.stores.values(), Traffic())

    @property
    def global_sectors(self) -> int:
        """32-byte sectors requested by loads and stores together."""
        return self.global_loads.sectors + self.global_stores.sectors

    @property
    def bank_conflict_ratio(self) -> float:
        """Shared-memory wavefronts over the fewest possible; 1.0 is free of conflicts."""
        return self.shared_wavefronts / max(1, self.shared_wavefronts_minimum)

    def count_global(self, table: dict[str, Traffic], name: str, lanes: Lanes, at: Array,
                     size: int) -> None:  # fmt: skip
        """Add the sectors of one instruction at byte addresses ``at``."""
        rows = np.sort(lanes.by_warp(at, -1), axis=1)
        distinct = _firsts(rows).sum(1) * size
        sectors, minimum = _firsts(rows // SECTOR).sum(), (-(-distinct // SECTOR)).sum()
        table[name] = table.get(name, Traffic()) + Traffic(
            int(sectors), int(minimum), int(distinct.sum())
        )

    def count_shared(self, line: int, lanes: Lanes, at: Array, size: int) -> None:
        """Add the wavefronts of one instruction at shared addresses ``at``.

        32 banks of 4 bytes; 8-byte accesses go by half warps, 16-byte ones by quarters. Each such
        group needs as many wavefronts as its busiest bank has different words.
        """
        rows = lanes.by_warp(at, -1)
        words = rows // 4
        if size > 4:
            wide = words[:, :, None] + np.arange(size // 4)
            words = np.where(rows[:, :, None] >= 0, wide, -1).reshape(-1, 32)
        words = np.sort(words, axis=1)
        fresh = _firsts(words)
        row, _ = np.nonzero(fresh)
        busy = np.bincount(row * 32 + words[fresh] % 32, minlength=32 * len(words))
        peak = busy.reshape(-1, 32).max(1)
        wavefronts, minimum = int(peak.sum()), int((peak > 0).sum())
        self.shared_wavefronts += wavefronts
        self.shared_wavefronts_minimum += minimum
        before = self.shared_by_line.get(line, (0, 0))
        self.shared_by_line[line] = (before[0] + wavefronts, before[1] + minimum)


def _firsts(rows: Array) -> Array:
    """Where the distinct numbers of sorted rows come first; -1 is none."""
    return np.diff(rows, axis=1, prepend=-1) > 0
