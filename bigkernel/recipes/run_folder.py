"""The folder that a run writes to: which one, whether it may, and what is put there."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bigkernel.checkpoint import write_file_atomically
from bigkernel.files import follow_umask
from bigkernel.recipes.errors import UsageError, option
from bigkernel.run_lock import LOCK, writing_to

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOSS = "loss.png"
CARD = "README.md"
EVALUATION = "evaluation.json"
_CLEARED = ".replaced-"


@contextlib.contextmanager
def taken(kind: str, out: Path | None, allowed: Callable[[Path], None]) -> Iterator[Path]:
    """The run folder to write to, locked: ``out``, or a new one under ``runs/``.

    A new one is ``runs/text``, or the first of ``runs/text-2``, ``runs/text-3`` ... that is free.
    ``allowed`` is called before anything is touched and again under the lock, since another run may
    have ended there in between. A folder that was made here and stays empty goes again.
    """
    if out is not None:
        allowed(out)
    made: list[Path] = []
    try:
        run = _new_folder(kind, made) if out is None else out
        if out is not None:
            _make(out, made)
        with writing_to(run):
            if out is not None:
                allowed(run)
            yield run
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # it holds a run by now
                folder.rmdir()


def _new_folder(kind: str, made: list[Path]) -> Path:
    parent = Path("runs")
    _make(parent, made)
    number = 1
    while True:
        path = parent / (kind if number == 1 else f"{kind}-{number}")
        try:
            path.mkdir()  # two that start together cannot both make it
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UsageError(_cannot_write(path, parent, error)) from None
        else:
            made.append(path)
            return path


def _make(path: Path, made: list[Path]) -> None:
    """Make a folder and those above it; add to ``made``, outermost first, what was not there."""
    missing: list[Path] = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(_cannot_write(folder, folder.parent, error)) from None
        made.append(folder)


def _cannot_write(path: Path, parent: Path, error: OSError) -> str:
    reason = os.strerror(error.errno or errno.EIO).lower()
    return f"{path} cannot be written: {parent} is not a writable folder ({reason})."


def is_run(path: Path) -> bool:
    """Whether ``path`` is a folder that a training command has written."""
    return (path / CONFIG).is_file()


def run_of(resume: str, out: Path | None) -> Path:
    """The run folder that ``resume`` names, directly or by one of its checkpoints."""
    if resume == "auto":
        if out is None:
            raise UsageError(
                f"{option('resume', 'auto')} needs to know which run: add {option('out', 'RUN')}."
            )
        return out
    path, given = Path(resume), option("resume", resume)
    if not path.exists():
        raise UsageError(f"{given}: there is no such folder. Use auto, or a run folder.")
    for folder in (path, path.resolve().parent):
        if is_run(folder):
            if out is not None and out.resolve() != folder.resolve():
                raise UsageError(
                    f"{given} belongs to {folder}, but {option('out')} says {out}. Leave "
                    f"{option('out')} away, or start anew from its weights with "
                    f"{option('init_from')}."
                )
            return folder
    raise UsageError(
        f"{given}: neither it nor the folder above it is a run (there is no {CONFIG})."
    )


def check_new(path: Path, force: bool) -> None:
    """UsageError unless a new run may be written to ``path``."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; {option('out')} must name a folder.")
    if not path.exists() or not _content(path):
        _check_writable(path)
        return
    if not is_run(path):
        raise UsageError(
            f"{path} holds files that are not a run, and is left alone. "
            f"Choose another {option('out')}."
        )
    if not force:
        raise UsageError(
            f"{path} holds a run already. Use {option('force', True)} to replace it, "
            f"{option('resume', 'auto')} to continue it, or another {option('out')}."
        )


def _check_writable(path: Path) -> None:
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written: {existing} is not a writable folder.")


def clear(path: Path) -> None:
    """Make ``path`` an empty folder. Only for a folder that ``taken`` holds."""
    for left in path.glob(f"{_CLEARED}*"):  # of a process that was killed here
        shutil.rmtree(left)
    content = _content(path)
    if not content:
        return
    # Renamed first, so that a crash in between leaves each of the old files whole or gone. What
    # makes it a run goes last: until then ``force`` takes it again.
    aside = path / f"{_CLEARED}{os.getpid()}"
    aside.mkdir(exist_ok=True)
    for file in sorted(content, key=lambda file: file.name == CONFIG):
        file.rename(aside / file.name)
    shutil.rmtree(aside)


def _content(path: Path) -> list[Path]:
    """What a folder holds, but for what a writer leaves that is stopped on the way."""
    return [
        file for file in path.iterdir() if file.name != LOCK and not file.name.startswith(_CLEARED)
    ]


def write_evaluation(run: Path, figures: Mapping[str, float]) -> None:
    """``evaluation.json``: the figures, as numbers."""
    with writing_to(run):
        write_text(run / EVALUATION, json.dumps(dict(figures), indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a whole file or leave the one that was there."""
    write_file_atomically(path, content)


@contextlib.contextmanager
def files_moved_into(run: Path) -> Iterator[Path]:
    """A folder aside; what is written there moves to ``run`` at the end, file by file.

    Without an error only: a full disk leaves what ``run`` held before.
    """
    with writing_to(run):
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
