"""Files of the user's, which may be anything: pipes, devices, images that fill the memory."""

import os
import stat
from pathlib import Path

# Pixels of an image, and more than any usual camera takes; four such images, in RGB and twice,
# are 1.5 GiB.
MAX_PIXELS = 64_000_000


def is_regular(path: Path) -> bool:
    """Whether ``path`` is a file with content of its own: no folder, pipe, socket or device.

    Raises:
        OSError: it is not there, or may not be looked at.
    """
    return stat.S_ISREG(path.stat().st_mode)


def follow_umask(folder: Path) -> None:
    """Give every file below ``folder`` the mode of a new file: some writers keep theirs private."""
    probe = folder / ".mode"
    # Tried, not asked for: the umask can only be read by setting it, for all threads.
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)
