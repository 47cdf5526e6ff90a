"""Signals that ask a program to end: noted once, in the main thread, where nobody else answers.

Feature list: the four signals; a second one; handlers of users in Python and in native code;
ignored signals; threads; forked children and data-loading workers, also at the end; streams that
nobody reads.
"""

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from bigkernel import interrupts
from bigkernel.interrupts import (
    STOPPING,
    Stopped,
    StopRequest,
    drop_closed_streams,
    shield_workers,
)

NAMES = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"]


@pytest.fixture(autouse=True)
def handlers():
    """The handlers that were there stay; the tests begin with those of a fresh process."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        is_ctrl_c = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)
    usual = {number: signal.getsignal(number) for number in STOPPING}
    yield usual
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING, ids=NAMES)
def test_the_first_is_noted_and_the_second_stops(number, handlers, monkeypatch):
    ctrl_c = number == signal.SIGINT  # each is meant, however soon it comes
    monkeypatch.setattr(interrupts, "SAME_REQUEST_SECONDS", 60 if ctrl_c else 0.05)
    told, before_last = [], []

    def twice():
        with StopRequest(told.append) as request:
            assert request.received is None
            signal.raise_signal(number)
            assert request.received == number
            if number != signal.SIGINT:
                signal.raise_signal(number)  # in the same moment: the same request
            time.sleep(0.1)
            assert told == [number]
            before_last.append(number)
            signal.raise_signal(number)
            raise AssertionError("the second signal did not stop it")

    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Stopped) as caught:
        twice()
    assert before_last == [number]
    if number != signal.SIGINT:
        assert caught.value.code == 128 + number
    assert {n: signal.getsignal(n) for n in STOPPING} == handlers


def test_what_is_told_may_fail():
    def tell(number):
        raise OSError("the terminal is gone")

    with StopRequest(tell) as request:
        signal.raise_signal(signal.SIGTERM)
        assert request.received == signal.SIGTERM


def test_handlers_of_others_stay():
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with StopRequest(lambda number: None) as request:
        assert request.signals == (signal.SIGINT, signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert request.received is None
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one that comes meanwhile stays too
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


def test_native_handlers_stay(tmp_path):
    with open(tmp_path / "trace", "w+") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        try:
            with StopRequest(lambda number: None) as request:
                signal.raise_signal(signal.SIGUSR1)
            assert request.received is None
            file.seek(0)
            assert "test_native_handlers_stay" in file.read()
        finally:
            faulthandler.unregister(signal.SIGUSR1)


def test_another_thread_notes_nothing(handlers):
    requests = []

    def work():
        with StopRequest(lambda number: None) as request:
            requests.append((request, {n: signal.getsignal(n) for n in STOPPING}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert requests[0][0].signals == ()
    assert requests[0][1] == handlers


@pytest.mark.parametrize("number", STOPPING[1:], ids=NAMES[1:])
def test_a_forked_child_does_what_it_would_do(number):
    with StopRequest(lambda number: None) as request:
        pid = os.fork()
        if pid == 0:
            signal.raise_signal(signal.SIGINT)  # of the terminal, for the parent to answer
            signal.raise_signal(number)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number
        assert request.received is None


class Slow(torch.utils.data.Dataset):
    """Each item takes a while and says who made it."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        time.sleep(0.3)
        return torch.tensor([index, os.getpid()])


def started(worker):
    assert torch.utils.data.get_worker_info().id == worker


@pytest.mark.parametrize(
    ("number", "prepared"), [*((n, False) for n in STOPPING), (signal.SIGTERM, True)]
)
def test_data_loading_workers_work_on(number, prepared):
    """As when a scheduler signals every process of the job; also those of accelerate's loader."""
    loader = DataLoader(Slow(), batch_size=1, num_workers=1, worker_init_fn=started)
    if prepared:
        loader = prepare_data_loader(loader, put_on_device=False)
    with StopRequest(lambda number: None) as request:
        shield_workers(loader, request)
        shield_workers(loader, request)  # once is enough
        rows = []
        for row in loader:
            rows.append(row[0].tolist())
            if len(rows) == 2:
                os.kill(rows[0][1], number)
    assert [index for index, _ in rows] == list(range(6))
    assert len({pid for _, pid in rows}) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(rows[0][1], 0)  # ended with its loader


OUTLIVES = """
import signal, sys, time
from torch.utils.data import DataLoader
from bigkernel.interrupts import StopRequest, shield_workers

loader = DataLoader(range(20), num_workers=1, persistent_workers=True)
with StopRequest(lambda number: None) as request:
    shield_workers(loader, request)
    batches = iter(loader)
    next(batches)
if sys.argv[1:]:
    raise RuntimeError("an error")
"""


@pytest.mark.parametrize("error", [(), ("error",)], ids=["end", "error"])
def test_workers_that_outlive_the_request_end_with_the_program(error):
    """The interpreter ends them by one SIGTERM, and waits until they are gone."""
    done = subprocess.run(
        [sys.executable, "-c", OUTLIVES, *error], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == len(error)
    said = done.stderr.splitlines()
    assert said[-1:] == ["RuntimeError: an error"] * len(error), done.stderr
    assert done.stderr.count("Traceback") == len(error)


def test_streams_that_nobody_reads_are_dropped():
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            read, write = os.pipe()
            os.dup2(write, 1)
            drop_closed_streams()
            open_stays = os.fstat(1).st_ino == os.fstat(write).st_ino
            os.close(read)
            drop_closed_streams()
            os.write(1, b"to nobody")  # would raise BrokenPipeError
            code = 0 if open_stays else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_librarys_native_handler_does_not_keep_a_run_from_saving() -> None:
    """LLVM, which Triton brings, catches SIGTERM natively, where Python still says SIG_DFL."""
    code = (
        "import ctypes, signal\n"
        "from bigkernel.interrupts import StopRequest\n"
        "handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: None)\n"
        "libc = ctypes.CDLL(None)\n"
        "for number in (signal.SIGTERM, signal.SIGHUP):\n"
        "    libc.signal(int(number), handler)\n"
        "    with StopRequest(lambda number: None) as request:\n"
        "        signal.raise_signal(number)\n"
        "    assert request.received == number, request.received\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
