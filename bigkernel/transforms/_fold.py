"""Folding: a list of steps becomes, for each sample, the fewest augment calls that are right.

Every step is written into the open :class:`Segment` of a group of samples. Where it does not fit,
the segment is closed and the next one starts from its output. Samples for which it fits and
samples for which it does not part ways, by their own parameters alone, so what happens to an
image never depends on its neighbours in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bigkernel.transforms import _steps as steps
from bigkernel.transforms._draws import Bools, Ints
from bigkernel.transforms._segment import Call, Segment


@dataclass
class Group:
    """Samples (their places in the batch, ascending) that go through the same calls."""

    members: Ints
    calls: list[Call]


def fold(
    chain: list[steps.Step], height: Ints, width: Ints, channels: int, dtype: torch.dtype
) -> list[Group]:
    """Groups of samples with the calls that do ``chain`` to images of the given sizes."""
    start = Segment(height, width, channels, dtype)
    groups = [_OpenGroup(np.arange(len(height)), start, [], 0)]
    done: list[Group] = []
    while groups:
        group = groups.pop()
        if group.next < len(chain):
            groups.extend(group.advance(chain[group.next]))
        else:
            done.append(Group(group.members, [*group.calls, group.segment.close()]))
    return done


@dataclass
class _OpenGroup:
    members: Ints
    segment: Segment
    calls: list[Call]
    next: int

    def advance(self, step: steps.Step) -> list[_OpenGroup]:
        """The group past the step, or its two parts before it."""
        everyone = len(self.members) == len(step.active)  # members are ascending
        part = step if everyone else step.take(self.members)
        if isinstance(part, (steps.Normalize, steps.ToDtype)) and not part.active.all():
            # A table has one normalisation: samples with and without it go apart.
            if part.active.any():
                return self._split(part.active)
            return [_OpenGroup(self.members, self.segment, self.calls, self.next + 1)]
        fits = self.segment.fits(part)
        if fits.all():
            segment, calls = self.segment, self.calls
        elif fits.any():
            return self._split(fits)
        else:
            segment, calls = self.segment.successor(), [*self.calls, self.segment.close()]
        segment.add(part)
        return [_OpenGroup(self.members, segment, calls, self.next + 1)]

    def _split(self, mask: Bools) -> list[_OpenGroup]:
        parts = []
        for index in (np.flatnonzero(mask), np.flatnonzero(~mask)):
            calls = [call.take(index) for call in self.calls]
            segment = self.segment.take(index)
            parts.append(_OpenGroup(self.members[index], segment, calls, self.next))
        return parts
