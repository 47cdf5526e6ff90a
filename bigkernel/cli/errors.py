"""From exceptions to one sentence on stderr and an exit code; a traceback only on request."""

import errno
import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from bigkernel import _command
from bigkernel.checkpoint import TrainingInterrupted
from bigkernel.escape import printable
from bigkernel.extras import MissingExtraError, needs
from bigkernel.interrupts import Stopped, drop_closed_streams
from bigkernel.recipes.errors import Failure, UsageError, speaking_of_options

OK, FAILURE, USAGE = 0, 1, 2
TRACEBACK = "BIGKERNEL_TRACEBACK"


def sentence(error: BaseException) -> str:
    """What a person needs to read of ``error``, on one line."""
    import torch

    if isinstance(error, (UsageError, Failure)):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" for {error.filename}" if error.filename else ""
        return (
            f"the disk is full: no space left{where}. Free some and continue with --resume auto; "
            "the last whole checkpoint is intact."
        )
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}."
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory. Try a smaller --batch-size or --max-length, or a smaller --model."
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, RuntimeError, OSError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text}"


# What launchers set, and accelerate would act on: torchrun and its like, and MPI's.
_RANKS = {
    "WORLD_SIZE": "RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}


def one_process(command: str) -> None:
    """End the command if a launcher has started it in several processes; the first says so."""
    for size, rank in _RANKS.items():
        count = os.environ.get(size, "1")
        if count.isdecimal() and int(count) > 1:
            if os.environ.get(rank, "0") not in ("", "0"):
                raise typer.Exit(USAGE)
            raise UsageError(
                f"`bigkernel {command}` runs in one process, and a launcher such as torchrun has "
                f"started it in {count} ({size}={count}). Start it without the launcher, or train "
                "with bigkernel.Trainer in a script of your own."
            )


def fail(error: BaseException, code: int) -> NoReturn:
    """Print ``error`` as a sentence on stderr and leave with ``code``."""
    if os.environ.get(TRACEBACK) == "1":
        raise error
    sys.stdout.flush()
    print(f"Error: {printable(sentence(error))}", file=sys.stderr)
    known = (UsageError, Failure, MissingExtraError, ValueError, RuntimeError, OSError)
    expected = isinstance(error, known)
    if not expected:
        print(f"({TRACEBACK}=1 shows where it came from.)", file=sys.stderr)
    raise typer.Exit(code)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Run a command so that whatever it raises ends as a sentence and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        _command.ready()
        usual = warnings.formatwarning
        warnings.formatwarning = _sentence_of_warning
        try:
            with speaking_of_options(), needs("cli", "this command"):
                command(*args, **kwargs)
        except TrainingInterrupted as error:  # it has said what it saved
            raise typer.Exit(128 + error.signal) from None
        except (KeyboardInterrupt, Stopped) as error:
            number = error.signal if isinstance(error, Stopped) else signal.SIGINT
            drop_closed_streams()
            print(f"\n{_command.sentence(number)}", file=sys.stderr)
            raise typer.Exit(128 + number) from None
        except (typer.Exit, SystemExit):
            raise
        except UsageError as error:
            fail(error, USAGE)
        except BrokenPipeError:
            # The reader of a pipe has left, as in `bigkernel env | head -1`: nothing to report.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILURE) from None
        except Exception as error:
            fail(error, FAILURE)
        finally:
            warnings.formatwarning = usual

    return run


def _sentence_of_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Without the line of source that warned, which says nothing to who typed a command."""
    return f"Warning: {printable(' '.join(str(message).split()))}\n"
