"""Folding: a list of steps becomes, for each sample, the fewest augment calls that are right.

Every step writes itself into the open :class:`Table` of a group of samples. Where it does not fit,
the table is closed and the next one starts from its output. Samples for which it fits and
samples for which it does not part ways, by their own parameters alone, so what happens to an
image never depends on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bigkernel.transforms.engine.samples import Bools, Ints, every, some
from bigkernel.transforms.engine.step import Step
from bigkernel.transforms.engine.table import Call, Table


@dataclass
class Group:
    """Samples (their places in the batch, ascending) that go through the same calls."""

    members: Ints
    calls: list[Call]


def fold(
    chain: Sequence[Step], height: Ints, width: Ints, channels: int, dtype: torch.dtype
) -> list[Group]:
    """Groups of samples with the calls that do ``chain`` to images of the given sizes."""
    start = Table(height, width, channels, dtype)
    written = 2 if len(chain) > 1 and chain[0].begins(chain[1], start) else 0
    groups = [_OpenGroup(np.arange(len(height)), start, [], written)]
    done: list[Group] = []
    while groups:
        group = groups.pop()
        if group.next < len(chain):
            groups.extend(group.advance(chain[group.next]))
        else:
            done.append(Group(group.members, [*group.calls, group.table.close()]))
    return done


@dataclass
class _OpenGroup:
    members: Ints
    table: Table
    calls: list[Call]
    next: int

    def advance(self, step: Step) -> list[_OpenGroup]:
        """The group past the step, or its two parts before it."""
        everyone = len(self.members) == len(step.active)  # members are ascending
        part = step if everyone else step.take(self.members)
        if part.shared and not every(part.active):
            if some(part.active):
                return self._split(part.active)
            return [_OpenGroup(self.members, self.table, self.calls, self.next + 1)]
        fits = part.fits(self.table) | ~part.active
        if every(fits):
            table, calls = self.table, self.calls
        elif some(fits):
            return self._split(fits)
        else:
            table, calls = self.table.successor(), [*self.calls, self.table.close()]
        height, width = part.sizes(table.height, table.width)
        part.write(table)
        table.height, table.width = height, width
        return [_OpenGroup(self.members, table, calls, self.next + 1)]

    def _split(self, mask: Bools) -> list[_OpenGroup]:
        parts = []
        for index in (np.flatnonzero(mask), np.flatnonzero(~mask)):
            calls = [call.take(index) for call in self.calls]
            table = self.table.take(index)
            parts.append(_OpenGroup(self.members[index], table, calls, self.next))
        return parts
