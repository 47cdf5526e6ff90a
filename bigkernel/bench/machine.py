"""Where and with what a measurement was made."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import bigkernel
from bigkernel import _library, tuning

PACKAGES = ("torch", "torchvision", "transformers", "albumentations", "kornia", "deepspeed")


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def facts() -> dict[str, Any]:
    """Machine, instruction set, threads, versions, commit and time, for the JSON file."""
    native = _library.native
    versions = {"bigkernel": bigkernel.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": tuning.cpu_name(),
        "cores": cores(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "isa": None if native is None else native.cpu_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """The commit of the checkout that this package lies in; None for an installed one."""
    folder = Path(bigkernel.__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # Not the commit of some other repository that a virtual environment happens to lie in.
    if not git("ls-files", "__init__.py"):
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{git('rev-parse', 'HEAD')}{' with changes' if changed else ''}"
