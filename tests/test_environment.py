"""The table of environment variables and the sources name the same ones."""

import re
import subprocess
import sys
from pathlib import Path

from bigkernel import environment

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *(ROOT / "bigkernel").rglob("*.py"),
    *(ROOT / "csrc").rglob("*.cpp"),
    *(ROOT / "tests").rglob("conftest.py"),
    ROOT / "tests" / "test_end_to_end.py",
    ROOT / "setup.py",
]
# Defined by setup.py for the compiler, not read from the environment.
MACROS = {"BIGKERNEL_CUDA_VERSION", "BIGKERNEL_CUDA_ARCHS"}
# Read by torch's build tools, or not ours alone.
THEIRS = {"MAX_JOBS", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "XDG_CACHE_HOME"}


def test_every_variable_that_is_read_is_in_the_table():
    found = set()
    for path in SOURCES:
        if path.name != "environment.py":
            found |= set(re.findall(r"\bBIGKERNEL_[A-Z][A-Z_]*[A-Z]\b", path.read_text()))
    assert found - MACROS == {v.name for v in environment.VARIABLES} - THEIRS


def test_table_has_no_name_twice_and_no_empty_cell():
    names = [variable.name for variable in environment.VARIABLES]
    assert len(set(names)) == len(names)
    assert all(all(variable) for variable in environment.VARIABLES)


def test_setup_py_tells_the_build_variables():
    show = (
        "import setuptools; setuptools.setup = lambda **_: None; import setup; print(setup.__doc__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.environ['BIGKERNEL_NATIVE'] = '0'; {show}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for variable in environment.VARIABLES:
        assert (variable.name in done.stdout) == (variable.when == "build"), variable.name
