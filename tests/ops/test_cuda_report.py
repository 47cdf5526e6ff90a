"""The bars of `make cuda-report`, on shorter inputs; Triton's kernels against float64."""

import importlib
import itertools
import json

import pytest
import torch

from bigkernel import registry
from bigkernel.testing import ptx
from bigkernel.testing.tolerance import assert_as_accurate
from tools import cuda_report, cuda_schedule, sass

pytestmark = pytest.mark.skipif(ptx.nvcc() is None, reason="nvcc is not on the path")
# Of attention two blocks of rows and some tiles of keys: the machine code is that of any length.
SIZES = {"adam": 512, "attention": 256, "augment": 1024, "bias_act": 128}
OPS = [op.noun for op in registry.every() if "cuda" not in op.absent]
ROLES = ["forward", "backward, rows", "backward, dK dV", "backward, dQ"]


@pytest.mark.parametrize("case", cuda_report.CASES, ids=lambda case: f"{case.op} {case.name}")
def test_bars(case):
    size = SIZES[case.op]
    rows = cuda_report.measure(case, size)
    roles = [row["role"] for row in rows]
    small = case.arch != "sm_80"
    assert roles == ROLES if case.op == "attention" and not small else len(roles) == 1
    for row in rows:
        held = dict(row["bars"])
        assert all(held.values()), f"{row['role']}: {held}"
        tiled = case.op == "attention" and row["role"] != "backward, rows"
        yardstick = tiled and "bf16" in case.name and cuda_report.triton_kernels() is not None
        yardstick = yardstick and not small
        assert len(held) == 3 + tiled + yardstick
        assert row["main_loop"]["HMMA" if tiled and "bf16" in case.name else "instructions"] > 0
        assert row["main_loop"]["FFMA"] > 0 or "bf16" in case.name or case.op == "augment"
        assert row["registers"] <= 255
        assert 0 < row["occupancy"] <= 1
    report = {"compiler": "", "triton": "", "size": size, "cases": rows, "kernels": []}
    assert f"| {case.op} {case.name} {rows[0]['role']} | bigkernel |" in cuda_report.markdown(
        report
    )


def test_every_op_with_cuda_kernels_has_a_case():
    assert {case.op for case in cuda_report.CASES} == {*OPS} == {*SIZES}


@pytest.mark.parametrize("op", OPS)
def test_no_kernel_spills_in_a_main_loop(op):
    """Every kernel for sm_80; fp16's are bf16's."""
    modules = importlib.import_module(f"{op}_ptx").host().modules
    counted = 0
    for module in modules:
        if op == "attention" and all("fp16" in name for name in module.kernels):
            continue
        for name, kernel in sass.disassemble(sass.assemble(module.text, "sm_80")[0]).items():
            loop = kernel.main_loop
            assert loop is None or loop.local == 0, name
            counted += 1
    assert counted > 8


def test_no_kernel_of_the_record_spills_in_a_main_loop():
    rows = json.loads((cuda_report.RESULTS / "cuda_report.json").read_text())["kernels"]
    assert rows, "make cuda-report ARCH=all"
    assert not [(row["arch"], row["kernel"]) for row in rows if row["main_loop"]["local"]]


def test_a_bar_that_is_missed_is_seen():
    row = {"op": "adam", "triton": None, "main_loop": {"local": 3, "matrix": 0},
           "emulator": {"ratio": 1.2, "global_atomics": 0}}  # fmt: skip
    assert [held for _, held in cuda_report.bars(row)] == [False, True, False]
    row = {"op": "attention", "main_loop": {"local": 0, "matrix": 9, "per_matrix": 5.1},
           "triton": {"main_loop": {"per_matrix": 5.0}}, "emulator": {
               "ratio": 1.0, "global_atomics": 0, "bank_conflicts": 1.2,
               "by_array": {"q": [9, 8]}}}  # fmt: skip
    assert [held for _, held in cuda_report.bars(row)] == [True, True, False, False, False]


def test_blocks_start_in_the_first_free_slot():
    assert cuda_schedule.share_of([1, 1, 1, 1], 2) == 1.0
    assert cuda_schedule.share_of([2, 1, 1, 1], 2) == 5 / 6
    assert cuda_schedule.share_of([1, 1, 1, 2], 2) == 5 / 6
    assert cuda_schedule.share_of([1, 1, 1, 1, 4], 2) == 8 / 12
    assert cuda_schedule.share_of([3], 4) == 1 / 4


def test_tiles_of_a_block_and_their_cost():
    def columns(role, tile, causal):
        return cuda_schedule.columns_of(role, 300, tile, 128, 64, causal)

    assert [columns(cuda_schedule.FORWARD, i, True) for i in range(3)] == [2, 4, 5]
    assert [columns(cuda_schedule.KEYS, i, True) for i in range(3)] == [5, 3, 1]
    assert columns(cuda_schedule.KEYS, 2, False) == columns(cuda_schedule.QUERIES, 0, False) == 5
    # Two blocks of 100, each tile of 10: four and four tiles, two and four.
    counts = {"full": 280, "causal": 260}
    cases = [
        {"case": f"bf16 D64 {name}", "role": cuda_schedule.FORWARD, "size": 256}
        | {"emulator": {"ptx_instructions": count}}
        for name, count in counts.items()
    ]
    cost = cuda_schedule.cost_of({"cases": cases}, 64, cuda_schedule.FORWARD, 128, 64)
    assert cost == cuda_schedule.Cost(100, 10)


def test_attention_keeps_the_gpu_busy():
    """The bars of the model, by the kernels' own order of blocks and the record's counts."""
    record = json.loads((cuda_report.RESULTS / "cuda_report.json").read_text())
    rows = cuda_schedule.table(record)
    for shape, gpu in itertools.product(cuda_schedule.SHAPES, cuda_schedule.GPUS):
        three = [row for row in rows if (row["shape"], row["gpu"]) == (str(shape), gpu)]
        assert [row["role"] for row in three] == [*cuda_schedule.ROLES]
    barred = [row for row in rows if row["bar"]]
    assert len(barred) == len(cuda_schedule.BARS) == 6
    assert all(row["share"] >= row["bar"] for row in barred), barred
    assert all(row["parts"] <= 256 << 20 for row in rows)
    assert rows == record["schedule"], "make cuda-report ARCH=all"
    assert cuda_schedule.tiles(record) == record["tiles"], "make cuda-report ARCH=all"
    rows[0]["bar"], rows[0]["share"] = 0.9, 0.89
    text = "\n".join(cuda_report.schedule(rows))
    assert "Bars held: 6 of 7." in text
    assert "A100 forward: below 90%" in text


def test_the_report_can_be_read_back():
    report = {"compiler": 'nvcc "13.0"', "cases": [{"a": None}, {"a": [1.5]}], "kernels": []}
    text = cuda_report.as_json(report)
    assert json.loads(text) == report
    assert text.count("\n") == 8


def test_tiles_that_are_needed():
    assert cuda_report.keys_seen(256, 128, 64, False) == 512
    assert cuda_report.keys_seen(256, 128, 64, True) == 128 + 256
    assert cuda_report.keys_seen(100, 64, 48, True) == 96 + 100
    assert cuda_report.queries_seen(256, 128, 32, False) == 512
    assert cuda_report.queries_seen(256, 128, 32, True) == 256 + 128


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [128, 77])
def test_triton_attention_is_right(length, dim, causal):
    """A yardstick that computed something else would measure nothing."""
    triton_kernels = pytest.importorskip("triton_kernels")
    torch.manual_seed(0)
    inputs = [torch.randn(1, length, dim).bfloat16() for _ in range(3)]
    dout = torch.randn(1, length, dim).bfloat16()
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        scores = q @ k.transpose(1, 2) / dim**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        out = scores.softmax(-1) @ v
        gradients = torch.autograd.grad(out, (q, k, v), dout.to(dtype))
        results.append([out.detach(), *gradients])
    out, dq, dk, dv = (torch.zeros_like(dout) for _ in range(4))
    lse = torch.zeros(1, length)
    kernel, grid = triton_kernels.forward(*inputs, out, lse, causal)
    kernel.launch(grid)
    delta = (dout.float() * out.float()).sum(-1)
    for kernel, grid in triton_kernels.backward(*inputs, dout, lse, delta, dq, dk, dv, causal):
        kernel.launch(grid)
    for mine, exact, same in zip((out, dq, dk, dv), *results, strict=True):
        assert_as_accurate(mine, exact, same)


def test_triton_adam_is_right():
    triton_kernels = pytest.importorskip("triton_kernels")
    torch.manual_seed(0)
    x, g, m, v = torch.randn(1000), torch.randn(1000), torch.randn(1000), torch.rand(1000)
    results = []
    for dtype in (torch.float64, torch.float32):
        p, grad, a, b = (t.to(dtype) for t in (x, g, m, v))
        a, b = a + 0.1 * (grad - a), b + 0.01 * (grad * grad - b)
        results.append([p - (1e-3 * p + 0.01 * a / (b.sqrt() + 1e-8)), a, b])
    kernel, grid = triton_kernels.adam(x, g, m, v, 0.01, 0.9, 0.99, 1e-8, 1e-3)
    kernel.launch(grid)
    for mine, exact, same in zip((x, m, v), *results, strict=True):
        assert_as_accurate(mine, exact, same)


@pytest.mark.parametrize("archs", [["sm_80"], ["sm_80", "sm_90"], [*sass.LIMITS][1:]])
def test_a_report_of_some_architectures_leaves_the_record_alone(archs):
    record = cuda_report.destination([*sass.LIMITS])
    assert record == cuda_report.RESULTS / "cuda_report"
    assert record not in cuda_report.destination(archs).parents
    assert cuda_report.destination(archs) != record
