"""What nvcc made is taken again, and only while nothing that it depends on has changed."""

import pytest

from bigkernel.testing import ptx
from bigkernel.testing.ptx import compiler

SOURCE = '#include "value.h"\nextern "C" __global__ void NAME(int* x) { *x = VALUE; }\n'


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The arguments of each call of nvcc."""
    made, real = [], compiler.run_nvcc

    def run(arguments, who):
        made.append(arguments)
        real(arguments, who)

    monkeypatch.setattr(compiler, "run_nvcc", run)
    monkeypatch.setenv("BIGKERNEL_PTX_CACHE", str(tmp_path / "kept"))
    return made


@pytest.mark.parametrize("as_text", [False, True], ids=["file", "text"])
def test_nvcc_runs_only_where_something_changed(calls, tmp_path, as_text):
    folder = tmp_path / "with a blank"
    folder.mkdir()
    source, header = folder / "kernel.cu", folder / "value.h"
    source.write_text(SOURCE)
    header.write_text("#define VALUE 11\n")

    def compile(name="first"):
        flags = [f"-DNAME={name}", "-I", str(folder)]
        return ptx.compile(SOURCE if as_text else source, flags=flags)

    assert compile().kernels == compile().kernels == ["first"]
    assert len(calls) == 1
    assert compile("second").kernels == ["second"]
    assert len(calls) == 2
    header.write_text("#define VALUE 12\n")
    assert ", 12;" in compile().text
    assert len(calls) == 3
    if not as_text:
        source.write_text(SOURCE + "// longer\n")
        compile()
        assert len(calls) == 4
    header.unlink()
    with pytest.raises(RuntimeError, match=r"value\.h"):
        compile()
