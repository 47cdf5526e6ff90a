"""What the emulator raises: mistakes in the text, and findings about the program that ran."""

from __future__ import annotations


class PtxError(Exception):
    """Anything that the emulator raises about PTX."""


class UnknownInstruction(PtxError):
    """The text holds an instruction, a modifier or an operand that the emulator does not know."""


class Finding(PtxError):
    """A mistake of the kernel; names the kernel, the thread and the instruction's line."""


class OutOfBounds(Finding):
    """An access outside every registered array, shared memory, local memory or parameters."""


class Misaligned(Finding):
    """An address that is no multiple of the access size."""


class SharedRace(Finding):
    """Two threads touch one place in shared memory, one writes, and no barrier is between them."""


class UninitializedRead(Finding):
    """A read of shared memory that nobody has written."""


class BarrierError(Finding):
    """A barrier, or a warp-wide instruction, that not all of its threads reach."""


class MissingWait(Finding):
    """A read of shared memory whose cp.async has not been waited for."""


class Trap(Finding):
    """The kernel executed ``trap`` or failed an ``assert``."""


class NoProgress(Finding):
    """The launch took more steps than it was allowed."""
