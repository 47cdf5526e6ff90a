"""Folders that appear whole or not at all, and checkpoints that are proven whole before use.

A checkpoint is written to a folder beside its final place, a manifest with the size and SHA-256 of
each file is added, every file is synced to the disk, and the folder is renamed. Whatever stops the
machine in between leaves at most a folder with a name that nothing reads, which the next start
removes.
Before a checkpoint is used, its files are compared with its manifest; one without a manifest (from
transformers' own Trainer) has its files checked for their own structure instead. A checkpoint that
somebody has named is also taken when files that can be done without are gone, and when files have
been edited into another whole file, with a sentence that says so.

Nothing here unpickles: weights are safetensors, other files are loaded with ``weights_only=True``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bigkernel.escape import printable
from bigkernel.files import follow_umask

MANIFEST = "manifest.json"
_NUMBERED = re.compile(r"checkpoint-(\d+)")
_ASIDE = ".partial"  # being written
_REPLACED = ".replaced"  # the folder before, for as long as the new one takes its place
_REMOVED = ".removed"  # being deleted
_STATE = "trainer_state.json"
_UNLISTED = f"{MANIFEST} is missing, so only the form of its files could be checked"
# What a resumed run does without a file that is not needed to go on.
_WITHOUT = {
    "optimizer.pt": "the optimizer starts without its moments",
    "scheduler.pt": "the learning rate is worked out from the step",
    "scaler.pt": "the loss scale starts anew",
    "rng_state.pth": "the random numbers are others",
    "stream.pt": "the stream is read from its start",
    "bigkernel_state.json": "the loss since the last log is not known",
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be used; the message says which and why."""


class NoCheckpointError(CheckpointError, ValueError):
    """There is no checkpoint to resume from (a ValueError too, as transformers raises here)."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite.

    Attributes:
        step: the optimizer step (counted from 1) that was being computed.
        last_checkpoint: the newest whole checkpoint, or None.
    """

    def __init__(self, message: str, step: int, last_checkpoint: Path | None) -> None:
        super().__init__(message)
        self.step = step
        self.last_checkpoint = last_checkpoint


class TrainingInterrupted(KeyboardInterrupt, SystemExit):
    """Ctrl-C or another signal stopped the training, after a checkpoint was saved.

    It is a KeyboardInterrupt to whoever catches those. A process that lets it through exits with
    status 128 + the signal's number (130 for Ctrl-C, 143 for SIGTERM) and no traceback, as Python
    does for a SystemExit of that code.

    Attributes:
        step: optimizer steps done.
        checkpoint: the checkpoint that was saved.
        signal: the signal that stopped it.
    """

    def __init__(
        self,
        message: str,
        step: int,
        checkpoint: Path,
        number: signal.Signals = signal.SIGINT,
    ) -> None:
        super().__init__(message)
        self.code: int = 128 + number
        self.step = step
        self.checkpoint = checkpoint
        self.signal = number


def notify(message: str) -> None:
    """Tell the user one sentence; replace this function to put it elsewhere."""
    print(f"bigkernel: {printable(message)}", file=sys.stderr, flush=True)


@contextmanager
def atomic_folder(path: str | Path, manifest: bool = True) -> Iterator[Path]:
    """A new folder to write into, which becomes ``path`` when the block ends without an error.

    The files are listed in ``manifest.json``, synced and put in place by a rename; a folder that
    was at ``path`` is replaced. When the block raises, nothing appears and what was there stays.

    Raises:
        CheckpointError: the disk is full or cannot be written, naming ``path`` and the reason.
    """
    final = Path(path)
    aside, replaced = _beside(final, _ASIDE), _beside(final, _REPLACED)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _settle(final)
        aside.mkdir()
        yield aside
        follow_umask(aside)
        if manifest:
            _write_manifest(aside)
        _sync_tree(aside)
        if final.exists():
            os.rename(final, replaced)
        os.rename(aside, final)
        _sync(final.parent)
    except BaseException as error:
        _settle(final)
        reason = _disk_trouble(error, final.parent)
        if reason is not None:
            raise CheckpointError(f"{final} could not be written: {reason}.") from error
        raise
    with suppress(OSError):
        _remove(replaced)


def write_file_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a machine that stops, sees the old or the new content.

    Raises:
        CheckpointError: the disk is full or cannot be written; the old content is still there.
    """
    final = Path(path)
    aside = _beside(final, _ASIDE)
    data = content.encode() if isinstance(content, str) else content
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, final)
        _sync(final.parent)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        reason = _disk_trouble(error, final.parent)
        if reason is not None:
            raise CheckpointError(f"{final} could not be written: {reason}.") from error
        raise


def clean_up(run: str | Path) -> None:
    """Settle what a writer that was killed left of the checkpoints in a run folder."""
    for left in Path(run).glob(".checkpoint-*"):
        name, suffix = left.stem.removeprefix("."), left.suffix
        if _NUMBERED.fullmatch(name):
            if suffix in (_ASIDE, _REPLACED):
                _settle(left.with_name(name))
            elif suffix == _REMOVED:
                _remove(left)


def _settle(final: Path) -> None:
    """Remove what an interrupted write of ``final`` left, and put back what it was replacing."""
    replaced = _beside(final, _REPLACED)
    if replaced.exists() and not final.exists():
        # Stopped between the two renames: the folder before is still the valid one.
        os.rename(replaced, final)
    for left in (replaced, _beside(final, _ASIDE)):
        _remove(left)


def _remove(path: Path) -> None:
    """Delete a folder, or whatever else has its name: of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def find_checkpoints(run: str | Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, newest (highest step) first."""
    folder = Path(run)
    if not folder.is_dir():
        return []
    numbered = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := _NUMBERED.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def rotate(run: str | Path, limit: int | None, keep: Collection[Path]) -> None:
    """Delete the checkpoints of the lowest steps until ``limit`` are left; None or 0 deletes none.

    By step and not by time, which a clock that was set back or a copy of the folder changes. Those
    in ``keep`` stay, also beyond the limit. One that is being deleted is never taken for whole.
    """
    if not limit or limit < 0:
        return
    kept = {path.resolve() for path in keep}
    found = find_checkpoints(run)
    left = len(found)
    for path in reversed(found):
        if left <= limit:
            return
        if path.resolve() not in kept:
            gone = _beside(path, _REMOVED)
            with suppress(OSError):  # the run goes on, and the next start tries again
                _remove(gone)
                os.rename(path, gone)
                _remove(gone)
            left -= 1


def newest_whole_checkpoint(run: str | Path) -> Path | None:
    """The newest checkpoint of a run that is whole, or None; says which ones it passes over."""
    for path in find_checkpoints(run):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            notify(f"{error} Skipping it.")
        else:
            return path
    return None


def resolve_checkpoint(source: str | Path | bool, run: str | Path) -> Path | None:
    """The checkpoint to resume from.

    Args:
        source: True or ``"auto"``: the newest whole one of ``run``; the path of a checkpoint, or of
            a run. Damaged ones are passed over, with a sentence, for the one before. A checkpoint
            that is named is also taken if it has been edited or lacks what can be done without,
            as is the newest such one of a run that has none as it was saved.
        run: the folder of this run.

    Returns:
        the checkpoint; None if ``source`` is ``"auto"`` and there is no checkpoint yet.

    Raises:
        NoCheckpointError: there is none, or none of them is whole.
    """
    candidates: list[Path]
    named = False
    if isinstance(source, bool) or str(source) == "auto":
        folder = Path(run)
        candidates = find_checkpoints(folder)
    else:
        path = Path(source)
        if not path.is_dir():
            raise NoCheckpointError(f"there is no checkpoint or run folder {path}.")
        number = _NUMBERED.fullmatch(path.resolve().name)
        folder = path.resolve().parent if number else path
        candidates = find_checkpoints(folder)
        if number:
            named = True
            earlier = [other for other in candidates if _step(other) < int(number[1])]
            candidates = [path.resolve(), *earlier]
        elif not candidates:  # a checkpoint under another name
            _tell_changes(path, examine_checkpoint(path))
            return path
    troubles: list[str] = []
    changed: tuple[Path, list[str], int] | None = None
    for path in candidates:
        try:
            changes = examine_checkpoint(path)
        except CheckpointError as error:
            troubles.append(str(error))
            continue
        if changes in ([], [_UNLISTED]) or (named and not troubles):
            for trouble in troubles:
                notify(f"{trouble} Using the one before.")
            _tell_changes(path, changes)
            return path
        troubles.append(f"the checkpoint {path} has been changed: {'; '.join(changes)}.")
        changed = changed or (path, changes, len(troubles) - 1)
    if changed is not None:
        path, changes, before = changed
        for trouble in troubles[:before]:
            notify(f"{trouble} Using the one before.")
        _tell_changes(path, changes)
        return path
    if candidates:
        raise NoCheckpointError(
            f"none of the {len(candidates)} checkpoints in {folder} is whole ({troubles[0]} "
            "That is the newest); start again without resuming, in another folder."
        )
    if str(source) == "auto":
        return None
    raise NoCheckpointError(f"there is no checkpoint in {folder}; train without resuming first.")


def _tell_changes(path: Path, changes: list[str]) -> None:
    if changes:
        notify(f"{path} is no longer as it was saved and is used as it is: {'; '.join(changes)}.")


def _step(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])


def verify_checkpoint(path: str | Path) -> None:
    """Check that a checkpoint is whole, and as it was saved.

    Raises:
        CheckpointError: a file is missing, cut off or changed; the message names it.
    """
    changes = examine_checkpoint(path)
    if changes not in ([], [_UNLISTED]):
        raise CheckpointError(f"the checkpoint {path} is damaged: {changes[0]}.")


def examine_checkpoint(path: str | Path) -> list[str]:
    """What somebody has changed in a checkpoint that can be used.

    Returns:
        a few words for each file that is gone and can be done without, and for each that is another
        whole file than was saved; [] if all is as it was saved.

    Raises:
        CheckpointError: it cannot be used: a file that is needed is missing, or one is cut off, or
            changed in a way that its own format does not vouch for; the message names it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"the checkpoint {folder} does not exist.")
    if not (folder / MANIFEST).exists():
        _verify_structure(folder)
        ours = (folder / "bigkernel_state.json").is_file()
        return [_UNLISTED] if ours else []
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        listed = [(name, entry["size"], entry["sha256"]) for name, entry in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint {folder} is damaged: bad {MANIFEST}.") from error
    changes = []
    for name, size, digest in listed:
        file = folder / name
        if not file.is_file():
            changes.append(_missing(folder, name))
            continue
        actual = file.stat().st_size
        trouble = f"{name} has {actual} bytes, expected {size}"
        if actual == size:
            if _sha256(file) == digest:
                continue
            trouble = f"the content of {name} has changed"
        if not _is_edited(file, actual == size):
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: {trouble}. If you changed it yourself, "
                f"delete {MANIFEST} beside it."
            )
        changes.append(f"{name} has been edited ({trouble})")
    listed_names = {name for name, *_ in listed}
    if any(name not in listed_names for name in _shards(folder)):
        _verify_structure(folder)  # weights that somebody has put there
    return changes


def _missing(folder: Path, name: str) -> str:
    """What a missing file means, or CheckpointError if there is no going on without it."""
    found = f"{name} is missing"
    is_weights = name.endswith((".safetensors", ".bin")) and name != "training_args.bin"
    is_index = name.endswith(".safetensors.index.json")
    if (is_weights or is_index) and "/" not in name:
        if (folder / "model.safetensors").is_file() or _shards(folder):
            return f"{found}, the weights are in other files"
    elif name != _STATE and "/" not in name:
        # Several processes have one each.
        without = _WITHOUT.get(re.sub(r"^(rng_state|stream)_\d+", r"\1", name))
        return f"{found}, so {without}" if without else found
    raise CheckpointError(
        f"the checkpoint {folder} is damaged: {found}, and there is no going on without it."
    )


def _shards(folder: Path) -> set[str]:
    """The files of weights that an index names, all of them there; or none."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        names = {str(name) for name in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return names if all((folder / name).is_file() for name in names) else set()


def _is_edited(file: Path, same_size: bool) -> bool:
    """Whether a changed file is whole by its own format: then somebody has written it anew.

    Weights of the same size are not taken for that: their format has no checksum, and what the disk
    lost looks the same as what a user changed.
    """
    try:
        return _has_own_form(file) and not (same_size and file.suffix == ".safetensors")
    except Exception:  # zip and JSON readers meet damage with many kinds
        return False


def _has_own_form(file: Path) -> bool:
    """Whether the file's format was checked, by its suffix; any Exception if it is not whole."""
    if file.name == _STATE:
        _check_state(file)
    elif file.suffix == ".json":
        json.loads(file.read_text())
    elif file.suffix == ".safetensors":
        _check_safetensors(file)
    elif file.suffix in (".pt", ".pth", ".bin"):
        _check_zip(file)
    else:
        return False
    return True


def _verify_structure(folder: Path) -> None:
    """For checkpoints without a manifest: each file's own format says whether it is all there."""
    state = folder / _STATE
    if not state.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: {state.name} is missing.")
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        try:
            _has_own_form(file)
        except Exception as error:  # zip and JSON readers meet damage with many kinds
            name = file.relative_to(folder)
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: {name} is cut off or changed ({error})."
            ) from error


def _check_state(file: Path) -> None:
    state = json.loads(file.read_text())
    step = state.get("global_step") if isinstance(state, dict) else None
    if type(step) is not int or step < 0:
        raise ValueError("global_step must be a whole number")


def _check_safetensors(file: Path) -> None:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise ValueError("header cut off")
        header = json.loads(stream.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != size:
        raise ValueError(f"{size} bytes, expected {8 + length + max(ends, default=0)}")


def _check_zip(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise ValueError(f"{bad} has a wrong checksum")


def folder_aside(path: str | Path) -> Path:
    """Where ``atomic_folder(path)`` has its files written meanwhile."""
    return _beside(Path(path), _ASIDE)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _write_manifest(folder: Path) -> None:
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# How torch's and safetensors' native writers report a write that failed.
_WRITER_WORDS = ("PytorchStreamWriter", "inline_container.cc", "iostream error", "os error")


def _disk_trouble(error: BaseException, folder: Path) -> str | None:
    """What the disk had to do with the error, or None. Writers wrap it in their own exceptions."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            reason = os.strerror(cause.errno).lower()
            full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            return _with_free_space(reason, folder) if full else reason
        if any(words in str(cause) for words in _WRITER_WORDS):
            return _with_free_space("the disk did not take all of it", folder)
        cause = cause.__cause__ or cause.__context__
    return None


def _with_free_space(reason: str, folder: Path) -> str:
    try:
        status = os.statvfs(folder)
    except OSError:
        left = ""
    else:
        left = f" ({status.f_bavail * status.f_frsize / 1e6:.1f} MB free)"
    return f"{reason}{left}; free some space and resume"
