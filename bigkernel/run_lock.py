"""One writer for a run folder.

A run that writes holds a lock on the file ``.lock`` in its folder. The lock (flock) belongs to the
process: when it ends, however it ends, the lock is gone, and a file that a killed process left says
nothing. The file holds who has the lock, for the sentence that refuses the next one.

On a file system without such locks (some network file systems) a run says so and goes on: there
nothing keeps a second writer out. NFS keeps them between machines if its lock service runs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bigkernel import checkpoint
from bigkernel.checkpoint import CheckpointError

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class RunLockedError(CheckpointError):
    """Another process, or another thread of this one, writes to the run folder."""


class _Lock:
    """What this process holds of one folder."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.thread = threading.get_ident()
        self.depth = 1


_held: dict[tuple[int, int], _Lock] = {}  # by device and inode of the lock file
_guard = threading.Lock()


@contextlib.contextmanager
def writing_to(run: str | Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is made if need be. The same thread may nest it.

    Raises:
        RunLockedError: someone else writes there; the message says which process on which host.
        CheckpointError: the folder cannot be written.
    """
    folder = Path(run)
    key = _take(folder)
    try:
        yield
    finally:
        _give_back(folder, key)


def _take(folder: Path) -> tuple[int, int]:
    file = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO).lower()
            raise CheckpointError(f"{folder} cannot be written to: {reason}.") from error
        status = os.fstat(descriptor)
        key = status.st_dev, status.st_ino
        with _guard:
            held = _held.get(key)
            if held is not None:
                os.close(descriptor)
                if held.thread != threading.get_ident():
                    raise RunLockedError(f"another thread of this process writes to {folder}.")
                held.depth += 1
                return key
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = _holder(descriptor)
                os.close(descriptor)
                raise RunLockedError(
                    f"{folder} is being written by {who}. Wait until it has ended, stop it, or "
                    "choose another folder."
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(descriptor)
                    raise
                checkpoint.notify(
                    f"the file system of {folder} has no locks ({os.strerror(error.errno)}); take "
                    "care that no other run writes there at the same time."
                )
            if not _is_still(file, status):
                os.close(descriptor)  # its last holder has just removed it
                continue
            _held[key] = _Lock(descriptor)
            _sign(descriptor)
            return key


def _give_back(folder: Path, key: tuple[int, int]) -> None:
    with _guard:
        held = _held.get(key)
        if held is None:
            return  # a forked child: the lock is its parent's
        held.depth -= 1
        if held.depth:
            return
        del _held[key]
        # Removed while it is still locked, so that nobody can have taken it in between.
        if _is_still(folder / LOCK, os.fstat(held.descriptor)):
            with contextlib.suppress(OSError):
                os.unlink(folder / LOCK)
        os.close(held.descriptor)


def _is_still(file: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(file), status)
    except OSError:
        return False


def _sign(descriptor: int) -> None:
    """Write who holds the lock. A full disk leaves it unsigned, which is no reason to stop."""
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(who) + "\n").encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _forget_in_child() -> None:
    """A forked child must not keep its parent's lock alive when the parent is killed."""
    global _guard
    _guard = threading.Lock()
    for held in _held.values():
        with contextlib.suppress(OSError):
            os.close(held.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
