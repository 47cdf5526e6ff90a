"""`bigkernel env`: what a bug report pastes."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

import bigkernel
import bigkernel.ops
from bigkernel import _library, backend, registry, tuning
from bigkernel.bench import machine

PACKAGES = ("transformers", "tokenizers", "accelerate", "safetensors", "torchmetrics", "numpy")
OPTIONAL = ("torchvision", "scikit-learn", "pillow")


def facts() -> list[tuple[str, str]]:
    """(name, value) lines about versions, build, devices and the backend of each op."""
    return [*_versions(), *_native(), *_machine(), *_tuned(), *_settings(), *_ops()]


def _versions() -> list[tuple[str, str]]:
    cuda = torch.version.cuda or torch.version.hip
    build = f"CUDA {cuda}" if cuda else "CPU only"
    lines = [
        ("bigkernel", f"{bigkernel.__version__} ({Path(bigkernel.__file__).parent})"),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform()),
        ("torch", f"{torch.__version__} ({build})"),
    ]
    for name in (*PACKAGES, *OPTIONAL):
        try:
            lines.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            lines.append((name, "not installed"))
    return lines


def _native() -> list[tuple[str, str]]:
    native = _library.native
    if native is None:
        return [("native library", f"none: {_library.native_error}")]
    info = native.build_info()
    lines = [("native library", str(native.path))]
    lines += [(f"built with {name}", _shown(value)) for name, value in info._asdict().items()]
    lines.append(("CPU instruction sets", ", ".join(bigkernel.cpu_isas()) or "none"))
    lines.append(("CPU instruction set in use", native.cpu_isa()))
    return lines


def _shown(value: object) -> str:
    if value is None:
        return "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _machine() -> list[tuple[str, str]]:
    lines = [("CPU", tuning.cpu_name())]
    lines.append(("threads", f"{torch.get_num_threads()} of {machine.cores()} cores"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            lines.append((f"GPU {index}", f"{name} (sm_{major}{minor})"))
    else:
        lines.append(("GPU", "none that torch can use"))
    return lines


def _tuned() -> list[tuple[str, str]]:
    if _library.native is None:
        return []
    lines = []
    for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        read = tuning.load(kind)
        if read is None:
            said = "not measured (`bigkernel tune-kernels`)"
        else:
            time, figures = read
            count = sum(of.takes_torch for of in figures.values())
            said = f"{time}: torch's code for {count} of {len(figures)} classes of calls"
            said += f" ({tuning.path(kind)})"
        lines.append((f"kernels beside torch's on {kind}", said))
    return lines


def _settings() -> list[tuple[str, str]]:
    names = sorted(name for name in os.environ if name.startswith(("BIGKERNEL_", "OMP_NUM_")))
    return [(name, os.environ[name]) for name in names]


def _ops() -> list[tuple[str, str]]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    lines = []
    names = [function.name for op in registry.every() for function in op.functions]
    for op in sorted(names):
        for device in devices:
            try:
                chosen, why = backend.decide(op, device)
            except RuntimeError as error:  # a forced backend that cannot run here
                chosen, why = "error", str(error)
            detail = chosen if why is None else f"{chosen}: {why}"
            lines.append((f"op {op} on {device}", detail))
    return lines
