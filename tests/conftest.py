"""Fixtures shared by all tests."""

import os
import signal
from pathlib import Path

import pytest
import torch

import bigkernel

collect_ignore = ["templates"]  # files of other trees


def pytest_configure(config: pytest.Config) -> None:
    kept = Path(__file__).resolve().parents[1] / "build" / "ptx"
    os.environ.setdefault("BIGKERNEL_PTX_CACHE", str(kept))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // workers)))
    # A shell starts background jobs with Ctrl-C ignored, and children would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("BIGKERNEL_EXPECT_SANITIZER") == "1":
        native = bigkernel._library.native
        if native is None or not native.build_info()["sanitizer"]:
            raise pytest.UsageError(f"the module under test is not the sanitized one: {native}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # One process runs what a file has emulated: each parses and translates the kernels, which
        # nvcc compiled for all.
        if "ptx" in item.nodeid or "kernel" in item.path.name or "cuda_report" in item.path.name:
            item.add_marker(pytest.mark.xdist_group(f"emulator {item.path.stem}"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=bigkernel.cpu_isas() or ["none"])
def cpu_isa(request: pytest.FixtureRequest):
    """Runs the test under every instruction set that this machine has."""
    if request.param == "none":
        pytest.skip("the native module is not built")
    with bigkernel.use_cpu_isa(request.param):
        yield request.param
