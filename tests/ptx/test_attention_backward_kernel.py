"""Attention's backward CUDA kernels, compiled by nvcc, launched by their own launcher, emulated.

What they compute is compared with the reference by tests/ops/test_attention*.py, backend "ptx".
Here: that results repeat bit by bit, what the kernels move and multiply, and which of them a call
takes.
"""

import sys
from pathlib import Path

import pytest
import torch

from bigkernel.ops.attention import blocks as attention_blocks
from bigkernel.ops.attention.reference import Params, Rule
from bigkernel.testing import ptx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
import attention_ptx
from attention_cases import Case, build

SECTOR = 32


def prepare(case):
    inputs = build(case).map(lambda x: x.detach())
    options = case.params(inputs).arguments
    out, lse = attention_blocks.attention_fwd(inputs.q, inputs.k, inputs.v, *options)
    needs_dmask = inputs.mask is not None and inputs.mask.is_floating_point()
    return attention_ptx.prepare_backward(
        inputs.dout, inputs.dlse, inputs.q, inputs.k, inputs.v, out, lse, *options, needs_dmask
    )


def run(case):
    """(gradients, plans, counters), one of each for a launch."""
    call, gradients = prepare(case)
    call.run("attention_bwd_run")
    return gradients, call.plan_backward(), [x.counters for x in attention_ptx.launches]


def names(case):
    call, _ = prepare(case)
    return [plan.name.decode().removeprefix("attention_bwd_") for plan in call.plan_backward()]


MEASURED = {
    "full-d64": {"dim": 64},
    "causal-d64": {"dim": 64, "causal": "top_left"},
    "window-d64": {"dim": 64, "window": (100, 20)},
    "bottom-right-d128": {"dim": 128, "causal": "bottom_right", "lengths": (130, 300)},
    "softcap-d64": {"dim": 64, "causal": "top_left", "softcap": 5.0},
}


def tiles(case, plan, rows_are_keys):
    """(first, last + 1) of the tiles of columns that each tile of rows needs."""
    rule, (queries, keys) = case.rule, case.lengths
    off, right = rule.offset(queries, keys), rule.reach_right()
    i, j = torch.arange(queries)[:, None] + off, torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if right >= 0:
        seen &= j <= i + right
    if rule.window_left >= 0:
        seen &= j >= i - rule.window_left
    if rows_are_keys:
        seen = seen.T
    for block in seen.split(plan.tile_rows):
        columns = block.any(0).nonzero().flatten()
        if len(columns):
            yield int(columns[0]) // plan.tile_keys, int(columns[-1]) // plan.tile_keys + 1


@pytest.mark.parametrize("name", MEASURED)
def test_attention_backward_counts(name):
    """Tiles that nobody sees are neither read nor multiplied, the others are read once for each
    block that needs them, without bank conflicts and without atomics."""
    case = Case(dtype="bf16", batch=1, heads=(2, 1), **{"lengths": (300, 300), **MEASURED[name]})
    _, plans, counters = run(case)
    assert [p.general for p in plans[1:]] == [int(case.softcap > 0)] * 2
    row_bytes = case.dim * 2
    for plan, counts, rows_are_keys, products in zip(
        plans[1:], counters[1:], (True, False), (4, 3), strict=True
    ):
        rows, columns = case.lengths[rows_are_keys], case.lengths[not rows_are_keys]
        needed = list(tiles(case, plan, rows_are_keys))
        passes = 2  # heads of q, or the group that shares a head of keys
        mma = plan.tile_rows * plan.tile_keys * plan.tile_dim // (16 * 8 * 16)
        assert counts.mma == passes * products * mma * sum(last - first for first, last in needed)
        read = sum(
            min(last * plan.tile_keys, columns) - first * plan.tile_keys for first, last in needed
        )
        for array in ("q", "dout") if rows_are_keys else ("k", "v"):
            assert counts.loads[array].sectors == passes * read * row_bytes // SECTOR
        for array in ("k", "v") if rows_are_keys else ("q", "dout"):
            heads = case.heads[rows_are_keys]
            assert counts.loads[array].sectors == heads * rows * row_bytes // SECTOR
        for array in ("dk", "dv") if rows_are_keys else ("dq",):
            heads = case.heads[rows_are_keys]
            assert counts.stores[array].sectors == heads * rows * row_bytes // SECTOR
        assert counts.bank_conflict_ratio == 1.0
        assert counts.global_atomics == counts.shared_atomics == 0


REPEATED = {
    "plain": {"dtype": "bf16", "dim": 64, "lengths": (70, 90), "heads": (3, 1)},
    "mask-summed-over-rows": {"dtype": "f16", "dim": 80, "mask": "float:111K", "dropout": 0.2},
    "fp32": {"causal": "top_left", "mask": "float:1HQ1", "dlse": True},
}


@pytest.mark.parametrize("name", REPEATED)
def test_attention_backward_is_deterministic(name):
    first, second = (run(Case(**REPEATED[name]))[0] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert not a.isnan().any()


def test_attention_backward_plan():
    """Which kernels a call takes."""
    together, dq = "kernel (dk, dv)", "kernel (dq)"
    assert names(Case(dtype="bf16", dim=128)) == ["rows_kernel", together, dq]
    assert names(Case(dtype="f16", dim=129)) == ["rows_kernel", "kernel (dk)", "kernel (dv)", dq]
    assert names(Case(dim=8, dim_v=200))[1:] == ["kernel (dk)", "kernel (dv)", dq]
    assert names(Case(mask="float:11QK"))[3:] == ["mask_kernel"]
    assert names(Case(mask="float:BHQ1"))[3:] == ["mask_rows_kernel"]
    assert names(Case(mask="bool:11QK"))[3:] == []

    def general(**options):
        call, _ = prepare(Case(dtype="bf16", **options))
        plans = call.plan_backward()
        assert {p.aligned for p in plans} == {int(options.get("layout") != "nan")}
        return [bool(p.general) for p in plans[1:3]]

    assert general(dim=64, causal="top_left", window=(5, 3)) == [False] * 2
    for option in ({"softcap": 1.0}, {"alibi": "H"}, {"mask": "bool:11QK"}, {"dropout": 0.5}):
        assert general(dim=64, **option) == [True] * 2
    assert general(dim=64, layout="nan") == [True] * 2


def test_attention_backward_shared_memory_fits_every_architecture():
    for dtype in ("bf16", "f16", "f32"):
        for dim in (64, 128, 256):
            for options in ({}, {"mask": "float:11QK"}):
                call, _ = prepare(Case(dtype=dtype, dim=dim, batch=1, **options))
                for device in ptx.DEVICES.values():
                    if device.capability >= 80:
                        plans = call.plan_backward(device)
                        assert all(p.shared <= device.shared_per_block for p in plans)
                most = max(p.shared for p in plans)
                with pytest.raises(RuntimeError, match=f"takes {most} bytes of shared memory"):
                    call.plan_backward(device._replace(capability=80, shared_per_block=most - 1))


def test_attention_backward_of_a_device_that_is_too_old():
    call, _ = prepare(Case(dtype="bf16", dim=64, batch=1))
    with pytest.raises(RuntimeError, match=r"attention_bwd_rows_kernel is for .* 8\.0 or later"):
        call.plan_backward(ptx.DEVICES["T4"])


def test_attention_backward_out_of_bounds_is_caught():
    """The emulator does check these launches: a dv that is one row short is found."""
    call, _ = prepare(Case(dtype="bf16", dim=64, batch=1, heads=(1, 1)))
    short = torch.zeros(1, 1, 36, 64, dtype=torch.bfloat16)
    call.args.dv = call.view(short, "short")
    with pytest.raises(ptx.OutOfBounds, match="short"):
        call.run("attention_bwd_run")


def test_attention_backward_launch_failure_names_the_kernel():
    """What a failed launch says, on which the launches after it do not happen."""
    call, _ = prepare(Case(dtype="bf16", dim=64, batch=1, heads=(1, 1)))
    library = attention_ptx.host().library
    error = library.attention_bwd_run(attention_ptx.ctypes.byref(call.args), 0).decode()
    assert "attention_bwd_rows_kernel with grid (1, 1, 1), block (256, 1, 1)" in error
    assert "the emulator stopped the launch" in error


@pytest.mark.slow
def test_attention_backward_rows_that_32_bits_do_not_count():
    """A packed batch may be longer than any sequence. Only the first block runs."""
    total = (1 << 31) + 8
    x = torch.randn(1, 1, 8).bfloat16().expand(total, 1, 8)
    lse = torch.tensor([1.5, 0.5]).expand(1, total, 2)  # the highest score, the log of the sum
    delta = torch.empty(2, 1, total)
    delta[:, :, :65] = torch.nan
    cu = torch.tensor([0, 0], dtype=torch.int32)
    params = Params(None, None, None, cu, cu, 1, 1, Rule(0.1))
    call = attention_ptx.Call(x, x, x, params)
    call.args.out, call.args.dout = call.view(x, "out"), call.view(x, "dout")
    call.args.lse = call.view_lse(lse, "lse")
    call.args.delta = call.view_lse(delta[0], "delta", delta)
    kernel = next(
        module[name]
        for module in attention_ptx.host().modules
        for name in module.kernels
        if "attention_bwd_rows_kernel" in name and "bf16ELb0" in name  # the one without masks
    )
    kernel.launch((1,), (256,), [bytes(call.args)], call.memory)
    assert torch.equal(delta[0, 0, :64], torch.tensor(-2.0 * 1.44269504088896341).expand(64))
    torch.testing.assert_close(delta[1, 0, :64], -x[:64].float().square().sum((1, 2)))
    assert delta[:, 0, 64].isnan().all()
