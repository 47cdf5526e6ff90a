"""The ``bigkernel`` command: train, generate, evaluate, bench, tune-kernels, env."""

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from bigkernel.extras import MissingExtraError, needs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 failure, 2 usage, 128 + a signal."""
    try:
        with needs("cli", "the command line of bigkernel"):
            from bigkernel.cli.app import app
    except MissingExtraError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A sample in Chinese on a terminal that is not UTF-8 must not end the run that wrote it.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(args=None if argv is None else list(argv), prog_name="bigkernel")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    else:
        code = 0
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available():
        _leave_others(torch.distributed, code)
    return code


def _leave_others(distributed: Any, code: int) -> None:
    """End a process of several at once.

    Not by the end of the interpreter, which aborts where one of gloo's threads still wants it.
    """
    if distributed.is_initialized():
        if code == 0:
            distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


__all__ = ["main"]
