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
from attention_cases import DTYPES, Case, build

from tools import cuda_schedule

SECTOR = 32


def prepare(case):
    inputs = build(case).map(lambda x: x.detach())
    options = case.params(inputs).arguments
    out, lse = attention_blocks.attention_fwd(inputs.q, inputs.k, inputs.v, *options)
    needs_dmask = inputs.mask is not None and inputs.mask.is_floating_point()
    return attention_ptx.prepare_backward(
        inputs.dout, inputs.dlse, inputs.q, inputs.k, inputs.v, out, lse, *options, needs_dmask
    )


def run(case, splits=None):
    """(gradients, plans, counters), one of each for a launch."""
    call, gradients = prepare(case)
    if splits:
        call.split(splits)
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


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", MEASURED)
def test_attention_backward_counts(name, splits):
    """Tiles that nobody sees are neither read nor multiplied, the others are read once for each
    block that needs them, without bank conflicts and without atomics."""
    case = Case(dtype="bf16", batch=1, heads=(2, 1), **{"lengths": (300, 300), **MEASURED[name]})
    _, (_, *plans), (_, *counters) = run(case, splits)
    parts = 0  # sectors
    if splits > 1:
        added, parts = counters.pop(1), 2 * splits * case.lengths[1] * case.dim * 4 // SECTOR
        assert plans.pop(1).name == b"attention_bwd_sum_kernel"
        assert added.loads["parts"].sectors == parts
        assert sum(added.stores[x].sectors for x in ("dk", "dv")) == parts // splits // 2
    assert [p.general for p in plans] == [int(case.softcap > 0)] * 2
    row_bytes = case.dim * 2
    for plan, counts, rows_are_keys, products in zip(
        plans, counters, (True, False), (4, 3), strict=True
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
            heads = splits if rows_are_keys else case.heads[0]
            assert counts.loads[array].sectors == heads * rows * row_bytes // SECTOR
        stores = {array: traffic.sectors for array, traffic in counts.stores.items()}
        if not rows_are_keys:
            assert stores == {"dq": 2 * rows * row_bytes // SECTOR}
        elif splits > 1:
            assert stores == {"parts": parts}
        else:
            assert stores == dict.fromkeys(("dk", "dv"), rows * row_bytes // SECTOR)
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


SPLIT = {
    "plain-d64": {"dtype": "bf16", "dim": 64, "causal": "bottom_right", "lengths": (40, 140)},
    "plain-d128": {"dtype": "f16", "dim": 104, "dim_v": 128},
    "general": {"dtype": "bf16", "dim": 64, "mask": "float:BH1K", "dropout": 0.2},
    "unaligned": {"dtype": "bf16", "dim": 20, "layout": "nan", "causal": "top_left"},
    "dk-and-dv-apart": {"dtype": "bf16", "dim": 136, "dim_v": 24},
    "fp32": {"dim": 12, "window": (9, 0), "dlse": True},
}


def split(case, splits):
    """Gradients and launches with this many blocks to a tile of keys."""
    call, gradients = prepare(case)
    call.split(splits)
    call.run("attention_bwd_run")
    assert ("sum_kernel" in str([x.kernel for x in attention_ptx.launches])) == (splits > 1)
    assert not any(x.isnan().any() for x in gradients)
    return gradients


@pytest.mark.parametrize("name", SPLIT)
def test_attention_backward_splits(name):
    """One block for all the query heads of a group, or several and a sum of theirs."""
    case = Case(heads=(4, 1), batch=1, **SPLIT[name])
    serial = split(case, 1)
    found = [split(case, splits) for splits in (2, 4, 4)]
    assert all(torch.equal(a, b) for a, b in zip(*found[1:], strict=True))
    for several in found[:2]:
        for same in (0, 3):  # dq, and what a mask gets
            assert torch.equal(serial[same], several[same])
        for a, b in zip(serial[1:3], several[1:3], strict=True):
            ulp = torch.finfo(a.dtype).eps * b.abs().max()
            assert (a.double() - b.double()).abs().max() <= (
                1 if a.dtype != torch.float32 else 4
            ) * ulp


def test_attention_backward_splits_of_packed_sequences():
    """Also where bounds leave rows out, which keep what they had (the binding puts zeros there)."""
    torch.manual_seed(0)
    total = 190
    q, dout = (torch.randn(total, 6, 64).bfloat16() for _ in range(2))
    k, v = (torch.randn(total, 2, 64).bfloat16() for _ in range(2))
    whole = torch.tensor([0, 3, 40, 40, 180, total], dtype=torch.int32)
    rule = Rule(64**-0.5, True, False, -1, -1, 0.0, 0.0)
    out, lse = attention_blocks.attention_fwd(
        q, k, v, *Params(None, None, None, whole, whole, 140, 140, rule).arguments
    )
    some = whole[1:-1].clone()
    options = Params(None, None, None, some, some, 140, 140, rule).arguments
    found = []
    for splits in (1, 3, 3):
        call, gradients = attention_ptx.prepare_backward(
            dout, None, q, k, v, out, lse, *options, False
        )
        call.split(splits)
        call.run("attention_bwd_run")
        found.append(gradients)
        outside = [torch.cat((x[:3], x[180:])) for x in gradients[:3]]
        assert all(x.isnan().all() for x in outside)
    inside = [[x[3:180] for x in gradients[:3]] for gradients in found]
    for a, b, c in zip(*inside, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
    assert torch.equal(inside[0][0], inside[1][0])


def test_attention_backward_choice_of_splits():
    """As many as fill the GPU, in memory that is bounded."""

    def chosen(heads, batch, length, dim=128, device="H100", dtype="bf16"):
        call = cuda_schedule.Shape(*heads, dim, (length,), batch)
        args = cuda_schedule.arguments(call)
        args.dtype = attention_ptx.TYPE_CODES[DTYPES[dtype]]
        floats = attention_ptx.split(args, ptx.DEVICES[device])
        assert args.splits * args.members == args.group
        assert floats == (
            0 if args.splits == 1 else heads[1] * args.splits * batch * length * dim * 2
        )
        assert 4 * floats <= 256 << 20
        return args.splits

    assert chosen((32, 8), 1, 2048) == 4
    assert chosen((14, 2), 4, 1024) == 7  # of 1 and 7
    assert chosen((32, 8), 1, 8192) == 1  # keys alone fill it
    assert chosen((32, 8), 1, 4096) == 2
    assert chosen((16, 16), 1, 128) == 1
    assert chosen((64, 1), 1, 8192) == 8
    assert chosen((64, 1), 1, 16384) == 4
    assert chosen((71, 1), 1, 8192) == 1  # all 71 would take 568 MiB
    assert chosen((32, 8), 1, 2048, device="RTX 3090") == 2


def test_attention_backward_plan():
    """Which kernels a call takes."""
    together, dq = "kernel (dk, dv)", "kernel (dq)"
    alone = {"heads": (2, 2)}
    assert names(Case(dtype="bf16", dim=128, **alone)) == ["rows_kernel", together, dq]
    assert names(Case(dtype="bf16", dim=128)) == ["rows_kernel", together, "sum_kernel", dq]
    apart = ["kernel (dk)", "kernel (dv)"]
    assert names(Case(dtype="f16", dim=129, **alone)) == ["rows_kernel", *apart, dq]
    assert names(Case(dim=8, dim_v=200))[1:] == [*apart, "sum_kernel", dq]
    assert names(Case(mask="float:11QK"))[4:] == ["mask_kernel"]
    assert names(Case(mask="float:BHQ1"))[4:] == ["mask_rows_kernel"]
    assert names(Case(mask="bool:11QK"))[4:] == []

    def general(**options):
        call, _ = prepare(Case(dtype="bf16", **options))
        plans = call.plan_backward()
        assert {p.aligned for p in plans} == {int(options.get("layout") != "nan")}
        return [bool(plans[i].general) for i in (1, 3)]

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
