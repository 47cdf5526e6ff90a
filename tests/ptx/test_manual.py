"""The documentation's example, as it stands there."""

import re
from pathlib import Path

import pytest

from bigkernel.testing import ptx

README = Path(ptx.__file__).parent / "README.md"


def block(language):
    return re.search(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)[1]


def test_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("row_sum.cu").write_text(block("cuda"))
    exec(compile(block("python"), str(README), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["Traffic(sectors=1250, minimum=1250, bytes=40000)", "1.0"]


def test_example_without_barrier_raises_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("row_sum.cu").write_text(block("cuda").replace("__syncthreads();", ""))
    any_line = re.compile(r"PTX line \d+")  # compilers differ
    said = any_line.sub("PTX line", " ".join(block("text").split()))
    with pytest.raises(ptx.SharedRace) as caught:
        exec(compile(block("python"), str(README), "exec"), {})
    message = any_line.sub("PTX line", f"SharedRace: {caught.value}")
    start, end = said.split("`ld.shared.f32 ...`")
    assert message.startswith(start)
    assert message.endswith(end)


def test_every_exception_and_counter_is_documented():
    text = README.read_text()
    for name in ptx.__all__:
        if isinstance(getattr(ptx, name), type) and issubclass(getattr(ptx, name), ptx.Finding):
            assert f"`{name}`" in text or name == "Finding", name
    for name in ptx.Counters.__dataclass_fields__:
        assert f"`{name}" in text, name
