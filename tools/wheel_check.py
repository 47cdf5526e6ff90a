"""Installs a wheel into fresh environments and runs the tests of the ops there: `make wheel-check`.

    python tools/wheel_check.py WHEEL [PYTHON:TORCH ...]      such as 3.12:2.13.0

First the wheel itself, by auditwheel, check-wheel-contents and torch-abi-audit. Then the cells, or
without any all of the matrix: the Pythons that this machine has, with each version of torch
(2.13.0+cpu is one too, where pip's index has it). A cell is an environment in build/wheel-check
with torch, what the tests import and the wheel; nothing of this tree is there but a copy of the
tests, and of csrc, whose headers they read. It runs `python -m bigkernel.bench.doctor` and the
tests, and is removed if they pass: with CUDA it has more than 5 GB. Ends with a line for the wheel
and one a cell, and 1 if one failed.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "wheel-check"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.11.0", "2.13.0", "2.14.1")
TOOLS = ("auditwheel", "check-wheel-contents", "torch-abi-audit")
# What another file tests, and what needs the sources, nvcc or several processes. Not those of
# torch.compile: what the newest torch traces, the oldest may not.
LEFT_OUT = "opcheck or ptx or kernel or two_ranks or is_transformers"
# pip's index has torchvision for CUDA builds of torch alone: beside others its library does not
# load. Its transforms, which the tests compare with, are Python and need nothing of it, but
# `import torchvision` wants to find two of its ops.
TORCHVISION_OPS = """import torch
for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor s, float iou) -> Tensor")
import torchvision
"""
LIBRARY = "bigkernel/libbigkernel_ops.so"
ABI = runpy.run_path(str(ROOT / "tests" / "check_abi.py"))
GLIBC = 28  # 2.28, of the wheel's tag
OF_TORCH = {"libtorch.so", "libtorch_cpu.so"}  # all that is loaded from elsewhere


def command_of(python: str) -> str | Path | None:
    """The command of a Python that works here, on the path or among those of pyenv."""
    named = [shutil.which(name) for name in (f"python{python}", "python3")]
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    for found in filter(None, (*named, *pyenv.glob(f"{python}.*/bin/python{python}"))):
        show = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([found, "-c", show], capture_output=True, text=True)
        if done.stdout.strip() == python:
            return found
    return None


def environment(command: str | Path, folder: Path) -> list[str | Path]:
    """A fresh environment; returns the command that installs into it."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([command, "-m", "venv", folder], check=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
    return [*install, "--disable-pip-version-check"]


def audit(wheel: Path) -> None:
    """What the auditors of others say of the wheel."""
    folder = FOLDER / "audit"
    subprocess.run([*environment(sys.executable, folder), *TOOLS], check=True)
    programs = folder / "bin"
    subprocess.run([programs / "check-wheel-contents", wheel], check=True)
    show = [programs / "auditwheel", "show", "--json", wheel]
    told = json.loads(subprocess.run(show, check=True, capture_output=True, text=True).stdout)
    if fault := unlike_its_tag(told):
        raise RuntimeError(f"auditwheel: {fault}")
    print(f"auditwheel: {told['sym_tag']}, with {', '.join(told['external_libs'])}", flush=True)
    with zipfile.ZipFile(wheel) as archive:
        ABI["audit"](str(programs / "torch-abi-audit"), Path(archive.extract(LIBRARY, folder)))
    shutil.rmtree(folder)


def unlike_its_tag(told: dict[str, Any]) -> str | None:
    """What in auditwheel's words contradicts manylinux_2_28, if torch is there."""
    glibc = re.fullmatch(r"manylinux_2_(\d+)_\w+", told["sym_tag"])
    if glibc is None or int(glibc[1]) > GLIBC:
        return f"its symbols are those of {told['sym_tag']}, not of manylinux_2_{GLIBC}"
    if more := set(told["external_libs"]) - OF_TORCH:
        return f"it needs {', '.join(sorted(more))}"
    found = [name for name in ("pyfpe", "ucs2", "unsupported_isa") if told[name]]
    return f"it has {', '.join(found)}" if found else None


def cell(python: str, torch: str, wheel: Path, more: list[str]) -> None:
    """Installs the wheel with one Python and one torch, and runs the doctor and the tests."""
    command = command_of(python)
    if command is None:
        raise FileNotFoundError(f"there is no Python {python} on the path or in pyenv")
    folder = FOLDER / f"python{python}-torch{torch}"
    install = environment(command, folder)
    tests = ("numpy>=2", "torchvision", "pytest>=8,<9.2", "pytest-xdist>=3.6", "hypothesis")
    subprocess.run([*install, f"torch=={torch}", *tests], check=True)
    subprocess.run([*install, "--no-deps", wheel], check=True)
    found = folder / "bin" / "python"
    subprocess.run([found, "-m", "bigkernel.bench.doctor"], check=True, cwd=folder)
    for name in ("tests", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    ops = folder / "tests" / "ops"
    run = [found, "-m", "pytest", "-q", "-o", "pythonpath=", "-p", "no:cacheprovider"]
    run += [ops, "--ignore", ops / "test_cuda_report.py", "-k", f"not ({LEFT_OUT})"]
    if subprocess.run([found, "-c", "import torchvision"], capture_output=True).returncode != 0:
        (folder / "torchvision_ops.py").write_text(TORCHVISION_OPS)
        run += ["-p", "torchvision_ops"]
    run += more
    subprocess.run(run, check=True, cwd=folder)
    shutil.rmtree(folder)


def tried(name: str, check: Callable[[], None]) -> tuple[str, bool]:
    """(its line of the summary, whether it passed) of a check."""
    start, why = time.monotonic(), None
    try:
        check()
    except subprocess.CalledProcessError as error:
        why = f"{' '.join(map(str, error.cmd[:4]))} .. ended with {error.returncode}"
    except (OSError, RuntimeError) as error:
        why = str(error)
    except SystemExit as error:  # of the audit, a script
        why = str(error.code)
    told = "passed" if why is None else " ".join(why.split())
    return f"{name}: {told} ({time.monotonic() - start:.0f} s)", why is None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("cells", nargs="*", help="PYTHON:TORCH, such as 3.12:2.13.0")
    parser.add_argument("--pytest", default="", help="more for pytest, such as '-n 2'")
    arguments = parser.parse_args()
    wheel, more = arguments.wheel.resolve(), arguments.pytest.split()
    os.environ.pop("PYTHONPATH", None)  # what it names would be imported in the wheel's place
    here = [python for python in PYTHONS if command_of(python) is not None]
    cells = arguments.cells or [f"{python}:{torch}" for python in here for torch in TORCHES]
    checks: dict[str, Callable[[], None]] = {wheel.name: lambda: audit(wheel)}
    checks |= {name: partial(cell, *name.split(":"), wheel, more) for name in cells}
    results = [tried(name, check) for name, check in checks.items()]
    print("\n".join(f"bigkernel: wheel-check {line}" for line, _ in results))
    return int(not all(passed for _, passed in results))


if __name__ == "__main__":
    sys.exit(main())
