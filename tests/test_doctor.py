"""`bigkernel doctor`, on installations that are sound and on such as are not, by stand-ins.

Feature -> test: every op, under every instruction set -> test_every_op_is_checked_*; wrong numbers,
forward and backward -> test_wrong_numbers_*; no library -> test_without_the_library_*; too slow,
and kinds of machines that are not on record -> test_*_on_record; a GPU -> test_a_gpu_*; the tables
on other devices -> test_tables_*.
"""

import json
from pathlib import Path

import pytest
import torch

import bigkernel
from bigkernel import _library, registry, tuning
from bigkernel.bench import cases_of, doctor
from bigkernel.bench import glu as glu_bench
from bigkernel.bench.case import without_peers
from bigkernel.cli import main

ROOT = Path(__file__).resolve().parent.parent
needs_native = pytest.mark.skipif(_library.native is None, reason="the native library is not built")
OPS = [op.noun for op in registry.every() if not op.noun.startswith("test_only")]


@pytest.fixture
def few(monkeypatch):
    """The first case of each table and the last, and a machine as fast as the one on record."""
    right = doctor.cases_of
    monkeypatch.setattr(doctor, "cases_of", lambda *given: right(*given)[:: len(right(*given)) - 1])
    as_fast_as(monkeypatch, 1.0)


def as_fast_as(monkeypatch, *shares: float) -> None:
    """Each measurement gives the next of these shares of what is on record, then the last again."""
    left = list(shares)

    def measure(wanted, plan):
        share = left.pop(0) if len(left) > 1 else left[0]
        ((name, _, words),) = wanted
        ratio = next(of[name, words] for of in doctor.RATIOS.values() if (name, words) in of)
        return {wanted[0]: tuning.Figures(1.0, share * ratio, False)}

    monkeypatch.setattr(tuning, "measure", measure)


def only(monkeypatch, *ops: str) -> None:
    """Check the numbers of these ops and nothing else."""
    right = doctor.checks()
    kept = [check for check in right if check.name.removesuffix(" on cpu") in ops]
    monkeypatch.setattr(doctor, "checks", lambda: kept)


def lines(capsys) -> tuple[dict[str, tuple[str, str]], str]:
    """Name of a check -> (mark, what is told); and what stands on stderr."""
    out, err = capsys.readouterr()
    found = {}
    for line in out.splitlines():
        name, mark, told = (part.strip() for part in line.split("  ") if part.strip())
        found[name] = mark, told
    return found, err


@needs_native
def test_every_op_is_checked_under_every_instruction_set(few, capsys, one_thread):
    assert main(["doctor"]) == 0
    found, err = lines(capsys)
    assert err == ""
    assert {name.removesuffix(" on cpu") for name in found if name.endswith(" on cpu")} >= {*OPS}
    assert all(mark in ("ok", "-") for mark, _ in found.values())
    assert bigkernel.__version__ in found["native library"][1]
    for op in map(registry.find, OPS):
        under = "" if "cpu" in op.absent else f" under {', '.join(bigkernel.cpu_isas())}"
        told = f"2 cases within twice PyTorch's error{under}"
        assert found[f"{op.noun} on cpu"] == ("ok", told)


@pytest.mark.slow
@needs_native
def test_this_installation_is_sound(capsys):
    """All of it; the speed, which depends on what else runs, is not held."""
    main(["doctor"])
    found, _ = lines(capsys)
    wrong = [name for name, (mark, _) in found.items() if mark == "FAILED"]
    assert [name for name in wrong if not name.startswith("speed")] == []


@needs_native
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_wrong_numbers_are_named_with_set_and_case(way, few, capsys, monkeypatch, one_thread):
    """A kernel that is 1% off, of one op and under one instruction set."""
    right, broken = glu_bench.glu, bigkernel.cpu_isas()[-1]

    def wrong(*given):
        out = right(*given)
        if _library.native.cpu_isa() != broken:
            return out
        return 1.01 * out if way == "forward" else out + 0.01 * (out - out.detach())

    monkeypatch.setattr(glu_bench, "glu", wrong)
    only(monkeypatch, "glu", "rope")
    assert main(["doctor"]) == 1
    found, err = lines(capsys)
    assert found["rope on cpu"][0] == "ok"
    mark, told = found["glu on cpu"]
    assert mark == "FAILED"
    count = {"forward": 2, "backward": 1}[way]  # one of the two cases has no backward pass
    assert told.startswith(f"wrong numbers under {broken}: {count} of 2 cases, such as silu ")
    assert "exceeds" in told
    assert err == f"Error: 1 of 2 checks failed: glu on cpu: {told}\n"


@needs_native
def test_a_kernel_that_is_not_there_is_named(few, capsys, monkeypatch, one_thread):
    for name in list(_library.kernels):
        if name[0].startswith("rope"):
            monkeypatch.setitem(_library.kernels, name, False)
    only(monkeypatch, "glu", "rope")
    assert main(["doctor"]) == 1
    found, _ = lines(capsys)
    assert found["glu on cpu"][0] == "ok"
    assert found["rope on cpu"][0] == "FAILED"
    assert "the native library was built without the cpu kernel of rope" in found["rope on cpu"][1]


def test_without_the_library_the_reason_is_all_there_is(capsys, monkeypatch):
    reason = "the native library did not load: libtorch.so is not there"
    monkeypatch.setattr(_library, "native", None)
    monkeypatch.setattr(_library, "native_error", reason)
    assert main(["doctor"]) == 1
    found, err = lines(capsys)
    assert found == {"native library": ("FAILED", f"{reason}; every op runs in plain PyTorch")}
    assert err.startswith(f"Error: 1 of 1 checks failed: native library: {reason}")


def test_a_backend_chosen_by_hand_is_refused(capsys):
    with bigkernel.use_backend("torch"):
        assert main(["doctor"]) == 1
    assert "Leave it unset" in capsys.readouterr().err


# Speed


def speeds(shares, monkeypatch, kind=("avx2", "AVX2")) -> list[doctor.Outcome]:
    monkeypatch.setattr(_library.native, "cpu_isa", lambda: kind[0], raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kind[1])
    as_fast_as(monkeypatch, *shares)
    return [check.run() for check in doctor._speeds(_library.native)]


@needs_native
def test_what_is_a_third_as_fast_as_on_record_is_a_fault(monkeypatch):
    found = speeds([0.3], monkeypatch)
    assert len(found) == len(doctor.RATIOS["avx2", "AVX2"]) >= 5
    assert {outcome.held for outcome in found} == {False}
    assert "on record, of which it has to be a third" in found[0].told
    assert {outcome.held for outcome in speeds([0.4], monkeypatch)} == {True}


@needs_native
def test_one_slow_measurement_is_repeated(monkeypatch):
    assert {outcome.held for outcome in speeds([0.1, 0.9], monkeypatch)} == {True}


@needs_native
def test_a_kind_of_machine_that_is_not_on_record_is_no_fault(monkeypatch):
    (found,) = speeds([0.1], monkeypatch, ("portable", "DEFAULT"))
    assert found.held is None
    assert "none is on record for portable beside a torch with DEFAULT" in found.told


@needs_native
def test_speed_is_measured_with_as_many_threads_as_on_record(monkeypatch):
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(
        tuning,
        "measure",
        lambda wanted, plan: (
            seen.append(torch.get_num_threads()) or {wanted[0]: tuning.Figures(1.0, 2.0, False)}
        ),
    )
    torch.set_num_threads(4)
    try:
        doctor.speed("glu", "fp32 n<=2^20 forward", 2.0)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert seen == [doctor.THREADS]


def test_ratios_are_those_of_the_results_on_record():
    kinds = set()
    for file in sorted((ROOT / "benchmarks" / "results").glob("tune_*.json")):
        content = json.loads(file.read_text())
        kind = content["facts"]["isa"], content["facts"]["torch_isa"]
        kinds.add(kind)
        assert content["facts"]["threads"] == doctor.THREADS
        figures = content["figures"]
        for (name, words), ratio in doctor.RATIOS[kind].items():
            ours, theirs, _ = figures[name][words]
            assert ratio == round(theirs / ours, 2), (file.name, name, words)
        assert {name for name, _ in doctor.RATIOS[kind]} == set(figures), file.name
    assert kinds == set(doctor.RATIOS)


# A GPU


@needs_native
@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_that_no_kernel_runs_on_is_a_fault(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test 100")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    build = _library.native.build_info()
    monkeypatch.setattr(_library, "cuda_error", "the CUDA kernels need a later driver")
    assert doctor._gpu().held is False
    assert doctor._gpu().told.endswith("the CUDA kernels need a later driver")
    monkeypatch.setattr(_library, "cuda_error", None)
    for cuda, held in (("13.0", True), (None, False)):
        monkeypatch.setattr(
            _library.native, "build_info", lambda c=cuda: build._replace(cuda=c), raising=False
        )
        assert doctor._gpu().held is (held if there else None)
    assert not there or doctor._gpu().told == "Test 100: this build has no CUDA kernels"


@needs_native
def test_ops_are_checked_on_a_gpu_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "_why_no_cuda", lambda: None)
    asked = []
    monkeypatch.setattr(doctor, "numbers", lambda op, device: asked.append((op.noun, device)))
    for check in doctor.checks():
        if check.name.endswith((" on cpu", " on cuda")) and "speed" not in check.name:
            check.run()
    asked = [(op, device) for op, device in asked if op in OPS]
    assert asked == [(op, device) for device in ("cpu", "cuda") for op in OPS]


def test_an_op_without_cuda_kernels_says_so():
    found = doctor.numbers(registry.find("rope"), "cuda")
    assert found == (None, "runs in PyTorch there: only the CPU kernels are written so far")


@pytest.mark.parametrize("op", [op for op in OPS if "cuda" not in registry.find(op).absent])
def test_tables_of_ops_with_cuda_kernels_are_built_on_any_device(op):
    """On the meta device, which tells where tensors are and computes nothing."""
    with without_peers():
        for case in cases_of(op, True, "meta"):
            ready = case.build()
            assert {x.device.type for x in ready.tensors} == {"meta"}
