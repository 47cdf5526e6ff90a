"""Deliberately broken kernels, and what the emulator must say about each."""

from pathlib import Path

import numpy as np
import pytest

from bigkernel.testing import ptx

SOURCE = Path(__file__).parent / "findings.cu"


@pytest.fixture(scope="module")
def module():
    return ptx.compile(SOURCE, arch="sm_80")


CASES = [
    # kernel, threads, arguments, dynamic shared memory, finding, words, thread
    ("past_end", 64, "x y 63", 0, ptx.OutOfBounds, "'x'.*", 63),
    ("before_start", 64, "x y", 0, ptx.OutOfBounds, "4 bytes before|no registered", 0),
    ("wild_pointer", 32, "y", 0, ptx.OutOfBounds, "no registered array", 0),
    ("past_shared", 64, "y", 256, ptx.OutOfBounds, "shared address 256, of 256 bytes", 63),
    ("misaligned_global", 8, "x y", 0, ptx.Misaligned, "16-byte access", 1),
    ("misaligned_shared", 8, "y", 256, ptx.Misaligned, "16-byte access at shared address 4", 1),
    ("race_read_after_write", 64, "y", 0, ptx.SharedRace, r"reads what thread \(63,0,0\) wrote", 0),
    ("race_write_after_read", 64, "y", 0, ptx.SharedRace, r"writes what thread \(63,0,0\) read", 0),
    ("race_write_write", 64, "y", 0, ptx.SharedRace, "writes another value", None),
    ("race_within_warp", 32, "y", 0, ptx.SharedRace, "reads what thread", 0),
    ("race_behind_named_barrier", 128, "y", 0, ptx.SharedRace, "reads what thread", None),
    ("never_written", 64, "y", 0, ptx.UninitializedRead, "shared address 252", 63),
    ("barrier_in_branch", 64, "y", 0, ptx.BarrierError, r"40 of 64.*\(40,0,0\) has returned", 0),
    ("barrier_after_return", 64, "y 50", 0, ptx.BarrierError, "50 of 64 threads", 0),
    ("barrier_in_two_places", 64, "y", 0, ptx.BarrierError, "in two places", None),
    ("shuffle_in_branch", 32, "y", 0, ptx.BarrierError, "0xffff0000", 0),
    ("missing_wait", 64, "x y", 0, ptx.MissingWait, r"cp.async of thread \(63,0,0\)", 0),
    ("wait_for_too_few", 64, "x y", 0, ptx.MissingWait, "not waited for", 0),
    ("wait_without_barrier", 64, "x y", 0, ptx.SharedRace, "no barrier between", 0),
    ("refill_too_early", 64, "x y", 0, ptx.SharedRace, "read, shared address", 0),
    ("copy_past_end", 64, "x y", 0, ptx.OutOfBounds, "'x'", 63),
    ("gives_up", 32, "ones", 0, ptx.Trap, "trap", 0),
    ("endless", 32, "y", 0, ptx.NoProgress, "max_steps", 0),
]


@pytest.mark.parametrize(("name", "threads", "args", "shared", "finding", "words", "thread"),
                         CASES, ids=[c[0] for c in CASES])  # fmt: skip
def test_finding(module, name, threads, args, shared, finding, words, thread):
    memory = ptx.Memory()
    length = {"past_end": 63, "copy_past_end": 256}.get(name, 1024)
    arrays = {
        "x": np.arange(length, dtype=np.float32),
        "y": np.zeros(1024, np.float32),
        "ones": np.ones(1024, np.float32),
    }
    given = [memory.register(arrays[a], a) if a in arrays else int(a) for a in args.split()]
    with pytest.raises(finding, match=words) as caught:
        module[name].launch((1,), (threads,), given, memory, shared=shared, max_steps=1000)
    message = str(caught.value)
    assert message.startswith(f"kernel {name}, block (0,0,0), thread (")
    assert "PTX line" in message
    assert "findings.cu:" in message
    if thread is not None:
        assert f"thread ({thread},0,0), PTX line" in message


def test_launch_arguments_are_checked(module):
    memory = ptx.Memory()
    y = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="past_end takes 3 arguments, got 1"):
        module["past_end"].launch((1,), (32,), [1], memory)
    with pytest.raises(TypeError, match=r"argument 0 must be a number.*memory\.register"):
        module["gives_up"].launch((1,), (32,), [y], memory)
    with pytest.raises(ValueError, match="argument 2 must have 4 bytes, got 8"):
        module["past_end"].launch((1,), (32,), [1, 1, np.int64(1)], memory)
    with pytest.raises(ValueError, match="1024 threads, got 2048"):
        module["gives_up"].launch((1,), (2048,), [1], memory)
    with pytest.raises(ValueError, match="grid must be one to three positive numbers"):
        module["gives_up"].launch((0,), (32,), [1], memory)
    with pytest.raises(KeyError, match="kernel 'absent' is not there; kernels: past_end"):
        module["absent"]


def test_nvcc_error_is_shown():
    with pytest.raises(RuntimeError, match=r"(?s)could not compile.*undefined_name"):
        ptx.compile("__global__ void k() { undefined_name(); }\n")


def test_readonly_array(module):
    memory = ptx.Memory()
    y = memory.register(np.zeros(64, np.float32), "weights", readonly=True)
    with pytest.raises(ptx.OutOfBounds, match=r"writes 'weights' \(float32 \[64\]\), which is"):
        module["barrier_after_return"].launch((1,), (32,), [y, 32], memory)
