"""nvcc, and what it made before.

What it makes is kept until the process ends; where BIGKERNEL_PTX_CACHE names a folder, there, for
later processes and those beside this one.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def nvcc() -> str | None:
    """The path of nvcc, None where there is none."""
    return shutil.which("nvcc")


@functools.cache
def _version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True).stdout


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def run_nvcc(arguments: Sequence[str], who: str) -> None:
    """RuntimeError with nvcc's message where it fails or is missing."""
    program = nvcc()
    if program is None:
        raise RuntimeError(f"{who}: nvcc is not on the path; install the CUDA toolkit")
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{who}: nvcc could not compile:\n{done.stderr}")


def compiled(
    source: str | Path, options: Sequence[str], who: str, named: str = "kernel.cu"
) -> Path:
    """The folder with ``out``, which nvcc made of a source file, or of a text with a newline.

    ``{folder}`` in the options stands for it; ``named``: the text's file. Nothing is compiled where
    the source, what it includes, the options and nvcc are those of last time.
    """
    text = str(source) if "\n" in str(source) else None
    root = Path(os.environ.get("BIGKERNEL_PTX_CACHE") or _own_folder().name).resolve()
    name = text or str(Path(source).resolve())
    key = "\0".join([name, *options, _version(nvcc() or "")])
    folder = root / hashlib.sha256(key.encode()).hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others wait for what this process compiles
        if _digest(folder) != _read(folder / "digest"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if text is not None:
                name = str(folder / named)
                Path(name).write_text(text)
            given = [option.replace("{folder}", str(folder)) for option in options]
            headers = ["-MMD", "-MF", str(folder / "headers")]
            run_nvcc([*given, *headers, name, "-o", str(folder / "out")], who)
            for path in folder.iterdir():  # what -keep left is large
                if path.name not in ("out", "headers", Path(name).name) and path.suffix != ".ptx":
                    path.unlink()
            (folder / "digest").write_text(_digest(folder))
    return folder


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _digest(folder: Path) -> str:
    """Of the contents of what was included; 'none' where that is not known or a file is gone."""
    rule = _read(folder / "headers").replace("\\\n", " ").partition(": ")[2]
    paths = [Path(p.replace("\\ ", " ")) for p in re.findall(r"(?:\\ |\S)+", rule)]
    if not paths or not all(path.exists() for path in paths):
        return "none"
    total = hashlib.sha256()
    for path in paths:
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
