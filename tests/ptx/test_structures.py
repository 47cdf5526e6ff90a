"""Structs read from headers have the layout that the compiler gives them."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from bigkernel.testing import ptx

CSRC = Path(__file__).resolve().parents[2] / "csrc"
USED = {  # what the drivers in tests/ops fill
    "attention/cuda.h": ["AttentionCudaArgs", "AttentionLaunch", "AttentionTensor"],
    "adam/cuda.h": ["AdamTensor", "AdamDeviceGroup", "AdamDeviceCall", "AdamScalars"],
    "augment/cuda.h": ["AugmentInput", "AugmentArgs", "AugmentImage"],
}
MADE_UP = """
#include "other.h"
enum class Kind : int8_t { kNone, kTwo = 2, kThree };
struct Base {  // of what follows; a comment { with braces; }
  float scale = 1.0f, bias;
  bool on;
};
struct Whole : Base {
  const void *p, *q = nullptr;
  double* r;
  Kind kind = Kind::kNone;
  int32_t box[3], last;
  Inner inner[2];
  const char* name;
};
struct Odd {
  int size() const { return 1; }
};
struct Template {
  std::vector<int> list;
};
"""


def offsets(struct):
    fields = [name for base in struct.__mro__ for name, _ in getattr(base, "_fields_", ())]
    return [ctypes.sizeof(struct), *(getattr(struct, name).offset for name in fields)], fields


def from_compiler(folder, header, names, layout):
    """Of each struct its size, and where each member lies."""
    lines = []
    for name in names:
        members = offsets(getattr(layout, name))[1]
        numbers = ["sizeof(T)", *(f"offsetof(T, {member})" for member in members)]
        lines.append(f"{{ using T = {name}; for (size_t n : {{{', '.join(numbers)}}}) ")
        lines.append('std::printf("%zu ", n); std::puts(""); }')
    source = folder / "layout.cpp"
    source.write_text(
        f'#include <cstddef>\n#include <cstdio>\n#include "{header}"\n'
        f"using namespace bigkernel;\nint main() {{\n{chr(10).join(lines)}\n}}\n"
    )
    command = ["g++", "-std=c++20", "-Wno-invalid-offsetof", "-I", CSRC, "-I", folder]
    subprocess.run([*command, source, "-o", folder / "layout"], check=True)
    done = subprocess.run([folder / "layout"], check=True, capture_output=True, text=True)
    return [list(map(int, line.split())) for line in done.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the path")
@pytest.mark.parametrize("header", USED)
def test_structures_lie_as_the_compiler_says(tmp_path, header):
    layout = ptx.Structures(CSRC, header)
    given = from_compiler(tmp_path, header, USED[header], layout)
    assert [offsets(getattr(layout, name))[0] for name in USED[header]] == given


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the path")
def test_structures_of_a_made_up_header(tmp_path):
    (tmp_path / "other.h").write_text("struct Inner { uint8_t a; uint64_t b; };\n")
    body = MADE_UP.replace('#include "other.h"', "")
    (tmp_path / "made_up.h").write_text(
        "#include <cstdint>\n#include <vector>\nnamespace bigkernel {\n"
        + (tmp_path / "other.h").read_text()
        + body
        + "}\n"
    )
    (tmp_path / "read.h").write_text(MADE_UP)
    layout = ptx.Structures(tmp_path, "read.h")
    names = ["Base", "Whole", "Inner"]
    given = from_compiler(tmp_path, "made_up.h", names, layout)
    assert [offsets(getattr(layout, name))[0] for name in names] == given
    assert list(layout.Kind) == [0, 2, 3]
    assert layout.Kind.kThree == 3
    whole = layout.Whole(scale=0.5, kind=layout.Kind.kTwo, name=b"x")
    assert (whole.scale, whole.kind, whole.box[2], whole.name) == (0.5, 2, 0, b"x")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("Odd", AttributeError, "no struct or enum Odd of plain members"),
        ("Missing", AttributeError, "no struct or enum Missing"),
        ("Template", (NotImplementedError, AttributeError), "std::vector<int>"),
    ],
)
def test_structures_that_are_not_understood(tmp_path, name, error, message):
    (tmp_path / "read.h").write_text(MADE_UP)
    with pytest.raises(error, match=message):
        getattr(ptx.Structures(tmp_path, "read.h"), name)
