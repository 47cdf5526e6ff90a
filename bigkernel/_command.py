"""What the ``bigkernel`` command says while it still loads torch.

A line that it does so, and where a signal comes an exit code, no traceback. Imported before
everything else; does nothing in any other program.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from bigkernel.interrupts import STOPPING, stop_at_once


def _is_command() -> bool:
    if "-m" in sys.orig_argv:
        return sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["bigkernel"]
    return Path(sys.argv[0]).name == "bigkernel" if sys.argv else False


def _leave(number: int, *_: Any) -> None:
    # Written past sys.stderr, whose lock the interrupted code may hold.
    try:
        os.write(2, f"\n{sentence(number)}\n".encode())
    finally:
        os._exit(128 + number)


def sentence(number: int) -> str:
    """What is said where a signal stops the command at once."""
    if number == signal.SIGINT:
        return "Interrupted."
    return f"Stopped by {signal.Signals(number).name}."


def ready() -> None:
    """From here on the command itself answers these signals."""
    for number in STOPPING:
        if signal.getsignal(number) is _leave:
            is_ctrl_c = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_ctrl_c else stop_at_once)


# Those that take a while, and need torch for it.
_SLOW = ("train", "generate", "evaluate", "bench", "tune-kernels", "doctor")

if _is_command():
    first = os.environ.get("RANK", "0") == "0"  # of several processes
    if first and any(word in sys.argv for word in _SLOW) and "--help" not in sys.argv:
        print("loading PyTorch ...", file=sys.stderr, flush=True)
    for _number in STOPPING:
        if signal.getsignal(_number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(_number, _leave)
