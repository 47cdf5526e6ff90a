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
kernels compile once for each instruction set, and only one is compiled anew (``ISA``): tests that
choose none run with it, and of those that run under each the mutant's ``-k`` has to name it.
Kernels in ``.cu`` files are compiled by the tests that run them in the emulator. With ``--copy``
the copy is kept, and a later call builds only what has changed.

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

from tests.mutants.forks import Forks

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ISA = "avx2" if platform.machine() in ("x86_64", "AMD64") else "portable"
# pytest: 1 tests failed; 2 the tests could not be imported, which a change to the code can cause.
_NOTICED = (1, 2)
_NATIVE = (".cpp", ".h")
LIBRARY = "bigkernel/libbigkernel_ops.so"
_ASIDE = "build/aside"  # in the copy
_forks = Forks()


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
    extensions = [str(path.relative_to(root)) for path in root.glob(LIBRARY)]
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
    kept = _BuiltFiles(copy, file) if mutant.of_cpu_kernels else None
    try:
        file.write_text(changed)
        if kept is not None:
            kept.keep_time()
            _build(copy)
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
        folder, names = file.parent.name, [f"csrc/{file.parent.name}/{file.stem}"]
        if file.suffix == ".h":
            ops = [folder]
            if folder == "cpu":  # shared by ops
                bodies = copy.glob("csrc/*/cpu_body.h")
                ops = [b.parent.name for b in bodies if f'"cpu/{file.name}"' in b.read_text()]
            names = [f"build/generated/{op}_{ISA}" for op in ops]
            bindings = copy.glob("csrc/*/cpu.cpp")
            included = [b for b in bindings if f'"{folder}/{file.name}"' in b.read_text()]
            names += [f"csrc/{binding.parent.name}/cpu" for binding in included]
        objects = [path for name in names for path in copy.glob(f"build/temp*/{name}.o")]
        built = [*objects, *copy.glob(LIBRARY)]
        if len(built) < 2:
            raise MutantError(f"{file.relative_to(copy)}: no object of it was found in {copy}.")
        self.copy = copy
        for path in built:
            aside = copy / _ASIDE / path.relative_to(copy)
            aside.parent.mkdir(parents=True, exist_ok=True)
            path.replace(aside)

    def keep_time(self) -> None:
        os.utime(self.file, ns=self.times)

    def put_back(self) -> None:
        self.keep_time()
        put_back(self.copy)


def put_back(copy: Path) -> None:
    """What was set aside, also by a call that was stopped before it could."""
    for path in (copy / _ASIDE).rglob("*"):
        if path.is_file():
            path.replace(copy / path.relative_to(copy / _ASIDE))
    shutil.rmtree(copy / _ASIDE, ignore_errors=True)


def build_all(copy: Path) -> None:
    """The extension with all its objects, once: what is there and current is kept."""
    if not any(copy.glob("build/temp*/build/generated/*.o")):
        for other in copy.glob(LIBRARY):
            other.unlink()  # the tree's own, beside which setup.py would build nothing
    _build(copy)


def _build(copy: Path) -> None:
    program = ["setup.py", "--quiet", "build_ext", "--inplace"]
    code, output = _forks.run(program, copy, {"BIGKERNEL_CUDA": "0"})
    if code:
        raise MutantError(f"the build failed: {output[-2000:]}")


def _run_tests(mutant: Mutant, copy: Path) -> tuple[bool, str]:
    env = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    if mutant.of_cpu_kernels:
        env["BIGKERNEL_CPU_ISA"] = ISA
    program = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", "-n", "0"]
    code, output = _forks.run([*program, *shlex.split(mutant.tests)], copy, env)
    lines = [line for line in output.splitlines() if line.strip()] or [""]
    failed = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])
    if code not in (0, *_NOTICED):
        raise MutantError(f"{mutant.name}: pytest ended with {code}: {lines[-1]}")
    if code == 0 and not any(" passed" in line for line in lines):
        raise MutantError(f"{mutant.name}: no test ran: {lines[-1]}")
    return code in _NOTICED, failed


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
        put_back(copy)
        copy_tree(ROOT, copy)
        try:
            if any(mutant.of_cpu_kernels for mutant in mutants):
                build_all(copy)
        except MutantError as error:
            parser.error(str(error))
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
