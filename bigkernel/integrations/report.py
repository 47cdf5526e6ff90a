"""What was replaced in a model, what was not, and why: a line for each kind of module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn


class Undo(Protocol):
    """What gives back one thing that was replaced; copied with the model that holds it."""

    def give_back(self) -> None: ...


@dataclass
class Report:
    """What ``patch`` did: a line for each kind of module, with how many there are.

    replaced: runs bigkernel's code. kept: needs none, and why. left: a miss, and why; with
    ``strict=True`` an error.
    """

    replaced: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"bigkernel: replaced {line}" for line in self.replaced]
        lines += [f"bigkernel: kept {line}" for line in self.kept]
        lines += [f"bigkernel: left {line}" for line in self.left]
        return "\n".join(lines or ["bigkernel: found nothing to replace"])


@dataclass
class Change:
    """What one replacement did to a model: how to undo it, and the parts of its report."""

    undo: list[Undo] = field(default_factory=list)
    replaced: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    kept: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    left: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def replace(self, module: nn.Module, what: str, note: str = "") -> None:
        self.replaced[what, type(module).__name__, note] += 1

    def keep(self, module: nn.Module, what: str, why: str) -> None:
        self.kept[what, type(module).__name__, why] += 1

    def leave(self, module: nn.Module, what: str, why: str) -> None:
        self.left[what, type(module).__name__, why] += 1

    def add_to(self, report: Report) -> None:
        for (what, kind, note), count in self.replaced.items():
            report.replaced.append(f"{what} in {count} x {kind}" + (f" ({note})" if note else ""))
        for lines, counts in ((report.kept, self.kept), (report.left, self.left)):
            lines += [f"{what} in {n} x {kind}: {why}" for (what, kind, why), n in counts.items()]
