"""While the ``bigkernel`` command still loads torch: a line that says so, and an answer to Ctrl-C.

Imported before everything else; does nothing in any other program.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

INTERRUPTED = 130


def _is_command() -> bool:
    if "-m" in sys.orig_argv:
        return sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["bigkernel"]
    return Path(sys.argv[0]).name == "bigkernel" if sys.argv else False


def _leave(*_: Any) -> None:
    # Written past sys.stderr, whose lock the interrupted code may hold.
    os.write(2, b"\nInterrupted.\n")
    os._exit(INTERRUPTED)


def ready() -> None:
    """From here on the command itself answers Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Those that take a while, and need torch for it.
_SLOW = ("train", "generate", "evaluate", "bench")

if _is_command() and any(word in sys.argv for word in _SLOW) and "--help" not in sys.argv:
    print("loading PyTorch ...", file=sys.stderr, flush=True)

if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
