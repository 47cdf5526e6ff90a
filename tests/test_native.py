"""Whether the native library fits this torch, driver and GPUs, and what is said where not."""

import ctypes
import os
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from bigkernel import _library, _native, backend
from bigkernel.errors import FallbackWarning
from bigkernel.integrations import native

PACKAGE = Path(_native.__file__).parent
ALL = "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, PTX for sm_120"
BUILD = _native.BuildInfo(cuda="13.0", cuda_archs=ALL, compiler="g++", sanitizer=False)

SCRIPT = """
import bigkernel

import torch
q = torch.randn(1, 2, 8, 16, requires_grad=True)
bigkernel.scaled_dot_product_attention(q, q, q).sum().backward()
print(bigkernel.explain('attention'))
"""


def run_without_library(tmp_path, note: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The script with a copy of the package, as it is installed without the library."""
    left_out = shutil.ignore_patterns("*.so", "__pycache__", "corpora")
    shutil.copytree(PACKAGE, tmp_path / "bigkernel", ignore=left_out)
    (tmp_path / "bigkernel" / "build_info.json").write_text(note)
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), **env}
    command = [sys.executable, "script.py"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_a_pure_python_package_says_once_that_it_has_no_native_part(tmp_path):
    done = run_without_library(tmp_path, '{"native": false, "cuda": null, "cuda_archs": ""}')
    assert done.returncode == 0, done.stderr
    reason = "this is the pure-Python package, which has no native library"
    assert f"attention: torch, because {reason}" in done.stdout
    sentence = f"script.py:2: FallbackWarning: bigkernel: {reason}; every op runs in plain PyTorch."
    assert done.stderr.splitlines() == [f"{tmp_path}/{sentence}", "  import bigkernel"]


def test_a_library_for_a_later_torch_is_not_loaded(tmp_path, monkeypatch):
    library = tmp_path / "libbigkernel_ops.so"
    loaded = []

    def load(path):
        loaded.append(path)
        return types.SimpleNamespace(bigkernel_register=registers(None))

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert "was not built" in _native.why_not_loaded(library, "2.14.1")
    library.write_text("not a library")
    for version in ("2.10.0+cu126", "1.13.1"):
        why = _native.why_not_loaded(library, version)
        expected = f"the native library needs torch 2.11 or later, and this is torch {version}"
        assert why == expected
    assert loaded == []
    for version in ("2.11.0a0+git1234", "2.11.0", "3.0"):
        assert _native.why_not_loaded(library, version) is None
    assert loaded == 3 * [str(library)]


def registers(answer):
    """What a library has to register its kernels by, which is told the name of the package."""

    def bigkernel_register(name):
        assert name == b"bigkernel"
        return answer

    return bigkernel_register


def test_a_library_that_cannot_be_loaded_is_a_sentence(tmp_path, monkeypatch):
    library = tmp_path / "libbigkernel_ops.so"
    library.write_text("not a library")
    why = _native.why_not_loaded(library, str(torch.__version__))
    assert why.startswith("the native library did not load: ")
    older = types.SimpleNamespace()
    for loaded, reason in (
        (older, "the native library is older than this package; `make build` builds it anew"),
        (
            types.SimpleNamespace(bigkernel_register=registers(b"no such op")),
            "the native library did not load: no such op",
        ),
    ):
        monkeypatch.setattr(ctypes, "CDLL", lambda _, loaded=loaded: loaded)
        assert _native.why_not_loaded(library, str(torch.__version__)) == reason


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        (ALL, [80, 86, 87, 89, 90, 100, 103, 120, 121, 130], [70, 75, 110]),
        ("sm_80, sm_90, PTX for sm_90", [80, 86, 90, 100, 120], [75]),
        ("sm_86", [86, 89], [80, 75, 90]),
        ("sm_90a", [], [80, 90]),
    ],
)
def test_a_gpu_needs_code_of_its_generation_or_ptx(archs, runs, does_not):
    assert [each for each in runs + does_not if _native.runs_on(archs, each)] == runs


@pytest.mark.parametrize(
    ("build", "driver", "capabilities", "reason"),
    [
        (BUILD, 13000, [80], None),
        (BUILD, 13020, [], None),  # not known which GPUs there are
        (BUILD, 14000, [75, 90], None),  # one of them will do
        (BUILD, 0, [], None),  # no driver: no GPU to speak of
        (BUILD._replace(cuda=None, cuda_archs=""), 12040, [90], None),
        (BUILD, 12080, [90], "the CUDA kernels need a driver for CUDA 13.0, and this one is for "
                             "CUDA 12.8"),
        (BUILD, 13000, [75, 75, 70], f"there is no CUDA kernel for sm_70, sm_75, only for {ALL}"),
    ],
)  # fmt: skip
def test_what_driver_and_gpus_the_cuda_kernels_need(build, driver, capabilities, reason):
    assert _native.why_no_cuda(build, driver, capabilities) == reason


FAKE_NVML = """
int nvmlInit_v2(void) { return %d; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** gpu) {
  *gpu = (void*)(long)(8 + index); return index == 1;
}
int nvmlDeviceGetCudaComputeCapability(void* gpu, int* major, int* minor) {
  *major = (int)(long)gpu; *minor = 6; return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc on the path")
@pytest.mark.parametrize(("state", "found"), [(0, [86, 106]), (9, [])])
def test_gpus_are_those_that_the_drivers_library_tells(tmp_path, state, found):
    """The second one cannot be asked; 9 is what NVML answers where no driver is loaded."""
    source, library = tmp_path / "nvml.c", tmp_path / "libnvml.so"
    source.write_text(FAKE_NVML % state)
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library], check=True)
    assert _native.capabilities(str(library)) == found
    assert _native.capabilities(str(tmp_path / "none.so")) == []


@pytest.fixture
def old_driver(monkeypatch):
    """A library with CUDA kernels, a torch with CUDA, and a driver too old for the first."""
    monkeypatch.setattr(_native, "told", set())
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(_native, "capabilities", lambda: [90])
    monkeypatch.setattr(_native.Native, "build_info", lambda _: BUILD)

    class Ops:
        cuda_driver = staticmethod(lambda: 12060)

    monkeypatch.setattr(_native, "ops", Ops)


def test_a_driver_that_is_too_old_is_said_once_and_pytorch_runs(old_driver, monkeypatch):
    with pytest.warns(FallbackWarning, match=r"CUDA 12\.6; ops on a GPU run in plain PyTorch"):
        reason, differ = _native.check_cuda(_native.Native())
    assert not differ
    monkeypatch.setattr(_library, "native", _native.Native())
    monkeypatch.setattr(_library, "cuda_error", reason)
    monkeypatch.setitem(_library.kernels, ("attention_fwd", "cuda"), False)
    assert backend.decide("attention_fwd", "cuda") == ("torch", reason)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said
        backend.select("attention_fwd", torch.device("cuda"))
    monkeypatch.setenv("BIGKERNEL_STRICT", "1")
    with pytest.raises(RuntimeError, match="BIGKERNEL_STRICT=1 makes this an error"):
        backend.select("attention_fwd", torch.device("cuda"))
    with pytest.raises(RuntimeError, match="need a driver"), backend.use_backend("cuda"):
        backend.decide("attention_fwd", "cuda")


def test_nothing_is_said_where_torch_uses_no_gpu(old_driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.check_cuda(_native.Native()) == (None, False)


@pytest.mark.parametrize(
    ("there", "differ"), [([80, 90], False), ([75, 90], True), ([], True)], ids=str
)
def test_a_call_asks_for_its_gpu_where_they_differ_or_are_not_known(
    old_driver, monkeypatch, there, differ
):
    monkeypatch.setattr(_native, "capabilities", lambda: there)
    monkeypatch.setattr(_native.ops, "cuda_driver", staticmethod(lambda: 13000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.check_cuda(_native.Native()) == (None, differ)


def test_of_two_gpus_the_one_without_kernels_falls_back(old_driver, monkeypatch):
    """A T4 beside an H100: each call goes by where its tensors are."""
    gpus = [types.SimpleNamespace(major=7, minor=5), types.SimpleNamespace(major=9, minor=0)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpus[device.index])
    monkeypatch.setattr(_library, "native", _native.Native())
    monkeypatch.setattr(_library, "gpus_differ", True)
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setitem(_library.kernels, ("attention_fwd", "cuda"), True)
    monkeypatch.setitem(_library.kernels, ("attention_fwd", "cpu"), True)
    old, new = (torch.device("cuda", index) for index in range(2))
    with pytest.warns(FallbackWarning, match=f"no CUDA kernel for sm_75, only for {ALL}"):
        assert backend.select("attention_fwd", old) is _library.TORCH_OPS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for device in (new, torch.device("cpu")):
            assert backend.select("attention_fwd", device) is _library.OPS
            assert backend.why_not_on(device) is None
        monkeypatch.setitem(_library.kernels, ("norm_fwd", "cuda"), True)
        found = []
        for device in (old, new):
            held = types.SimpleNamespace(parameters=lambda device=device: iter([_On(device)]))
            found.append(native.why_not("rms_norm", held))
        assert found == [f"there is no CUDA kernel for sm_75, only for {ALL}", None]
    with pytest.raises(RuntimeError, match="no CUDA kernel for sm_75"), backend.use_backend("cuda"):
        backend.select("attention_fwd", old)


class _On:
    """What is asked of a parameter on a GPU."""

    dtype = torch.float32

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def is_floating_point(self) -> bool:
        return True
