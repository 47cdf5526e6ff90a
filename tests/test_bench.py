"""`bigkernel bench` and the measuring code.

Feature -> test: timing -> test_interleave_*, test_timing_*; ratios, shares, bars ->
test_result_*; every case at a small size: results agree, our row is native ->
test_case_is_checked_and_native, test_cases_of_overhead_*; a fallback fails -> test_a_fallback_*; a
wrong result fails -> test_a_wrong_result_*; absent peers -> test_absent_peers_*; the yardstick ->
test_yardstick_*; slow peers -> test_a_slow_peer_*; table, JSON, chart -> test_command_*;
bad usage -> test_bad_usage.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import bigkernel
from bigkernel import _library, precision, registry
from bigkernel.bench import (
    OPS,
    TABLES,
    Bar,
    Case,
    Plan,
    Result,
    Timing,
    cases_of,
    interleave,
    limits,
    report,
    run_case,
)
from bigkernel.bench import attention as attention_bench
from bigkernel.bench import augment as augment_bench
from bigkernel.bench import case as case_module
from bigkernel.bench import profile as profile_bench
from bigkernel.bench import train as train_bench
from bigkernel.bench import training as training_bench
from bigkernel.bench.case import LIMIT, OURS, REFERENCE, Alone, MemoryBar, TimeBar
from bigkernel.cli import main
from bigkernel.measure import QUICK

ONCE = Plan(share=1e-9, rounds=1, least=1, warmups=1, sample=1e-9, patience=0)
CASES = [(op, case) for op in OPS for case in cases_of(op, small=True)]
NATIVE = [op for op in OPS if "cpu" not in registry.find(op).absent]
NUMBERED = [f"{op}-{i}" for i, (op, _) in enumerate(CASES)]

needs_native = pytest.mark.skipif(_library.native is None, reason="the native library is not built")


def timings(**seconds: float) -> dict[str, Timing]:
    return {name: Timing((value,)) for name, value in seconds.items()}


def result(case: Case, times: dict[str, Timing], work: float = 1, limit_work: float = 1) -> Result:
    return Result(case, times, work, limit_work, "all of it", "attention: cpu", {})


def test_interleave_runs_in_turn_and_gives_each_its_share():
    order: list[str] = []

    def run(name: str, seconds: float):
        def call() -> float:
            order.append(name)
            return seconds

        return call

    runs = {"fast": run("fast", 1e-3), "slow": run("slow", 0.03)}
    plan = Plan(share=0.05, rounds=8, least=2, warmups=1, sample=1e-9, settle=0)
    times = interleave(runs, plan)
    assert len(times["fast"].samples) == 8
    assert len(times["slow"].samples) == 2
    measured = "".join(name[0] for name in order[2:])  # without the first call of each
    assert measured.count("s") == 2
    assert "ffff" in measured
    assert not measured.startswith("ss")
    assert not measured.endswith("ss")
    assert 1e-3 <= times["fast"].median < times["slow"].median


def test_the_first_call_is_no_sample():
    first = True

    def run() -> float:
        nonlocal first
        seconds = 0.5 if first else 0.3
        first = False
        return seconds

    plan = Plan(share=0.7, least=1, warmups=2, patience=1.0)
    assert interleave({"loads": run}, plan)["loads"].samples == (0.3, 0.3)


def test_a_first_call_that_loads_does_not_decide_how_often_a_function_is_called():
    seconds = iter([3.0])
    times = interleave({"loads": lambda: next(seconds, 0.01)}, Plan(share=0.1, sample=1e-3))
    assert times["loads"].samples == (0.01,) * 10


def test_interleave_repeats_what_is_too_short_for_the_clock():
    calls = 0

    def short() -> None:
        nonlocal calls
        calls += 1

    times = interleave({"short": short}, Plan(share=0.01, rounds=3, warmups=2, sample=1e-3))
    assert calls > 100
    assert times["short"].median < 1e-4


def test_interleave_settles_short_functions_before_each_sample():
    last = ""

    def run(name: str):
        def call() -> float:
            nonlocal last
            seconds = 1e-3 if last == name else 1e-2  # slower after another
            last = name
            return seconds

        return call

    plan = Plan(share=0.1, rounds=5, warmups=2, sample=1e-9)
    for settle, slowest in ((0.02, 8e-3), (0.0, math.inf)):
        times = interleave({"a": run("a"), "b": run("b")}, replace(plan, settle=settle))
        assert all(timing.median < slowest for timing in times.values())
        assert settle or all(timing.median > 8e-3 for timing in times.values())


def test_interleave_takes_the_time_that_a_run_reports():
    times = interleave({"own": lambda: 0.25}, Plan(share=1.0, rounds=5, warmups=1))
    assert set(times["own"].samples) == {0.25}


def test_timing_is_median_and_quartiles():
    timing = Timing((4.0, 1.0, 2.0, 3.0, 100.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert timing.spread == pytest.approx(2 / 3)
    assert Timing((2.0,)).spread == 0


def test_result_compares_with_peers_and_limit():
    bars = (Bar(2.0, "peer"), Bar(0.5, LIMIT), Bar(3.0, "absent"), Bar(0.6, LIMIT))
    case = Case("attention", "some case", (OURS, "peer", "absent"), lambda: None, bars)
    times = timings(**{OURS: 1.0, "peer": 1.9, LIMIT: 0.25})
    got = result(case, times, work=2.0, limit_work=1.0)
    assert got.ratio("peer") == pytest.approx(1.9)
    assert got.share == pytest.approx(0.5)
    assert [got.held(bar) for bar in bars] == [False, True, None, False]


def test_a_bar_of_memory_is_held_by_the_peaks():
    case = Case("train", "some", (OURS, "peer"), lambda: None)
    times = timings(**{OURS: 1.0, "peer": 2.0})
    peaks = {OURS: Alone(70, {}, []), "peer": Alone(100, {}, [])}
    got = replace(result(case, times), alone=peaks)
    assert MemoryBar(0.7, "peer").reached(got) == pytest.approx(0.7)
    assert [got.held(MemoryBar(most, "peer")) for most in (0.71, 0.69)] == [True, False]
    assert got.held(MemoryBar(0.7, "absent")) is None
    assert result(case, times).held(MemoryBar(0.7, "peer")) is None
    unknown = replace(got, alone={**peaks, OURS: Alone(None, {}, [])})
    assert unknown.held(MemoryBar(0.7, "peer")) is None
    assert report.as_dict(replace(got, case=replace(case, bars=(MemoryBar(0.5, "peer"),))))[
        "bars"
    ] == [
        {
            "bar": "<= 0.5x the memory of peer",
            "at_most": 0.5,
            "over": "peer",
            "reached": pytest.approx(0.7),
            "held": False,
        }
    ]


@needs_native
@pytest.mark.parametrize(
    ("op", "case"), CASES, ids=[f"{op}-{i}" for i, (op, _) in enumerate(CASES)]
)
def test_case_is_checked_and_native(op, case):
    """Every benchmarked case, small: our row calls the native op, and no PyTorch one of ours."""
    with case_module.strict():
        ready = case.build()
        assert set(ready.runs) | set(ready.skipped) == set(case.competitors)
        assert ready.check(ready.runs)
        sentence = case_module.native_backend(case, ready)
        assert sentence.startswith(f"{ready.op}: {'cpu' if op in NATIVE else 'torch'}")
        for name, native in ((OURS, True), (REFERENCE, False)) if op in NATIVE else ():
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                ready.runs[name]()
            called = {event.key for event in seen.key_averages()}
            for namespace, expected in (("bigkernel::", native), ("bigkernel_torch::", not native)):
                there = any(key.startswith(f"{namespace}{op}") for key in called)
                assert there == expected, f"{name}: {namespace}{op} called: {there}"
        if ready.limit is not None:
            ready.limit()


@needs_native
def test_cases_of_overhead_are_checked_and_native():
    for case in cases_of("overhead", small=True):
        with case_module.strict():
            ready = case.build()
            assert set(ready.runs) | set(ready.skipped) == set(case.competitors)
            assert ready.check(ready.runs), case.name
            assert case_module.native_backend(case, ready).startswith(f"{ready.op}: cpu")
        assert [bar.over for bar in case.bars] == list(case.competitors[1:])


@needs_native
def test_a_case_of_one_thread_is_measured_with_one():
    before = torch.get_num_threads()
    got = run_case(cases_of("overhead", small=True)[0], ONCE)
    assert ", 1 threads" in got.backend
    assert torch.get_num_threads() == before


def test_a_bar_of_time_is_held_by_the_times():
    bar = TimeBar(3.0, "peer")
    case = Case("overhead", "some", (OURS, "peer"), lambda: None, (bar, TimeBar(1.0, "absent")))
    for ours, held in ((2.9, True), (3.1, False)):
        got = result(case, timings(**{OURS: ours, "peer": 1.0}))
        assert bar.reached(got) == pytest.approx(ours)
        assert [got.held(one) for one in case.bars] == [held, None]
    assert report.as_dict(got)["bars"][0]["bar"] == "<= 3x the time of peer"


TRAININGS = [
    pytest.param(
        case,
        id=case.name,
        marks=[pytest.mark.slow] if case.name.endswith(("compiled", "65,536")) else [],
    )
    for case in cases_of("train", small=True)
]


@needs_native
@pytest.mark.parametrize("case", TRAININGS)
def test_trainers_agree_and_report_their_own_time(case, monkeypatch):
    monkeypatch.setattr(train_bench, "alone", lambda *case: None)
    got = run_case(case, ONCE)
    assert (set(got.timings) | set(got.skipped)) - {LIMIT} == set(case.competitors)
    assert got.case.items > 0
    assert "loss" in got.compared
    counted = case.name.startswith(("LLaMA 16.9M", "ViT-S/16")) and "packed" not in case.name
    assert (got.share is not None and 0 < got.share < 1) == counted


@needs_native
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_a_training_alone_says_its_memory_and_the_parts_of_a_step(monkeypatch):
    (case,) = (c for c in cases_of("train", small=True) if c.name == "LLaMA 16.9M, float32")
    measure = training_bench.alone(case.name, small=True)
    alone = measure(OURS)
    assert len(alone.losses) == train_bench.WARM + 1
    assert alone.seconds > 0
    assert alone.losses[0] == pytest.approx(5.5, abs=0.5)  # that of 256 tokens
    assert alone.peak > 2**20
    assert set(alone.parts) == set(training_bench.PARTS)
    assert all(seconds > 0 for seconds in alone.parts.values())
    monkeypatch.setattr(training_bench.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="fails in a process of its own"):
        measure(OURS)


@needs_native
def test_a_quick_training_is_what_its_own_process_tells(monkeypatch):
    """No run beside it: a model that is compiled would be compiled again."""
    (case,) = (c for c in cases_of("train", small=True) if c.name == "LLaMA 16.9M, float32")
    asked, losses = [], {name: [5.0, 4.0] for name in case.competitors}

    def alone(*given):
        def measure(name):
            asked.append(name)
            return Alone(2**20, {"forward": 0.1}, losses[name], 0.5 if name == OURS else 0.75)

        return measure

    def run(*given, **options):
        raise AssertionError("trained in this process")

    monkeypatch.setattr(train_bench, "alone", alone)
    for name in ("run_ours", "run_theirs"):
        monkeypatch.setattr(training_bench.Training, name, run)
    got = run_case(case, QUICK)
    assert sorted(asked) == sorted(case.competitors)
    assert got.ratio(train_bench.THEIRS) == 1.5
    assert got.timings[OURS].samples == (0.5,)
    assert got.alone[OURS].losses == [5.0, 4.0]
    assert got.share > 0
    losses[train_bench.THEIRS] = [5.0, 4.1]
    with pytest.raises(RuntimeError, match="do not agree"):
        run_case(case, QUICK)


@needs_native
@pytest.mark.parametrize("op", NATIVE)
def test_a_fallback_fails(op, monkeypatch):
    """Without its native kernel a case cannot be timed as ours."""
    for name in list(_library.kernels):
        if name[0].startswith(op):
            monkeypatch.setitem(_library.kernels, name, False)
    with pytest.raises(RuntimeError, match="native kernel"):
        run_case(cases_of(op, small=True)[0], ONCE)


@needs_native
def test_a_fallback_of_a_part_fails(monkeypatch):
    """A backward pass without kernel, behind a forward pass that has one."""
    monkeypatch.setattr(attention_bench, "ours", lambda spec: _head_dim_too_large)
    case = attention_bench._case(attention_bench.Spec(1, 1, 8, 8), 1.0, 0)
    with pytest.raises(RuntimeError, match="BIGKERNEL_STRICT"):
        run_case(case, ONCE)


def _head_dim_too_large(q, k, v):
    wide = [torch.nn.functional.pad(x, (0, 300)) for x in (q, k, v)]
    return bigkernel.ops.attention(*wide)[..., : q.shape[-1]]


@needs_native
def test_a_wrong_result_fails(monkeypatch):
    right = attention_bench.sdpa
    monkeypatch.setattr(attention_bench, "ours", lambda spec: lambda q, k, v: right(q, k, v) * 1.01)
    case = attention_bench._case(attention_bench.Spec(1, 1, 8, 8, dtype=torch.float32), 1.0, 0)
    with pytest.raises(RuntimeError, match="do not agree"):
        run_case(case, ONCE)


@needs_native
def test_absent_peers_are_skipped_aloud(monkeypatch, capsys):
    def absent(name: str):
        raise ImportError(f"No module named {name!r}")

    case = cases_of("augment", small=True)[1]
    monkeypatch.setattr(case_module.importlib, "import_module", absent)
    got = run_case(case, ONCE)
    assert set(got.skipped) == set(augment_bench.PEERS)
    report.show([got], report.console())
    out = capsys.readouterr().out
    for peer in augment_bench.PEERS:
        assert f"skipped: {peer}: No module named" in out
    assert "not measured" in out


@needs_native
def test_command_prints_and_writes(tmp_path: Path, monkeypatch, capsys):
    small = {op: cases_of(op, small=True)[:2] for op in ("attention", "adam")}
    monkeypatch.setattr("bigkernel.cli.bench.cases_of", small.__getitem__)
    threads = torch.get_num_threads()
    written, chart = tmp_path / "all.json", tmp_path / "all.png"
    options = ["--quick", "--threads", "1", "--json", str(written), "--plot", str(chart)]
    try:
        assert main(["bench", "attention", "adam", *options]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    for word in ("torch SDPA", "torch fused", "bigkernel-torch", "held", "slower than a peer", "x"):
        assert word in out, word
    content = json.loads(written.read_text())
    assert content["threads"] == 1
    assert content["isa"] in bigkernel.cpu_isas()
    assert content["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert content["command"] == "bigkernel bench attention adam --quick --threads 1"
    assert {"cpu", "cores", "commit", "time"} <= content.keys()
    assert [r["table"] for r in content["results"]] == ["attention"] * 2 + ["adam"] * 2
    first = content["results"][0]
    assert first["times"][OURS]["median"] > 0
    assert first["ratios"]["torch SDPA"] > 0
    assert first["share_of_limit"] > 0
    assert first["bars"][0]["held"] in (True, False)
    with Image.open(chart) as image:
        assert image.width > 300


@pytest.mark.parametrize(("speedup", "fastest"), [(0.4, torch.float32), (2.0, torch.bfloat16)])
def test_yardstick_is_the_fastest_product(speedup, fastest, monkeypatch):
    """A processor may have no product of 16-bit matrices, or a faster one."""
    monkeypatch.setattr(precision, "speedup", lambda device, dtype: speedup)
    product, work, name = limits.matrix_product(torch.bfloat16, 16)
    assert product().dtype == fastest
    assert work == 2 * 16**3
    assert ("faster here than in bfloat16" in name) == (fastest != torch.bfloat16)


@needs_native
def test_models_of_full_size_are_native():
    """What the small ones of the other tests cannot show; without training them."""
    large = [case for case in cases_of("train", small=False) if "16.9M" in case.name]
    assert len(large) == 6
    for case in large:
        with case_module.strict():
            sentence = case_module.native_backend(case, case.build())
        assert sentence.startswith("attention: cpu")


def test_a_slow_peer_runs_once_and_the_table_says_so(capsys):
    called = []
    plan = Plan(share=0.01, rounds=4, least=3, warmups=1, sample=1e-9, patience=0.03)

    def peer() -> float:
        called.append("peer")
        return 0.04

    runs = {OURS: lambda: 1e-3, "peer": peer}
    times = interleave(runs, plan)
    assert len(called) == len(times["peer"].samples) == 1
    assert len(times[OURS].samples) == 4
    case = Case("adam", "some case", (OURS, "peer"), lambda: None)
    report.show([result(case, times)], report.console())
    out = capsys.readouterr().out
    assert "(1 run)" in out
    assert "(4 runs)" in out


def test_losses_are_printed(capsys):
    case = Case("adam", "a lost case", (OURS, "peer"), lambda: None, (Bar(1.0, "peer"),))
    alone = {OURS: Alone(3 * 2**20, {"forward": 1.5}, [2.0, 1.25])}
    got = replace(result(case, timings(**{OURS: 2.0, "peer": 1.0})), alone=alone)
    report.show([got], report.console())
    out = capsys.readouterr().out
    for cell in ("forward", "1.5 s", "2.0000 to 1.2500", "3 MiB"):
        assert cell in out
    assert report.as_dict(got)["alone"][OURS]["peak"] == 3 * 2**20
    assert "slower than a peer: 1" in out
    assert "a lost case: 0.50x peer" in out
    assert "bars not held: 1 of 1" in out
    assert "NO, 0.50x" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["bench", "atention"],
            "There are: adam, attention, augment, bias_act, cross_entropy, glu, linear, "
            "linear_cross_entropy, newton_schulz, norm, rope, overhead, train",
        ),
        (["bench", "adam", "train", "--only", "GPT-5"], "no case has 'GPT-5' in its name"),
        (["bench", "adam", "--profile"], "--profile takes the steps of train apart"),
        (["bench", "adam", "--threads", "0"], "--threads must be 1 or more"),
        (["bench", "adam", "--json", "/nowhere/x.json"], "there is no folder /nowhere"),
    ],
)
def test_bad_usage(arguments, expected, capsys):
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_our_own_pytorch_backend_comes_first():
    """But for what a call costs, which only peers are compared in."""
    for table in TABLES:
        if table == "overhead":
            continue
        absent = {op.noun: op.absent for op in registry.every()}.get(table, {})
        first = (OURS,) if "cpu" in absent else (OURS, REFERENCE)  # composed, it is its own
        assert all(case.competitors[: len(first)] == first for case in cases_of(table))


def test_ops_are_sorted_into_groups_by_the_outermost_name():
    class Event:
        def __init__(self, name, around=None, micros=1.0, number=-1):
            self.name, self.cpu_parent = name, around
            self.self_cpu_time_total, self.sequence_nr = micros, number

    mark = profile_bench._MARK
    loss = Event(f"{mark}head and loss", micros=2)
    head = Event("aten::linear", loss, number=7)
    layer = Event("aten::linear", number=3)
    product = Event("aten::mm", layer, micros=10, number=3)
    engine = "autograd::engine::evaluate_function: MmBackward0"
    of_head, of_layer = Event(engine, number=7), Event(engine, number=3)
    events = [
        loss, head, Event("aten::mm", head, 20, 7), layer, product,
        of_head, Event("aten::mm", of_head, 40), of_layer, Event("aten::mm", of_layer, 80),
        Event("aten::pow", Event(f"{mark}norms", micros=0), 5), Event("aten::pow", micros=6),
        Event("Optimizer.step#AdamW.step", micros=3), Event("aten::what_is_this", micros=100),
        Event("bigkernel::linear_cross_entropy", micros=7), Event("bigkernel::linear", micros=9),
    ]  # fmt: skip
    found = {name: round(s * 1e6) for name, s in profile_bench.summed(events).items()}
    assert found == {
        "head and loss": 2 + 1 + 20 + 1 + 40 + 7,
        "products": 1 + 10 + 1 + 80 + 9,
        "norms": 5,
        "activations, rotations, sums": 6,
        "optimizer": 3,
    }


@needs_native
def test_a_step_is_taken_apart_op_by_op(capsys, tmp_path, monkeypatch):
    name = "LLaMA 16.9M, float32"
    (case,) = (c for c in cases_of("train", small=True) if c.name == name)
    monkeypatch.setattr("bigkernel.cli.bench.cases_of", lambda table: [case])
    right = training_bench.profiled
    monkeypatch.setattr(training_bench, "profiled", lambda case: right(case, small=True))
    written = tmp_path / "all.json"
    threads = torch.get_num_threads()
    try:
        assert main(["bench", "train", "--profile", "--threads", "1", "--json", str(written)]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    content = json.loads(written.read_text())
    sides = content["seconds_of_a_step"][name]
    assert set(sides) == {OURS, train_bench.THEIRS}
    assert content["command"] == "bigkernel bench train --threads 1 --profile"
    for parts in sides.values():
        assert list(parts) == list(profile_bench.NAMES)
        for group in ("products", "attention", "norms", "head and loss", "optimizer"):
            assert parts[group] > 0, group
            assert group in out
        assert parts[profile_bench.PYTHON] > 0  # and a few ops that no group has
