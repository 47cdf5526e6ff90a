"""Every op has the rooms that it says it has, every feature its test: what lacks one fails here."""

import fnmatch
import itertools
import re
from pathlib import Path

import pytest

import bigkernel.ops  # noqa: F401 - registers the ops
from bigkernel import _library, registry

ROOT = Path(__file__).resolve().parent.parent
OPS = [op for op in registry.every() if not op.noun.startswith("test_only")]

# What each op has, and what comes with a level.
ALWAYS = ["bigkernel/ops/{op}/__init__.py", "tests/ops/test_{op}.py"]
ROOMS: dict[registry.Level, list[str]] = {
    "cpu": ["csrc/{op}/{op}.h", "csrc/{op}/cpu.cpp", "csrc/{op}/cpu_body.h"],
    "cuda": [
        *("csrc/{op}/cuda.cpp", "csrc/{op}/cuda.h", "csrc/{op}/sm*_*.cu"),
        *("tests/ops/{op}_ptx.py", "bigkernel/bench/gpu_{op}.py"),
    ],
    "benchmark": ["bigkernel/bench/{op}.py"],
}
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.noun)


def lies_there(op: registry.Op, room: str) -> bool:
    return any(ROOT.glob(room.format(op=op.noun)))


@each_op
def test_op_has_every_room(op):
    missing = [room for room in ALWAYS if not lies_there(op, room)]
    assert not missing, f"op {op.noun} lacks {missing}"
    for level, rooms in ROOMS.items():
        if level in op.absent:
            there = [room for room in rooms if lies_there(op, room)]
            assert not there, f"op {op.noun} says that it has no {level}, but there is {there}"
        else:
            missing = [room for room in rooms if not lies_there(op, room)]
            assert not missing, f"op {op.noun} lacks {missing}, and gives no reason"


@each_op
def test_native_kernels_are_where_the_op_says(op):
    if _library.native is None:
        pytest.skip("the native library is not built")
    levels = ["cpu"] if _library.native.build_info().cuda is None else ["cpu", "cuda"]
    for level, function in itertools.product(levels, op.functions):
        built = _library.kernels[function.name, level]
        assert built == (level not in op.absent), (
            f"op {op.noun} says that it has {'no' if built else 'a'} {level} kernel, and the "
            f"native library has {'one' if built else 'none'} of {function.name}. Is it built anew "
            f"(make build), and does csrc/{op.noun}/{level}.cpp name it in m.impl?"
        )


def test_no_op_outside_the_list():
    folders = {path.parent.name for path in ROOT.glob("bigkernel/ops/*/__init__.py")}
    assert {op.noun for op in OPS} == folders
    shared = {"common", "cpu", "cuda", "python"}
    assert {path.parent.name for path in ROOT.glob("csrc/*/*.*")} - shared <= folders


@pytest.mark.parametrize("pattern", ["csrc/*/*.cu", "csrc/*/cpu_*.h", "csrc/*/[a-z]*.h"])
def test_kernels_include_no_torch_header(pattern):
    for path in ROOT.glob(pattern):
        if path.parent.name in ("common", "cpu", "cuda"):
            continue
        assert "#include <torch" not in path.read_text(), f"{path} includes a torch header"


def test_arguments_are_read_by_their_types_in_the_schema():
    """BK_BOX refuses other types while it compiles; torch's own macro reads a float as garbage."""
    bindings = [path for path in ROOT.glob("csrc/*/*.cpp") if "m.impl(" in path.read_text()]
    assert len(bindings) > 5
    assert not [str(path) for path in bindings if "TORCH_BOX(" in path.read_text()]


def test_kernels_are_named_by_their_generation():
    sources = [path for op in OPS for path in ROOT.glob(f"csrc/{op.noun}/*")]
    kernels = [path.name for path in sources if "__global__" in path.read_text()]
    assert len(kernels) > 3
    assert not [name for name in kernels if not re.match(r"sm\d+_", name)]


def test_host_code_reads_nothing_that_depends_on_the_architecture():
    """Of the two sides that see a header, only one knows __CUDA_ARCH__."""
    sources = [path for path in ROOT.glob("csrc/*/*") if path.is_file()]
    asking = [path.name for path in sources if "__CUDA_ARCH__" in path.read_text()]
    assert asking == ["device.h"]  # kCompiledFor


def test_every_test_that_the_documentation_names_exists():
    """tests/README.md lists features with the names of their tests."""
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tests = re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    named = re.findall(r"`(test_[\w*]+)`", (ROOT / "tests" / "README.md").read_text())
    assert len(named) > 50
    assert not [name for name in named if not fnmatch.filter(tests, name)]
