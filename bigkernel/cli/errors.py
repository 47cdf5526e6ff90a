"""From exceptions to one sentence on stderr and an exit code; a traceback only on request."""

import datetime
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
from bigkernel.recipes import ranks
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
    if isinstance(error, RuntimeError) and "gloo/transport/" in text:
        return (
            "another process of the run is gone or does not answer; the launcher says which one "
            "ended first. The last whole checkpoint is intact: continue with --resume auto."
        )
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


def one_process(command: str, but_torchrun: bool = False) -> None:
    """End the command if a launcher has started it in several processes; the first says so.

    Args:
        command: its name.
        but_torchrun: whether it can be run by processes that torchrun has started.
    """
    for size, rank in _RANKS.items():
        if but_torchrun and size == "WORLD_SIZE" and "MASTER_ADDR" in os.environ:
            return
        count = os.environ.get(size, "1")
        if count.isdecimal() and int(count) > 1:
            if os.environ.get(rank, "0") not in ("", "0"):
                raise typer.Exit(USAGE)
            raise UsageError(
                f"`bigkernel {command}` runs in one process, and a launcher such as torchrun has "
                f"started it in {count} ({size}={count}). Start it without the launcher: "
                "`bigkernel train` alone can be started by torchrun."
            )


def _leave_to_the_first(code: int) -> None:
    """Leave without a word if another process of this launch has ended with an error before.

    What this one met is then only that the other one is gone. The launcher's store is asked, which
    outlives the processes; without one, each speaks for itself.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "0")
    if ranks.count() == 1 or host is None:
        return
    import torch

    mine = f"{os.environ.get('RANK')} {code}"
    key = f"bigkernel/ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            host, int(port), is_master=False, timeout=datetime.timedelta(seconds=5)
        )
        first = store.compare_set(key, "", mine).decode()
    except (RuntimeError, ValueError):
        return
    if first != mine:
        raise typer.Exit(int(first.split()[1]))


def fail(error: BaseException, code: int) -> NoReturn:
    """Print ``error`` as a sentence on stderr and leave with ``code``."""
    _leave_to_the_first(code)
    if os.environ.get(TRACEBACK) == "1":
        raise error
    sys.stdout.flush()
    who = "" if ranks.is_first() else f"process {os.environ['RANK']}: "
    print(f"Error: {who}{printable(sentence(error))}", file=sys.stderr, flush=True)
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
            _leave_to_the_first(128 + number)
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
