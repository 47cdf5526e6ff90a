"""The folder that a run writes to: which one, whether it may, and what is put there."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from bigkernel.checkpoint import write_file_atomically
from bigkernel.cli.errors import UsageError
from bigkernel.files import follow_umask

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOSS = "loss.png"
CARD = "README.md"
EVALUATION = "evaluation.json"


def free_name(kind: str) -> Path:
    """``runs/text``, or the first of ``runs/text-2``, ``runs/text-3`` ... that is free."""
    first = path = Path("runs") / kind
    number = 2
    while path.exists():
        path = first.with_name(f"{kind}-{number}")
        number += 1
    return path


def is_run(path: Path) -> bool:
    """Whether ``path`` is a folder that a training command has written."""
    return (path / CONFIG).is_file()


def run_of(resume: str, out: Path | None) -> Path:
    """The run folder that ``--resume`` names, directly or by one of its checkpoints."""
    if resume == "auto":
        if out is None:
            raise UsageError("--resume auto needs to know which run: add --out RUN.")
        return out
    path = Path(resume)
    if not path.exists():
        raise UsageError(f"--resume {resume}: there is no such folder. Use auto, or a run folder.")
    for folder in (path, path.resolve().parent):
        if is_run(folder):
            if out is not None and out.resolve() != folder.resolve():
                raise UsageError(
                    f"--resume {resume} belongs to {folder}, but --out says {out}. "
                    "Leave --out away, or start anew from its weights with --init-from."
                )
            return folder
    raise UsageError(
        f"--resume {resume}: neither it nor the folder above it is a run (there is no {CONFIG})."
    )


def check_new(path: Path, force: bool) -> None:
    """UsageError unless a new run may be written to ``path``."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; --out must name a folder.")
    if not path.exists() or not any(path.iterdir()):
        _check_writable(path)
        return
    if not is_run(path):
        raise UsageError(
            f"{path} holds files that are not a run, and is left alone. Choose another --out."
        )
    if not force:
        raise UsageError(
            f"{path} holds a run already. Use --force to replace it, --resume auto to go on with "
            "it, or another --out."
        )


def _check_writable(path: Path) -> None:
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written: {existing} is not a writable folder.")


def clear(path: Path) -> None:
    """Make ``path`` an empty folder. Only for a folder that ``check_new`` has let pass."""
    path.mkdir(parents=True, exist_ok=True)
    old = sorted(path.iterdir(), key=lambda entry: entry.name == CONFIG)
    if not old:
        return
    # Moved aside first, so that a crash leaves little of an old run for a whole one; config.yaml
    # last, without which the folder would not count as a run that may be replaced. The folder
    # itself stays: it may be a link, a mount or where the shell is.
    aside = path / f".replaced-{os.getpid()}"
    aside.mkdir()
    for entry in old:
        entry.rename(aside / entry.name)
    shutil.rmtree(aside)


def write_evaluation(run: Path, figures: Mapping[str, float]) -> None:
    """``evaluation.json``: the figures, as numbers."""
    write_text(run / EVALUATION, json.dumps(dict(figures), indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a whole file or leave the one that was there."""
    write_file_atomically(path, content)


@contextlib.contextmanager
def files_moved_into(run: Path) -> Iterator[Path]:
    """A folder aside; what is written there moves to ``run`` at the end, file by file.

    Without an error only: a full disk leaves what ``run`` held before.
    """
    aside = run / ".writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        follow_umask(aside)
        for file in sorted(aside.iterdir()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, run / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
