"""A recipe in several processes: which of them writes and speaks, and what one tells the others.

A launcher such as torchrun has started them, and says in RANK and WORLD_SIZE which is which. The
first one chooses the run folder, writes what the Trainer does not, and says how the run goes on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bigkernel.recipes import run_folder
from bigkernel.recipes.errors import UsageError, option


def count() -> int:
    """How many processes work on the run."""
    size = os.environ.get("WORLD_SIZE", "1")
    return max(1, int(size)) if size.isdecimal() else 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def join(device: torch.device) -> None:
    """Wait until all processes are here; from now on they can tell each other something."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu")


def told(value: Any) -> Any:
    """What the first process gives here, on all."""
    if count() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def taken(kind: str, out: Path | None, allowed: Callable[[Path], None]) -> Iterator[Path]:
    """As :func:`run_folder.taken`, by the first process for all."""
    if is_first():
        with run_folder.taken(kind, out, allowed) as run:
            told(run)
            yield run
    else:
        yield told(None)


def share(batch_size: int, accumulate: int) -> tuple[int, int]:
    """(batch size, batches that make a step) of one process, for a step of all as if there was one.

    Raises:
        UsageError: the items of a step cannot be dealt out evenly.
    """
    here = count()
    if batch_size % here == 0:
        return batch_size // here, accumulate
    if accumulate % here == 0:
        return batch_size, accumulate // here
    raise UsageError(
        f"{option('batch_size', batch_size)} cannot be dealt out to {here} processes evenly, which "
        f"together take a step of the run: use a multiple of {here}, or another number of "
        "processes."
    )
