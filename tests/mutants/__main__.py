"""Make small changes to the code, one at a time, and see whether the tests notice.

    python -m tests.mutants [--list] [--copy FOLDER] [NAME...]

NAME is a mutant, a room (the name of a data file here) or a pattern of either; none means all.
A room's file ``ROOM.toml`` holds its mutants::

    [[mutant]]
    name = "window_off_by_one"
    file = "csrc/attention/cpu_scores.h"
    old = "row + off - left"         # occurs exactly once in the file
    new = "row + off - left + 1"
    tests = "tests/ops/test_attention.py -k 'windows and avx2'"   # arguments of pytest
    equivalent = "why no test can notice"                         # only where that is so

Each change is made in a temporary copy of the tree, never in the tree itself, and undone there. CPU
kernels compile once for each instruction set; only one of them is compiled anew (``ISA``), and the
tests of a kernel have to name it. Kernels in ``.cu`` files are compiled by the tests that run them
in the emulator. With ``--copy`` the copy is kept, and a later call need not build it again.

The exit code is 1 where a mutant survives that has no reason to, or is killed although it has one.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ISA = "avx2" if platform.machine() in ("x86_64", "AMD64") else "portable"
# pytest: 1 tests failed; 2 the tests could not be imported, which a change to the code can cause.
_NOTICED = (1, 2)
_NATIVE = (".cpp", ".h")


class MutantError(Exception):
    """A mutant cannot be tried; the message says which and why."""


@dataclass(frozen=True)
class Mutant:
    """A change to one file, and the tests that must notice it."""

    name: str
    room: str
    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""

    def changed(self, text: str) -> str:
        """The file's text with the change made; MutantError if the place is not the only one."""
        count = text.count(self.old)
        if count != 1:
            raise MutantError(f"{self.name}: its old text occurs {count} times in {self.file}.")
        text = text.replace(self.old, self.new)
        if self.file.endswith(".py"):  # what cannot be read would be noticed by any test
            try:
                compile(text, self.file, "exec")
            except SyntaxError as error:
                raise MutantError(f"{self.name}: its new text is no Python: {error}.") from error
        return text

    @property
    def of_cpu_kernels(self) -> bool:
        """Whether the extension has to be built again."""
        path = Path(self.file)
        on_gpu = path.name.startswith("cuda") or path.parent.name == "cuda"
        return path.parts[0] == "csrc" and path.suffix in _NATIVE and not on_gpu


def read_mutants(folder: Path = HERE) -> list[Mutant]:
    """Every mutant of every room; MutantError if two have one name or one changes nothing."""
    mutants = [
        Mutant(room=file.stem, **fields)
        for file in sorted(folder.glob("*.toml"))
        for fields in tomllib.loads(file.read_text())["mutant"]
    ]
    twice = [name for name, count in Counter(m.name for m in mutants).items() if count > 1]
    if twice:
        raise MutantError(f"two mutants are called {twice[0]}.")
    for mutant in mutants:
        if mutant.old == mutant.new:
            raise MutantError(f"{mutant.name} changes nothing.")
    return mutants


def choose(mutants: list[Mutant], names: list[str]) -> list[Mutant]:
    """Those that a name or pattern stands for; MutantError for a name that stands for none."""
    for name in names:
        if not any(_is_called(m, name) for m in mutants):
            raise MutantError(f"there is no mutant and no room {name!r}; see --list.")
    return [m for m in mutants if not names or any(_is_called(m, name) for name in names)]


def _is_called(mutant: Mutant, name: str) -> bool:
    return any(fnmatch.fnmatchcase(given, name) for given in (mutant.name, mutant.room))


def copy_tree(root: Path, copy: Path) -> None:
    """What git knows or would add, and the extension; files that are the same keep their times."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
    )
    extensions = [str(path.relative_to(root)) for path in root.glob("bigkernel/_C*.so")]
    known = {name for name in os.fsdecode(listed.stdout).split("\0") if name}
    for name in [*known, *extensions]:
        source, target = root / name, copy / name
        if not source.is_file() or (name in extensions and target.exists()):
            continue
        content = source.read_bytes()
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            shutil.copymode(source, target)


def try_mutant(mutant: Mutant, copy: Path) -> tuple[bool, str]:
    """(whether the tests noticed, what they said last)."""
    file = copy / mutant.file
    original = file.read_text()
    changed = mutant.changed(original)
    if mutant.of_cpu_kernels:
        _build(copy, None)  # all of it, once
    kept = _BuiltFiles(copy, file) if mutant.of_cpu_kernels else None
    try:
        file.write_text(changed)
        if kept is not None:
            _build(copy, kept)
        return _run_tests(mutant, copy)
    finally:
        file.write_text(original)
        if kept is not None:
            kept.put_back()


class _BuiltFiles:
    """What a change to a file makes the build write anew, set aside meanwhile.

    Of a header that all instruction sets include, all objects but one are left as they are: the
    file keeps its time, and that object is removed.
    """

    def __init__(self, copy: Path, file: Path) -> None:
        self.file, self.times = file, (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        op, names = file.parent.name, [f"csrc/{file.parent.name}/{file.stem}"]
        if file.suffix == ".h":
            names = [f"build/generated/{op}_{ISA}"]
            binding = file.with_name("cpu.cpp")
            if binding.is_file() and f'"{op}/{file.name}"' in binding.read_text():
                names.append(f"csrc/{op}/cpu")
        objects = [path for name in names for path in copy.glob(f"build/temp*/{name}.o")]
        self.built = [*objects, *copy.glob("bigkernel/_C*.so")]
        if len(self.built) < 2:
            raise MutantError(f"{file.relative_to(copy)}: no object of it was found in {copy}.")
        self.aside = Path(tempfile.mkdtemp(prefix="aside-", dir=copy / "build"))
        for number, path in enumerate(self.built):
            shutil.move(path, self.aside / str(number))

    def keep_time(self) -> None:
        os.utime(self.file, ns=self.times)

    def put_back(self) -> None:
        self.keep_time()
        for number, path in enumerate(self.built):
            shutil.move(self.aside / str(number), path)
        shutil.rmtree(self.aside)


def _build(copy: Path, kept: _BuiltFiles | None) -> None:
    if kept is not None:
        kept.keep_time()
    elif any(copy.glob("build/temp*/build/generated/*.o")) and any(copy.glob("bigkernel/_C*.so")):
        return
    else:
        for stale in copy.glob("bigkernel/_C*.so"):
            stale.unlink()  # the tree's own, which another build may have made
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=copy,
        env={**os.environ, "BIGKERNEL_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise MutantError(f"the build failed: {(done.stdout + done.stderr)[-2000:]}")


def _run_tests(mutant: Mutant, copy: Path) -> tuple[bool, str]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"),
            *("--tb=line", "-n", "0", *shlex.split(mutant.tests)),
        ],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()] or [done.stderr[-500:]]
    failed = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])
    if done.returncode not in (0, *_NOTICED):
        raise MutantError(f"{mutant.name}: pytest ended with {done.returncode}: {lines[-1]}")
    if done.returncode == 0 and " passed" not in lines[-1]:
        raise MutantError(f"{mutant.name}: no test ran: {lines[-1]}")
    return done.returncode in _NOTICED, failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description="See whether the tests notice small changes."
    )
    parser.add_argument("--list", action="store_true", help="name the mutants and end")
    parser.add_argument("--copy", type=Path, help="a folder to keep the copy of the tree in")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a mutant or room, or a pattern")
    given = parser.parse_args(arguments)
    try:
        mutants = choose(read_mutants(), given.names)
        for mutant in mutants:  # a text that is not there any more is found before anything runs
            mutant.changed((ROOT / mutant.file).read_text())
    except MutantError as error:
        parser.error(str(error))
    if given.list:
        for mutant in mutants:
            print(f"{mutant.room:14} {mutant.name}")
        return 0
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        copy = (given.copy or Path(scratch, "tree")).resolve()
        if copy == ROOT or ROOT in copy.parents:
            parser.error("--copy must lie outside the tree.")
        copy_tree(ROOT, copy)
        for mutant in mutants:
            since = time.monotonic()
            try:
                killed, said = try_mutant(mutant, copy)
            except MutantError as error:
                outcome, said = "error", str(error)
            else:
                outcome = "killed" if killed else "survived"
                if mutant.equivalent:
                    outcome += ", although equivalent" if killed else " (equivalent)"
            counts[outcome] += 1
            seconds = time.monotonic() - since
            print(f"{outcome}: {mutant.name} [{seconds:.0f} s] {said[:150]}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 0 if set(counts) <= {"killed", "survived (equivalent)"} else 1


if __name__ == "__main__":
    sys.exit(main())
