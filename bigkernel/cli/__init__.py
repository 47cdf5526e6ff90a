"""The ``bigkernel`` command: train, generate, evaluate, bench, tune-kernels, doctor, env."""

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
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def command() -> int:
    """What the program ``bigkernel`` is: `main`, and the end of the process where it is of several.

    Not by the end of the interpreter, which aborts where one of gloo's threads still wants it.
    """
    code = main()
    torch: Any = sys.modules.get("torch")
    distributed = torch is not None and torch.distributed.is_available()
    if distributed and torch.distributed.is_initialized():
        if code == 0:
            torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


__all__ = ["command", "main"]
