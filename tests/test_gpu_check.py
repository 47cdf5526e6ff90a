"""`make gpu-check` without a GPU: all of it but CUDA itself, with stubs of device and commands."""

import json
import os
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest
import torch

from bigkernel.bench import gpu, gpu_attention
from bigkernel.bench.case import LIMIT, OURS, REFERENCE, Bar
from tools import gpu_check, gpu_worker

ROOT = Path(gpu_check.__file__).resolve().parents[1]
MACHINE = {"gpu": "NVIDIA Test 100", "torch": "0", "library": "CUDA 13.0", "lacks": None}
TABLE = {"case": "x", "unit": "B", "skipped": {}, "bars": [], "results": {}}


def report(folder) -> gpu_check.Report:
    return gpu_check.Report(folder, machine=dict(MACHINE))


# Times


class Device:
    """A GPU with a queue, and a host that takes 40 us for a launch; a clock of the tables."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.flushed = 0

    def launch(self, kernel: float, launching: float = 40e-6) -> None:
        self.host += launching
        self.device = max(self.device, self.host) + kernel

    def prepare(self, seconds: float) -> None:
        self.flushed += 1
        self.launch(60e-6, 5e-6)
        self.launch(seconds, 5e-6)

    def start(self) -> None:
        self.host += 2e-6
        self.begin = max(self.device, self.host)

    def stop(self) -> float:
        self.host += 2e-6
        self.wait()
        return self.device - self.begin

    def wait(self) -> None:
        self.host = self.device = max(self.host, self.device)


@pytest.fixture
def device(monkeypatch):
    made = Device()
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: made.host)
    return made


def test_kernel_time_has_no_launches_in_it_and_eager_time_has_all(device):
    """Five kernels of 10 us, which the host takes 200 us to launch."""

    def run():
        for _ in range(5):
            device.launch(10e-6)

    assert gpu.launch_time(run, device) == pytest.approx(200e-6)
    launches = gpu.launch_time(run, device)
    assert gpu.timed(run, device, launches)() == pytest.approx(50e-6, rel=1e-3)
    assert gpu.timed(run, device, 0.0)() > 100e-6  # what the spin is for
    assert gpu.eager_time(run, device, 50e-6) == pytest.approx(200e-6, rel=0.02)
    row = gpu.measure("x", {OURS: run, LIMIT: run}, {}, device, ("B", 1.0, 1.0))
    assert row.timings[OURS].median == pytest.approx(50e-6, rel=1e-3)
    assert row.eager[OURS] == pytest.approx(200e-6, rel=0.02)
    assert device.flushed > 2 * len(row.timings[OURS].samples) >= 2 * gpu.PLAN.rounds


def test_what_is_slow_and_only_for_the_record_is_repeated_less(device):
    calls = dict.fromkeys((OURS, REFERENCE, gpu.MATH, "peer"), 0)

    def run(name):
        calls[name] += 1
        device.launch(1e-3)

    runs = {name: lambda name=name: run(name) for name in calls}
    row = gpu.measure("x", runs, {}, device, ("B", 1.0, 1.0))
    assert list(row.timings) == [REFERENCE, OURS, gpu.MATH, "peer"]
    samples = {name: len(timing.samples) for name, timing in row.timings.items()}
    assert samples == {OURS: 50, "peer": 50, REFERENCE: 5, gpu.MATH: 5}
    assert calls[REFERENCE] < 20 < calls[OURS]


def test_a_peer_that_cannot_run_is_named_and_ours_has_to(device):
    def fail():
        raise RuntimeError("no such head dim")

    skipped = {}
    runs = {"peer": fail, OURS: lambda: device.launch(1e-3)}
    bars = (Bar(1.0, "peer"), Bar(0.5, LIMIT))
    row = gpu.measure("x", runs, skipped, device, ("B", 2.0, 1.0), bars)
    assert list(row.timings) == [OURS]
    assert row.skipped == {"peer": "RuntimeError: no such head dim"}
    assert row.rate(OURS) == pytest.approx(2000, rel=0.01)
    assert [bar["held"] for bar in row.as_dict()["bars"]] == [None, None]
    with pytest.raises(RuntimeError, match="no such head dim"):
        gpu.measure("x", {OURS: fail}, skipped, device, ("B", 2.0, 1.0))


def test_bars_are_judged_against_what_they_are_over():
    timings = {name: gpu.Timing((t, t)) for name, t in ((OURS, 2.0), ("peer", 3.0), (LIMIT, 1.0))}
    bars = (Bar(1.2, "peer"), Bar(1.6, "peer"), Bar(0.5, LIMIT), Bar(1.0, "flash-attn"))
    row = gpu.Row("x", timings, "B", 4.0, 2.0, {}, {}, bars).as_dict()
    assert [bar["held"] for bar in row["bars"]] == [True, False, True, None]
    assert [gpu_check.bar_line(bar) for bar in row["bars"]] == [
        ">= 1.2x peer: 1.50x",
        ">= 1.6x peer: 1.50x, NOT HELD",
        ">= 50% of the limit: 100%",
        ">= 1x flash-attn: did not run",
    ]


def test_every_row_has_a_bar_and_each_kind_of_attention_a_row():
    specs = gpu_attention.specs()
    assert all(gpu_attention.bars(spec) for spec in specs)
    assert len({spec.name for spec in specs}) == len(specs)
    kinds = {
        "GQA": lambda s: s.kv_heads and not s.queries,
        "varlen": lambda s: s.documents,
        "window": lambda s: s.window,
        "dropout": lambda s: s.dropout,
        "D256": lambda s: s.dim == 256,
        "fp32": lambda s: s.dtype == torch.float32,
        "decode": lambda s: s.queries == 1,
    }
    for name, of in kinds.items():
        there = {spec.backward for spec in specs if of(spec)}
        assert there == ({False} if name == "decode" else {False, True}), name


@pytest.mark.parametrize("op", gpu.OPS)
def test_tables_on_the_cpu(op, monkeypatch):
    """The very functions that measure on a GPU, small, with every row checked against float64."""
    monkeypatch.setattr(gpu, "PLAN", gpu.Plan(share=0.01, rounds=3, least=2, warmups=1, sample=0))
    rows = [measure().as_dict() for _, measure in gpu.of_op(op).cases("cpu", gpu.HostClock(), True)]
    assert len(rows) == (8 if op == "attention" else 2)
    for row in rows:
        assert list(row["results"])[:2] == [REFERENCE, OURS]
        assert LIMIT in row["results"]
        assert row["bars"]
        assert all(result["eager_s"] > 0 for result in row["results"].values())
        text = "\n".join(gpu_check.row_lines(row))
        assert "TFLOP/s" in text or "images/s" in text or "GB/s" in text
    if op == "attention":
        peers = {*gpu_attention.BACKENDS, gpu_attention.FLASH_ATTN}
        assert all(peers <= {*row["results"], *row["skipped"]} for row in rows if "2 doc" not in
                   row["case"])  # fmt: skip


def test_a_wrong_result_is_no_row(monkeypatch):
    ours = gpu_attention.Attention.ours
    monkeypatch.setattr(gpu_attention.Attention, "ours", lambda self: [x * 1.1 for x in ours(self)])
    for name, measure in gpu_attention.cases("cpu", gpu.HostClock(), True):
        if "dropout" not in name:
            with pytest.raises(AssertionError, match="exceeds"):
                measure()


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


# Processes


def program(text: str) -> tuple[str, ...]:
    return sys.executable, "-c", textwrap.dedent(text)


def stub(folder, *workers: str, **options):
    """A check whose workers are these programs, one after the other; each is told its sections."""
    rest, given = list(workers), []

    def command(words, **environment):
        given.append([*words[4:]])
        return gpu_check.Process((*program(PRELUDE + textwrap.dedent(rest.pop(0))), *words[2:]))

    made = gpu_check.Check(report(folder), [], command=command, **options)
    return made, given


PRELUDE = """
import json, os, sys, time
def tell(**event): print("@gpu-check " + json.dumps(event), flush=True)
def row(number, name):
    tell(event="case", number=number, name=name)
    tell(event="row", row={"case": name, "unit": "B", "skipped": {}, "bars": [], "results": {}})
"""


def found(check) -> dict[str, tuple[str, str, list]]:
    """Status, reason and rows by section, as they were written."""
    written = json.loads(check.report.path.read_text())["sections"]
    return {
        s["name"]: (
            s["status"],
            s["reason"],
            [row["case"] for row in s["data"] or [] if isinstance(row, dict)],
        )
        for s in written
    }


def test_what_dies_or_hangs_is_ended_and_the_next_row_is_taken(tmp_path):
    """The first worker dies in row 1, the second hangs in row 2 with a child, the third ends."""
    check, given = stub(
        tmp_path,
        """
        tell(event="section", name="adam")
        tell(event="clocks", when="before", clocks="345 MHz")
        row(0, "a")
        tell(event="case", number=1, name="b")
        print("CUDA error: an illegal memory access", flush=True)
        os._exit(134)
        """,
        """
        tell(event="section", name="adam")
        tell(event="clocks", when="before", clocks="1980 MHz")
        tell(event="case", number=2, name="c")
        if os.fork() == 0:
            time.sleep(1000)
        time.sleep(1000)
        """,
        """
        tell(event="section", name="adam")
        row(3, "d")
        tell(event="failed", case="e", reason="not accurate")
        tell(event="clocks", when="after", clocks="1980 MHz")
        tell(event="end")
        tell(event="section", name="bias_act")
        row(0, "f")
        tell(event="left", rows=4)
        tell(event="end")
        """,
        stall=1.5,
    )
    check.work(["adam", "bias_act"])
    sections = found(check)
    status, reason, rows = sections["adam"]
    assert (status, rows) == ("failed", ["a", "d"])
    assert "b: the worker ended with 134: CUDA error: an illegal memory access" in reason
    assert "c: ended after 2 s without a word" in reason
    assert "e: not accurate" in reason
    assert sections["bias_act"] == ("cut", "its time was up with 4 rows to go", ["f"])
    begins = [[section.rsplit(":", 1)[0] for section in sections] for sections in given]
    assert begins == [["adam:0", "bias_act:0"], ["adam:2", "bias_act:0"], ["adam:3", "bias_act:0"]]
    (adam, _) = check.report.sections
    assert adam.clocks == {"before": "345 MHz", "after": "1980 MHz"}
    assert check.report.status == 1


def test_rows_are_on_disk_while_the_next_is_measured(tmp_path):
    check, _ = stub(
        tmp_path,
        """
        tell(event="section", name="adam")
        row(0, "a")
        tell(event="case", number=1, name="b")
        time.sleep(0.5)
        written = json.load(open("FOLDER/gpu_check_nvidia_test_100.json"))
        tell(event="row", row=written["sections"][0]["data"][0] | {"case": "seen"})
        tell(event="end")
        """.replace("FOLDER", str(tmp_path)),
    )
    check.work(["adam"])
    assert found(check)["adam"] == ("ok", "", ["a", "seen"])
    assert "| adam | ok |" in check.report.path.with_suffix(".md").read_text()


def test_a_section_that_hangs_leaves_the_others_and_the_budget_ends(tmp_path):
    hang = 'tell(event="section", name="determinism"); time.sleep(1000)'
    last = 'tell(event="section", name="graph"); tell(event="result", data="the same bits"); '
    check, given = stub(tmp_path, hang, last + 'tell(event="end")', stall=1)
    check.work(["determinism", "graph"])
    assert found(check)["determinism"][:2] == ("failed", "ended after 1 s without a word")
    assert [s.status for s in check.report.sections] == ["failed", "ok"]
    assert [sections[0].split(":")[0] for sections in given] == ["determinism", "graph"]
    late, _ = stub(tmp_path, budget=0.0)
    late.names = ["adam", "graph", "tests", "memcheck"]
    late.report.machine = dict(MACHINE)
    late.attempt = lambda todo: None
    late.device = gpu_check.STUB
    assert late.all() == 0
    assert {s.reason for s in late.report.sections} == {"the budget of 0 s is spent"}
    assert [s.name for s in late.report.sections] == late.names


def test_limits_are_shares_of_the_budget_and_never_more_than_is_left(tmp_path):
    check, _ = stub(tmp_path, budget=240.0)
    assert check.limit("attention") == pytest.approx(gpu_check.LIMITS["attention"] / 2, abs=1)
    check.end = time.monotonic() + 7
    assert check.limit("attention") == pytest.approx(7, abs=0.5)
    work = sum(gpu_check.LIMITS[name] for name in gpu_check.NAMES if name not in ("build",))
    assert work <= 1.2 * gpu_check.BUDGET


@pytest.mark.parametrize(
    ("event", "error", "said"),
    [
        ({"event": "result", "data": {"gpu": "none"}}, gpu_check.Stop, "torch sees no CUDA device"),
        ({"event": "failed", "reason": "no torch"}, gpu_check.Stop, "no torch"),
        (
            {"event": "result", "data": {"gpu": "T4", "lacks": "no kernel for sm_75"}},
            gpu_check.Unfit,
            "no kernel for sm_75",
        ),
    ],
)
def test_a_machine_that_will_not_do_is_said(tmp_path, event, error, said):
    check, _ = stub(tmp_path, f'tell(event="section", name="facts"); tell(**{event!r})')
    check.report.machine = {}
    with pytest.raises(error, match=said):
        check.work(["adam"])


def test_a_worker_that_cannot_start_fails_its_sections(tmp_path):
    check, _ = stub(tmp_path, "raise SystemExit('no module named torch')")
    check.work(["adam", "graph"])
    for status, reason, _ in found(check).values():
        assert status == "failed"
        assert "the worker ended with 1: no module named torch" in reason


def test_the_callers_pythonpath_is_kept(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    process = gpu_check.Process(program("import os; print(os.environ['PYTHONPATH'])"))
    assert process.line(time.monotonic() + 30) == f"{ROOT}{os.pathsep}/elsewhere"
    assert process.line(time.monotonic() + 30) is None
    assert process.end() == 0
    monkeypatch.delenv("PYTHONPATH")
    process = gpu_check.Process(program("import os; print(os.environ['PYTHONPATH'])"))
    assert process.line(time.monotonic() + 30) == str(ROOT)
    makefile = (ROOT / "Makefile").read_text()
    assert "PYTHONPATH" not in makefile.split("\ngpu-check:")[1].split("\n\n")[0]


def test_a_library_that_was_carried_is_used_as_it_is(tmp_path, monkeypatch):
    """Without object files it was built elsewhere, and what is there may not be able to."""
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "LIBRARY", tmp_path / "lib.so")
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/bin/{name}")
    assert gpu_check.build_wanted()
    (tmp_path / "lib.so").touch()
    assert not gpu_check.build_wanted()
    objects = tmp_path / "build" / "temp.linux" / "csrc" / "adam"
    objects.mkdir(parents=True)
    (objects / "cuda.o").touch()
    assert gpu_check.build_wanted()  # which compiles only what has changed
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert not gpu_check.build_wanted()


def test_one_that_does_not_fit_is_built_if_there_is_nvcc(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "build_wanted", lambda: False)
    said = {"gpu": "T4", "lacks": "there is no CUDA kernel for sm_75"}
    unfit = f'tell(event="section", name="facts"); tell(event="result", data={said!r})'
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    check, _ = stub(tmp_path, unfit)
    check.report.machine, check.names = {}, ["adam"]
    assert check.all() == 1
    assert check.report.sections[0].reason == "there is no CUDA kernel for sm_75"
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/bin/{name}")
    check, _ = stub(tmp_path, unfit, 'print("bigkernel: no"); sys.exit(1)')
    check.report.machine, check.names = {}, ["adam"]
    assert check.all() == 1
    assert [(s.name, s.status) for s in check.report.sections] == [
        ("build", "failed"),
        ("library", "failed"),
    ]
    fits = f"""
    tell(event="section", name="facts")
    tell(event="result", data={MACHINE!r})
    tell(event="end")
    tell(event="section", name="graph")
    tell(event="result", data="the same bits")
    tell(event="end")
    """
    for wanted in (False, True):
        monkeypatch.setattr(gpu_check, "build_wanted", lambda wanted=wanted: wanted)
        check, given = stub(tmp_path, unfit, 'print("bigkernel: built")', fits)
        check.report.machine, check.names = {}, ["graph"]
        assert check.all() == 0
        sections = {s.name: (s.status, s.data) for s in check.report.sections}
        assert sections == {"build": ("ok", "bigkernel: built"), "graph": ("ok", "the same bits")}
        assert given[0] == (["facts"] if wanted else ["facts", "graph:0:15"])
        assert given[2] == ["facts", "graph:0:15"]
        assert check.report.machine == MACHINE


# pytest and compute-sanitizer


def run_of(tmp_path, method, text, monkeypatch, *arguments, **options):
    """What a section makes of a program's output."""
    check, _ = stub(tmp_path, text, **options)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/bin/{name}")
    getattr(check, method)(*arguments)
    (section,) = check.report.sections
    return section.status, section.data, section.reason


PYTEST = """
print("[gw3] [ 33%] PASSED tests/ops/test_adam.py::test_a[x y] ")
print("tests/ops/test_adam.py::test_b PASSED   [ 66%]")
print("[gw0] [100%] SKIPPED tests/ops/test_adam.py::test_c ")
"""
MISSING = "print(\"E   ModuleNotFoundError: No module named 'torchvision'\")"
FAILED = 'print("[gw0] [ 99%] FAILED tests/ops/test_adam.py::test_d ")'


@pytest.mark.parametrize(
    ("text", "status", "data", "reason"),
    [
        (PYTEST, "ok", "2 passed, 1 skipped", ""),
        (PYTEST + FAILED, "failed", "1 failed, 2 passed, 1 skipped", "test_adam.py::test_d"),
        (PYTEST + MISSING + "\nsys.exit(1)", "ok", "2 passed, 1 skipped",
         "not installed: torchvision"),
        (PYTEST + "sys.exit(3)", "failed", "2 passed, 1 skipped", ""),
        ("sys.exit(5)", "skipped", None, "no test here needs a GPU"),
        ("sys.exit('No module named pytest')", "skipped", None, "pytest is not installed"),
        (PYTEST + "sys.stdout.flush(); time.sleep(1000)", "failed", "2 passed, 1 skipped",
         "without a word"),
    ],
)  # fmt: skip
def test_the_tests_are_counted_as_they_end(tmp_path, monkeypatch, text, status, data, reason):
    monkeypatch.setattr(gpu_check, "START", 1.0)
    found = run_of(tmp_path, "tests", text, monkeypatch, stall=1.0)
    assert found[:2] == (status, data)
    assert reason in found[2]


@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [
        ("print('7 passed in 9 s')", "ok", "7 passed in 9 s"),
        ("print('========= Error: Device not supported. x'); sys.exit(1)", "skipped",
         "compute-sanitizer: Error: Device not supported. x"),
        ("print('SKIPPED [7] x.py: no CUDA device'); print('7 skipped')", "ok", "7 skipped"),
        ("print('========= ERROR SUMMARY: 2 errors'); sys.exit(9)", "failed", "2 errors"),
    ],
)  # fmt: skip
def test_a_sanitizer_that_refuses_the_device_is_skipped(
    tmp_path, monkeypatch, text, status, reason
):
    found = run_of(tmp_path, "sanitize", text, monkeypatch, "memcheck")
    assert found[0] == status
    assert reason in found[2]


def test_without_a_sanitizer(tmp_path, monkeypatch):
    check, _ = stub(tmp_path)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert check.sanitize("racecheck").reason == "compute-sanitizer is not on the path"


def test_the_sanitized_tests_are_there_and_need_a_gpu():
    """A name that has changed would leave nothing to sanitize."""
    pytest.importorskip("torchvision")
    words = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only")
    listed = subprocess.run(
        [*words, "-p", "no:cacheprovider", *gpu_check.SANITIZED],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert [line for line in listed.splitlines() if "::" in line] == [*gpu_check.SANITIZED]
    files = {f"tests/ops/test_{op}.py" for op in gpu.OPS}
    assert len(files) > 2
    assert files < {*gpu_check.tests()}
    assert files <= {name.split("::")[0] for name in gpu_check.SANITIZED}
    assert {*gpu_check.TABLES} == {*gpu.OPS}


# The tool


def test_options(capsys):
    assert gpu_check.chosen("tests, adam") == ["adam", "tests"]
    for arguments, said in (
        (["--only", "adan"], "must be of attention, adam"),
        (["--budget", "soon"], "must be a number of seconds, at least 1, got 'soon'"),
    ):
        with pytest.raises(SystemExit):
            gpu_check.main(arguments)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        gpu_check.main(["--help"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("--budget SECONDS", "--only NAMES", "--dry-run", "480"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_2(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "build_wanted", lambda: False)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_check.log"]


def test_a_dry_run_with_a_budget(tmp_path):
    """The tool itself and its worker, on the stub device, where $OUT says."""
    words = ("--dry-run", "--budget", "6000", "--only", "adam,graph")
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py", *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OUT": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {
        "gpu_check_stub_part.json",
        "gpu_check_stub_part.md",
        "gpu_check.log",
    }
    written = json.loads((tmp_path / "gpu_check_stub_part.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert {"flash_attn", "apex", "nvidia-smi", "python"} <= set(written["machine"])
    sections = {s["name"]: s for s in written["sections"]}
    assert {s["status"] for s in sections.values()} == {"ok"}
    assert len(sections["adam"]["data"]) == 2
    assert {"before", "after"} == {*sections["adam"]["clocks"]}
    assert "the same bits" in sections["graph"]["data"]


def test_a_broken_device_ends_the_worker(monkeypatch, capsys):
    def cases(device, clock, small):
        def fail():
            raise RuntimeError("CUDA error")

        yield "first", fail
        yield "second", fail

    monkeypatch.setattr(gpu, "of_op", lambda noun: types.SimpleNamespace(cases=cases))
    monkeypatch.setattr(gpu_worker, "alive", lambda device: False)
    assert not gpu_worker.table("adam", 1, 60.0, "cpu", gpu.HostClock())
    events = [gpu_check.event_of(line) for line in capsys.readouterr().out.splitlines()]
    told = [event for event in events if event and event["event"] in ("case", "failed", "end")]
    assert [event["event"] for event in told] == ["case", "failed"]
    assert told[1]["case"] == "second"
