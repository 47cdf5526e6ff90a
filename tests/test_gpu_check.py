"""`make gpu-check` without a GPU: all of it but CUDA itself, on the CPU and with faked commands."""

import json
import sys

import pytest
import torch

from bigkernel.bench import gpu, gpu_attention
from bigkernel.bench.case import OURS, REFERENCE
from tools import gpu_check

MACHINE = {"gpu": "NVIDIA Test 100", "torch": "0"}


class Clock(gpu.HostClock):
    """Counts, and takes what it is told instead of time."""

    flushed = 0

    def flush(self) -> None:
        self.flushed += 1

    def stop(self) -> float:
        return 1e-3 + 1e-6 * (self.flushed % 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_2(capsys):
    assert gpu_check.main() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "torch sees no CUDA device" in said


def test_all_sections_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PLAN", gpu.Plan(share=0.01, rounds=12, least=2, warmups=1, sample=0))
    monkeypatch.setattr(gpu.measure, "__defaults__", (gpu.PLAN,))
    report, clock = gpu_check.Report(dict(MACHINE)), Clock()
    gpu_check.check(report, gpu, "cpu", clock, lambda run: run, small=True)
    assert [(s.name, s.status, s.reason) for s in report.sections if s.status != "ok"] == []
    assert report.status == 0
    assert clock.flushed > 100
    path = report.write(tmp_path)
    assert path.name == "gpu_check_nvidia_test_100.json"
    sections = {s["name"]: s["data"] for s in json.loads(path.read_text())["sections"]}
    assert len(sections["benchmark attention"]) == 4
    for name in ("adam", "augment", "bias_act"):
        assert len(sections[f"benchmark {name}"]) == 2
    for name in ("attention", "adam", "augment", "bias_act"):
        for row in sections[f"benchmark {name}"]:
            assert list(row["results"])[:2] == [REFERENCE, OURS]
            assert "limit" in row["results"]
            for result in row["results"].values():
                assert 1e-3 <= result["median_s"] <= 1.007e-3
                assert result["rounds"] == 12 or result["rounds"] >= 2
    attention = sections["benchmark attention"][0]
    assert {"SDPA math", "SDPA flash"} <= {*attention["results"], *attention["skipped"]}
    assert "flash-attn" in attention["skipped"] or "flash-attn" in attention["results"]
    text = path.with_suffix(".md").read_text()
    assert "| benchmark adam | ok |" in text
    assert "TFLOP/s" in text
    assert "images/s" in text


def test_a_failing_section_does_not_stop_the_others():
    report = gpu_check.Report(dict(MACHINE))

    def skip():
        raise gpu_check.Skip("not here")

    def fail():
        raise RuntimeError("broken | badly")

    for name, work in (("a", fail), ("b", skip), ("c", lambda: "fine")):
        report.run(name, work)
    assert [s.status for s in report.sections] == ["failed", "skipped", "ok"]
    assert report.status == 1
    text = gpu_check.markdown(report)
    assert "| a | failed |" in text
    assert "broken / badly" in text
    assert "not here" in text


def test_a_case_that_fails_leaves_the_other_rows():
    timing = gpu.Timing((1.0, 1.0))
    row = gpu.Row("x", {OURS: timing}, "B", 1.0, 1.0, {"peer": "why"})

    def fail():
        raise RuntimeError("out of memory")

    report, cases = gpu_check.Report(dict(MACHINE)), [("large", fail), ("x", lambda: row)]
    section = report.run("benchmark x", lambda: gpu_check.table(cases))
    assert section.status == "failed"
    assert section.reason == "TableError: large: RuntimeError: out of memory"
    assert section.data == [row.as_dict()]
    assert "skipped: peer: why" in gpu_check.markdown(report)


def test_a_peer_that_cannot_run_is_named_and_ours_has_to():
    def fail():
        raise RuntimeError("no such head dim")

    skipped = {}
    plan = gpu.Plan(share=0.01, rounds=3, least=2, warmups=1, sample=0)
    runs = {"peer": fail, OURS: lambda: None}
    row = gpu.measure("x", runs, skipped, Clock(), ("B", 2.0, 1.0), plan)
    assert list(row.timings) == [OURS]
    assert row.skipped == {"peer": "RuntimeError: no such head dim"}
    assert row.rate(OURS) == pytest.approx(2000, rel=0.01)
    with pytest.raises(RuntimeError, match="no such head dim"):
        gpu.measure("x", {OURS: fail}, skipped, Clock(), ("B", 2.0, 1.0), plan)


def test_two_runs_that_differ_are_found(monkeypatch):
    draws = iter(range(100))
    monkeypatch.setattr(
        gpu_attention.Attention, "ours", lambda self: [torch.tensor(float(next(draws)))]
    )
    with pytest.raises(AssertionError, match="attention: run 1 differs"):
        gpu.deterministic("cpu", 3)


def test_a_graph_that_replays_something_else_is_found():
    with pytest.raises(AssertionError, match="differs when it is replayed"):
        gpu.optimizer_in_graph("cpu", lambda run: lambda: None)


def test_commands(monkeypatch):
    assert gpu_check.command("echo", "hello").strip() == "hello"
    with pytest.raises(RuntimeError, match="exited with 3"):
        gpu_check.command("sh", "-c", "exit 3")

    def says(text):
        def run(*words, **environment):
            if text.startswith("ok"):
                return text
            raise RuntimeError(text)

        return run

    assert gpu_check.run_tests("tests/ops", says("ok\n5 passed in 3 s\n")) == "5 passed in 3 s"
    missing = "pytest exited with 2: E ModuleNotFoundError: No module named 'torchvision'"
    with pytest.raises(gpu_check.Skip, match="torchvision is not installed"):
        gpu_check.run_tests("tests/ops", says(missing))
    with pytest.raises(gpu_check.Skip, match="no test here needs a GPU"):
        gpu_check.run_tests("tests/ops", says("pytest exited with 5:"))
    with pytest.raises(RuntimeError, match="exited with 1"):
        gpu_check.run_tests("tests/ops", says("pytest exited with 1: 3 failed"))
    built = gpu_check.build(says("ok\nbigkernel: building for CPU and CUDA\nnoise"))
    assert built == "bigkernel: building for CPU and CUDA"
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    with pytest.raises(gpu_check.Skip, match="compute-sanitizer is not on the path"):
        gpu_check.sanitizer("memcheck")
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: "/bin/true")
    assert gpu_check.sanitizer("racecheck", says("ok\n1 passed")) == "1 passed"


def test_the_sanitized_tests_are_there_and_need_a_gpu():
    """A name that has changed would leave nothing to sanitize."""
    pytest.importorskip("torchvision")
    words = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only")
    listed = gpu_check.command(*words, "-p", "no:cacheprovider", *gpu_check.SANITIZED)
    assert [line for line in listed.splitlines() if "::" in line] == [*gpu_check.SANITIZED]
    files = {f"tests/ops/test_{op}.py" for op in gpu.OPS}
    assert len(files) > 2
    assert files < {*gpu_check.TESTS}
    assert files <= {name.split("::")[0] for name in gpu_check.SANITIZED}


def test_machine_facts():
    facts = gpu_check.machine()
    assert facts["torch"] == torch.__version__
    assert {"flash_attn", "apex", "nvidia-smi", "python"} <= set(facts)
