"""Installs a wheel into fresh environments and runs the tests of the ops there: `make wheel-check`.

    python tools/wheel_check.py WHEEL [PYTHON:TORCH ...]      such as 3.12:2.13.0

Without cells all of the matrix: the Pythons that this machine has, with each version of torch. A
cell is an environment in build/wheel-check with torch, what the tests import and the wheel; nothing
of this tree is there but a copy of the tests, and of csrc, whose headers they read. Ends with a
line a cell, and 1 if one failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "wheel-check"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.11.0", "2.13.0", "2.14.1")
# What another file tests, and what needs the sources, a compiler or several processes.
LEFT_OUT = "compile or opcheck or ptx or kernel or two_ranks or is_transformers"


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


def environment(command: str | Path, torch: str, wheel: Path, folder: Path) -> Path:
    """A fresh environment with the wheel in it; returns its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([command, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    install += ["--disable-pip-version-check"]
    tests = ("numpy>=2", "torchvision", "pytest>=8,<9.2", "pytest-xdist>=3.6", "hypothesis")
    subprocess.run([*install, f"torch=={torch}", *tests], check=True)
    subprocess.run([*install, "--no-deps", wheel], check=True)
    return python


SHOW = """
import torch, bigkernel
from bigkernel import _library
assert "site-packages" in bigkernel.__file__, bigkernel.__file__
assert _library.native is not None, _library.native_error
print(f"torch {torch.__version__}, {bigkernel.explain('attention')}")
"""


def check(python: str, torch: str, wheel: Path, more: list[str]) -> str | None:
    """Run one cell; returns why it failed."""
    command = command_of(python)
    if command is None:
        return f"there is no Python {python} on the path or in pyenv"
    folder = FOLDER / f"python{python}-torch{torch}"
    try:
        found = environment(command, torch, wheel, folder)
        subprocess.run([found, "-c", SHOW], check=True, cwd=folder)
        for name in ("tests", "csrc"):
            left_out = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=left_out)
        tests = folder / "tests"
        shutil.copy(ROOT / "pyproject.toml", folder)
        run = [found, "-m", "pytest", "-q", "-o", "pythonpath=", "-p", "no:cacheprovider"]
        run += [tests / "ops", "--ignore", tests / "ops" / "test_cuda_report.py"]
        run += ["-k", f"not ({LEFT_OUT})", *more]
        subprocess.run(run, check=True, cwd=folder)
    except subprocess.CalledProcessError as error:
        return f"{' '.join(map(str, error.cmd[:4]))} .. ended with {error.returncode}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("cells", nargs="*", help="PYTHON:TORCH, such as 3.12:2.13.0")
    parser.add_argument("--pytest", default="", help="more for pytest, such as '-n 2'")
    arguments = parser.parse_args()
    here = [python for python in PYTHONS if command_of(python) is not None]
    cells = arguments.cells or [f"{python}:{torch}" for python in here for torch in TORCHES]
    lines, failed = [], False
    for cell in cells:
        start = time.monotonic()
        why = check(*cell.split(":"), arguments.wheel.resolve(), arguments.pytest.split())
        failed |= why is not None
        lines.append(f"{cell}: {why or 'passed'} ({time.monotonic() - start:.0f} s)")
    print("\n".join(f"bigkernel: wheel-check {line}" for line in lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
