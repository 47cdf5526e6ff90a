"""Fixtures shared by all tests."""

import os
import signal
from pathlib import Path

import pytest
import torch

import bigkernel
from bigkernel import tuning

collect_ignore = ["templates"]  # files of other trees
SANITIZED = os.environ.get("BIGKERNEL_EXPECT_SANITIZER") == "1"


def pytest_configure(config: pytest.Config) -> None:
    kept = Path(__file__).resolve().parents[1] / "build" / "ptx"
    os.environ.setdefault("BIGKERNEL_PTX_CACHE", str(kept))
    if held := os.environ.get("ATEN_CPU_CAPABILITY"):
        # Inductor finds code by its graph alone and compiles it for vectors of today's length: code
        # made for others writes past its tensors.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept.parent / "inductor" / held))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // workers)))
    # A shell starts background jobs with Ctrl-C ignored, and children would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if SANITIZED:
        native = bigkernel._library.native
        if native is None or not native.build_info().sanitizer:
            raise pytest.UsageError(f"the module under test is not the sanitized one: {native}")


def _runs_what_another_does(item: pytest.Item) -> bool:
    """Whether the test calls the very functions that another one calls, or none of ours."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if SANITIZED and given.get("backend") == "torch":
        return True  # PyTorch's own code, which is not instrumented
    isas = {value.removeprefix("cpu-") for value in given.values() if isinstance(value, str)}
    if SANITIZED and "avx512" in isas:
        return True  # AVX-512-BF16's functions, in that build
    # AMX is for attention's bf16 products; everything else calls AVX-512's functions there
    # (test_amx_is_avx512_where_it_has_no_products).
    if "amx" not in isas:
        return False
    return "attention" not in item.path.name or given.get("dtype") in ("f32", "f16")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    twice = [item for item in items if _runs_what_another_does(item)]
    if twice:
        config.hook.pytest_deselected(items=twice)
        items[:] = [item for item in items if not _runs_what_another_does(item)]
    for item in items:
        # One process runs what a file has emulated: each parses and translates the kernels, which
        # nvcc compiled for all.
        if "ptx" in item.nodeid or "kernel" in item.path.name or "cuda_report" in item.path.name:
            item.add_marker(pytest.mark.xdist_group(f"emulator {item.path.stem}"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Stop where groups are spread over all processes: pytest-xdist 3.8 cannot tell pytest 9.2."""
    if hasattr(session.config, "workerinput") and session.config.option.loadgroup:
        for item in session.items:
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
                raise pytest.UsageError("groups of tests need pytest before 9.2: make setup")


@pytest.fixture(autouse=True)
def our_kernels():
    """Whatever was measured here: what is tested is ours. `test_tuning.py` tests the choice."""
    with tuning.ignored():
        yield


@pytest.fixture(autouse=True)
def no_ranks_left():
    """A test that leaves its process group behind fails, not the next one that makes its own."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("the test left a process group behind: take the fixture one_rank")


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=bigkernel.cpu_isas() or ["none"])
def cpu_isa(request: pytest.FixtureRequest):
    """Runs the test under every instruction set that this machine has."""
    if request.param == "none":
        pytest.skip("the native library is not built")
    with bigkernel.use_cpu_isa(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    """Of small models more than one only cost time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fallback to PyTorch is an error."""
    monkeypatch.setenv("BIGKERNEL_STRICT", "1")


@pytest.fixture
def every_call(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Models so small that most of their calls would be left to torch call our ops all the same."""
    from bigkernel.integrations import native

    monkeypatch.setattr(native, "SMALLEST", dict.fromkeys(native.SMALLEST, 0))


@pytest.fixture
def with_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies 16 bits: what is replaced in models is the same on each."""
    from bigkernel import precision

    monkeypatch.setattr(precision, "multiplies", lambda device, dtype: True)
