"""Every op has the same rooms, every feature its test: what lacks one fails here."""

import fnmatch
import re
from pathlib import Path

import pytest

import bigkernel.ops  # noqa: F401 - registers the ops
from bigkernel import _library

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(path.stem for path in (ROOT / "bigkernel" / "ops").glob("[a-z]*.py"))

ROOMS = [
    "bigkernel/ops/{op}.py",
    "bigkernel/reference/{op}.py",
    "csrc/{op}/{op}.h",
    "csrc/{op}/cpu.cpp",
    "csrc/{op}/cpu_body.h",
    "tests/ops/test_{op}.py",
    "csrc/{op}/cuda.cpp",
    "csrc/{op}/cuda.h",
    "csrc/{op}/*.cu",
    "tests/ops/{op}_ptx.py",
    "benchmarks/test_{op}.py",
]


def test_there_are_three_ops():
    assert OPS == ["adam", "attention", "augment"]


@pytest.mark.parametrize("op", OPS)
def test_op_has_every_room(op):
    missing = [room for room in ROOMS if not any(ROOT.glob(room.format(op=op)))]
    assert not missing, f"op {op} lacks {missing}"


@pytest.mark.parametrize("op", OPS)
def test_every_registered_op_belongs_to_a_noun_and_has_a_native_kernel(op):
    names = [name for name in _library.registered if name.split("_")[0] == op]
    assert names, f"bigkernel/ops/{op}.py registers nothing"
    if _library.native is not None:
        for name in names:
            assert _library.kernels[name, "cpu"], f"{name} has no CPU kernel"


def test_no_op_outside_the_nouns():
    nouns = {name.split("_")[0] for name in _library.registered if not name.startswith("test_only")}
    assert nouns == set(OPS)


@pytest.mark.parametrize("pattern", ["csrc/*/*.cu", "csrc/*/cpu_*.h", "csrc/*/[a-z]*.h"])
def test_kernels_include_no_torch_header(pattern):
    for path in ROOT.glob(pattern):
        if path.parent.name in ("common", "cpu", "cuda"):
            continue
        assert "#include <torch" not in path.read_text(), f"{path} includes a torch header"


def test_every_test_that_the_documentation_names_exists():
    """CONTRIBUTING.md lists features with the names of their tests."""
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tests = re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    named = re.findall(r"`(test_[\w*]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 50
    assert not [name for name in named if not fnmatch.filter(tests, name)]
