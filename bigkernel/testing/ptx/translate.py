"""Each basic block -> the source of one Python function of numpy calls."""

from __future__ import annotations

from bigkernel.testing.ptx.instructions import BlockWriter
from bigkernel.testing.ptx.program import Flat, Piece, successors
from bigkernel.testing.ptx.writer import Scope


def translate(flat: Flat) -> list[Piece]:
    """All blocks of a kernel as functions."""
    scope = Scope(flat)
    writers = [BlockWriter(scope, number) for number in range(len(flat.blocks))]
    live = _liveness(flat, writers)
    return [w.finish(live[number]) for number, w in enumerate(writers)]


def _liveness(flat: Flat, writers: list[BlockWriter]) -> list[set[str]]:
    """For each block the registers that later blocks read."""
    live_in = [set(w.inputs) for w in writers]
    live_out: list[set[str]] = [set() for _ in writers]
    after = [successors(flat, number) for number in range(len(writers))]
    changed = True
    while changed:
        changed = False
        for number in range(len(writers) - 1, -1, -1):
            out = set().union(*(live_in[s] for s in after[number]))
            if out != live_out[number]:
                live_out[number] = out
                live_in[number] = set(writers[number].inputs) | (out - writers[number].written)
                changed = True
    return live_out
