"""Reading files of the user's that may be anything: pipes, devices, bombs."""

from __future__ import annotations

import stat
import zlib
from pathlib import Path

from bigkernel.data.errors import DataError

# Text shrinks to a fifth or so; what grows beyond this was made to fill the memory.
MOST_GROWTH = 200


def is_regular(path: Path) -> bool:
    """Whether ``path`` is a file with content of its own: no folder, pipe, socket or device.

    Raises:
        OSError: it is not there, or may not be looked at.
    """
    return stat.S_ISREG(path.stat().st_mode)


def unpacked(raw: bytes, file: Path) -> bytes:
    """The content of a .gz file, of one or several members.

    Raises:
        DataError: it is damaged, or ``MOST_GROWTH`` times as large as the file and more.
    """
    limit = MOST_GROWTH * len(raw) + (1 << 20)
    parts: list[bytes] = []
    size, rest = 0, raw
    while rest:
        reader = zlib.decompressobj(wbits=31)  # gzip, with its checksum
        try:
            part = reader.decompress(rest, limit - size + 1)
        except zlib.error as error:
            reason = str(error).rsplit(": ", 1)[-1]
            raise DataError(f"{file} is no whole .gz file: {reason}.") from error
        size += len(part)
        if size > limit:
            raise DataError(
                f"{file} grows to more than {MOST_GROWTH} times its size of {len(raw):,} bytes; "
                "if that is meant, unpack it with `gunzip` and name what comes out."
            )
        if not reader.eof:
            raise DataError(f"{file} is no whole .gz file: its end is missing.")
        parts.append(part)
        rest = reader.unused_data.lstrip(b"\0")  # padding, as of tapes
    return b"".join(parts)
