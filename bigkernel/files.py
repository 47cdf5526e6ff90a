"""Files of the user's, which may be anything: pipes, devices, images that fill the memory."""

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
