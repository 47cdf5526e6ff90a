"""Signals that ask a program to end: Ctrl-C, and what clusters and closing terminals send.

A run can only stop where its state is whole, so a signal is noted when it comes (`StopRequest`) and
answered at the end of a step. The exit status of a program that a signal stopped is 128 + its
number, whether it could save or not.

Only the standard library is needed here: the command line uses this while torch still loads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Closing terminals and launchers send a signal twice in a moment; that is one request. Ctrl-C is
# typed by a person, who means each.
SAME_REQUEST_SECONDS = 1.0


class Stopped(SystemExit):
    """A signal stopped the program at once. The exit status is 128 + the signal's number.

    Attributes:
        signal: which one.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """A handler that ends the program where it is: KeyboardInterrupt for Ctrl-C, else Stopped."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number)


class StopRequest:
    """While its block runs, the first stopping signal is noted instead of ending the program.

    ``received`` is that signal, or None; whoever runs the block looks at it wherever it can stop. A
    second signal ends the program at once. Handlers that someone else has set stay, as do ignored
    signals (``nohup``). Outside the main thread nothing is noted: Python allows no handlers there.

    Args:
        tell: called with the signal when it is noted.
    """

    def __init__(self, tell: Callable[[signal.Signals], None]) -> None:
        self.received: signal.Signals | None = None
        self._tell = tell
        self._process = os.getpid()
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._shields: set[_Shield] = set()

    @property
    def signals(self) -> tuple[signal.Signals, ...]:
        """The signals that are noted."""
        return tuple(self._before)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if _is_unanswered(number):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) == self._note:  # else replaced meanwhile: not ours any more
                signal.signal(number, before)
        self._before = {}
        for shield in self._shields:
            shield.held.value = 0
        self._shields = set()

    def hold(self, shield: _Shield) -> None:
        """Have the workers behind a shield live on until the end of the block."""
        shield.held.value = 1
        self._shields.add(shield)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            _answer_in_child(number)
            return
        drop_closed_streams()
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = signal.Signals(number), now
            # A sentence that cannot be told, on a stream in use or closed, must not end the run.
            with contextlib.suppress(Exception):
                self._tell(self.received)
        elif number == signal.SIGINT or now - self._since >= SAME_REQUEST_SECONDS:
            stop_at_once(number, frame)


def _answer_in_child(number: int) -> None:
    """A forked child has inherited the handler: it does what it would have done without."""
    if number == signal.SIGINT:
        return  # the terminal sent it to the whole group, and the parent decides
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _is_unanswered(number: signal.Signals) -> bool:
    """Whether the signal would end the program: no handler, or one that stops at once."""
    handler = signal.getsignal(number)
    if handler is stop_at_once or handler is signal.default_int_handler:
        return True
    if handler != signal.SIG_DFL or number == signal.SIGINT:
        return False
    # Only SIGUSR1 is given to native code by users (faulthandler.register). Handlers of the others
    # come with a library (LLVM, which Triton brings) and would end the run without saving it.
    return number != signal.SIGUSR1 or not _is_caught_natively(number)


def _is_caught_natively(number: int) -> bool:
    """Whether native code answers the signal, of which `signal.getsignal` does not know.

    ``faulthandler.register(SIGUSR1)`` is such a handler.
    """
    try:
        with open("/proc/self/status") as status:
            caught = next(line for line in status if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def drop_closed_streams() -> None:
    """Send stdout and stderr to nowhere if their terminal is gone or nobody reads the pipe.

    The next print would raise in the middle of a step that is to be finished and saved.
    """
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            poll = select.poll()
            poll.register(descriptor, 0)  # errors and hang-ups are reported anyway
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def shield_workers(loader: Any, request: StopRequest) -> None:
    """Let the worker processes of a DataLoader live on when a signal goes to the whole group.

    Schedulers and terminals signal every process of a job. The step that is being finished needs
    its workers; they end with the process that they work for. After the request a signal ends them
    too: where they have outlived it, the interpreter ends them by one SIGTERM and waits.
    """
    loader = getattr(loader, "base_dataloader", loader)  # accelerate's, which starts the workers
    if getattr(loader, "num_workers", 0) == 0 or not request.signals:
        return
    if not isinstance(loader.worker_init_fn, _Shield):
        loader.worker_init_fn = _Shield(loader.worker_init_fn, request.signals)
    request.hold(loader.worker_init_fn)


class _Shield:
    """A ``worker_init_fn`` that answers signals before it does what another one does."""

    def __init__(self, then: Callable[[int], None] | None, signals: tuple[int, ...]) -> None:
        self.then = then
        self.signals = signals
        self.held = multiprocessing.RawValue("b")  # one for all processes
        self._first: float | None = None

    def __call__(self, worker: int) -> None:
        for number in self.signals:
            # Not ignored: that would be passed on to programs that the worker starts.
            signal.signal(number, self._pass)
        if self.then is not None:
            self.then(worker)

    def _pass(self, number: int, frame: FrameType | None) -> None:
        """Do nothing; but a second SIGTERM is the parent's, which waits for a stuck worker."""
        if number == signal.SIGINT:
            return  # the terminal sent it to the whole group, and the parent decides
        if not self.held.value:
            os._exit(0)  # as without a shield: another status is an error to the loader
        if number != signal.SIGTERM:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first >= SAME_REQUEST_SECONDS:
            os._exit(128 + number)
