"""Attention's CUDA kernels, compiled by nvcc, launched by their own launcher, in the emulator.

What they compute is compared with the reference by tests/ops/test_attention*.py, backend "ptx".
Here: what they move and multiply, which kernel a call takes, and what they do with bad arguments.
"""

import ctypes
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bigkernel.ops.attention.reference import Params, Rule, attention_reference
from bigkernel.testing import ptx
from bigkernel.testing.tolerance import assert_as_accurate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
import attention_ptx
from attention_cases import DTYPES, Case, all_pairs, build, compare

from tools import cuda_schedule, sass

SIZE = {"bf16": 2, "f16": 2, "f32": 4}
SECTOR = 32


def forward(case, device="A100"):
    """(plan, counters, out, inputs) of a forward launch."""
    inputs, traits = build(case), ptx.DEVICES[device]
    call = attention_ptx.Call(inputs.q, inputs.k, inputs.v, case.params(inputs))
    out = torch.empty(*inputs.q.shape[:3], inputs.v.shape[-1], dtype=inputs.q.dtype)
    lse = torch.empty(*inputs.q.shape[:3], 2)
    call.args.out, call.args.lse = call.view(out, "out"), call.view_lse(lse, "lse")
    call.run("attention_fwd_run", traits)
    (launch,) = attention_ptx.launches
    return call.plan(traits), launch.counters, out, inputs


def needed_tiles(case, plan):
    """For each block of rows the first tile of keys that it needs and the one after the last."""
    rule, (rows, keys) = case.rule, case.lengths
    off, right = rule.offset(rows, keys), rule.reach_right()
    for begin in range(0, rows, plan.tile_rows):
        last = min(begin + plan.tile_rows, rows) - 1
        low = 0 if rule.window_left < 0 else max(0, begin + off - rule.window_left)
        high = keys if right < 0 else max(0, min(keys, last + off + right + 1))
        yield low // plan.tile_keys, max(low // plan.tile_keys, -(-high // plan.tile_keys))


MEASURED = {
    "full": {},
    "causal": {"causal": "top_left"},
    "bottom_right": {"causal": "bottom_right", "lengths": (130, 300)},
    "window": {"window": (100, 20), "lengths": (300, 300)},
    "general": {"softcap": 5.0, "causal": "top_left"},
}


@pytest.mark.parametrize("feature", MEASURED)
@pytest.mark.parametrize(
    ("dtype", "dim"),
    # One of each layout of tiles: rows of 64, 128, 192 and 256 bytes and more, and fp32's.
    [("bf16", 32), ("bf16", 64), ("f16", 96), ("bf16", 128), ("bf16", 256), ("f32", 64)],
)
def test_attention_kernel_traffic(dtype, dim, feature):
    measure_traffic(dtype, dim, feature, "A100")


@pytest.mark.parametrize(
    ("dtype", "dim", "feature"),
    [("bf16", 128, "bottom_right"), ("bf16", 192, "window"), ("f16", 256, "causal"),
     ("f16", 192, "general"), pytest.param("f32", 128, "full", marks=pytest.mark.slow),
     pytest.param("f32", 256, "full", marks=pytest.mark.slow)],
)  # fmt: skip
def test_attention_kernel_traffic_of_small_tiles(dtype, dim, feature):
    """The same where a multiprocessor has 100 KB of shared memory."""
    measure_traffic(dtype, dim, feature, "one SM")


def measure_traffic(dtype, dim, feature, device):
    """Q, K, V and the output move once per needed tile; others are skipped; no bank conflicts."""
    settings = {"lengths": (256, 256), "heads": (2, 2), "batch": 1} | MEASURED[feature]
    if dtype == "f32" or dim == 256:  # slow to emulate
        settings |= {"heads": (1, 1), "lengths": tuple(n // 2 for n in settings["lengths"])}
    case = Case(dtype=dtype, dim=dim, **settings)
    plan, counters, *_ = forward(case, device)
    (heads, _), (rows, keys) = case.heads, case.lengths
    row = dim * SIZE[dtype] // SECTOR  # sectors
    tiles = list(needed_tiles(case, plan))
    read = sum(min(stop * plan.tile_keys, keys) - start * plan.tile_keys for start, stop in tiles)
    assert plan.tile_rows < rows or feature == "full"  # more than one block
    assert plan.tile_keys < keys
    assert counters.loads["q"].sectors == heads * rows * row
    assert counters.loads["k"].sectors == heads * read * row
    assert counters.loads["v"].sectors == heads * read * row
    assert counters.stores["out"].sectors == heads * rows * row
    # Eight rows at a time, which lie in three sectors where the head's first row is within one.
    assert counters.stores["lse"].sectors <= heads * 3 * (rows // 8 + 1)
    assert counters.bank_conflict_ratio <= (1.05 if dtype == "f32" else 1.0)
    if dtype != "f32":
        tile = 2 * (plan.tile_rows // 16) * (plan.tile_keys // 8) * (plan.tile_dim // 16)
        assert counters.mma == heads * tile * sum(stop - start for start, stop in tiles)


SMALL = {
    "causal": {"causal": "bottom_right"},
    "window": {"window": (50, 20), "align": "bottom_right"},
    "everything": {"softcap": 2.0, "alibi": "H", "mask": "float:BHQK", "dropout": 0.2},
}


@pytest.mark.parametrize("feature", SMALL)
@pytest.mark.parametrize(
    ("dtype", "dim", "lengths", "keys"),
    [("bf16", 128, (140, 107), 32), ("f16", 184, (70, 75), 32), ("bf16", 256, (70, 55), 16),
     ("f32", 104, (70, 37), 16), ("f32", 256, (21, 19), 8)],
)  # fmt: skip
def test_attention_kernel_small_tiles(dtype, dim, lengths, keys, feature):
    """Where a multiprocessor has 100 KB of shared memory: right, and the same at each run."""
    case = Case(dtype=dtype, dim=dim, lengths=lengths, heads=(1, 1), batch=1, **SMALL[feature])
    plan, _, out, inputs = forward(case, "one SM")
    two_fit = dim == 128 and feature == "everything"  # of the general kernel's blocks
    assert plan.tile_keys == (64 if two_fit else keys)
    exact, same = (
        attention_reference(
            *(x.detach().to(kind) for x in (inputs.q, inputs.k, inputs.v)),
            case.rule,
            mask=inputs.mask,
            alibi_slopes=inputs.slopes,
            seed=inputs.seed,
        )[0].detach()
        for kind in (torch.float64, DTYPES[dtype])
    )
    assert_as_accurate(out, exact, same)
    if dtype == "bf16":
        assert torch.equal(out, forward(case, "one SM")[2])


SMALL_AXES = {
    "dtype": ["f32", "bf16", "f16"],
    "dim": [97, 128, 136, 192, 256],
    "lengths": [(1, 70), (33, 33), (17, 131), (130, 17)],
    "heads": [(4, 2), (3, 1)],
    "causal": ["", "top_left", "bottom_right"],
    "window": [(None, None), (6, 0), (40, 9)],
    "softcap": [0.0, 1.5],
    "alibi": ["", "BH"],
    "mask": ["", "bool:BHQK", "float:1H1K"],
    "dropout": [0.0, 0.4],
    "layout": ["bhsd", "bshd", "nan"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(all_pairs(SMALL_AXES)), ids=str)
def test_attention_kernel_small_tiles_pairs(case):
    with attention_ptx.emulated(ptx.DEVICES["one SM"]):
        compare(case)


@pytest.mark.parametrize("device", [name for name in ptx.DEVICES if name != "T4"])
@pytest.mark.parametrize("general", [False, True], ids=["plain", "general"])
def test_attention_kernel_tiles_by_shared_memory(device, general):
    """As many blocks as make 8 warps have room on a multiprocessor; the tiles of those with 164 KB
    and more are the same."""
    traits = ptx.DEVICES[device]._replace(multiprocessors=1)  # which the blocks fill
    limits = sass.LIMITS[f"sm_{traits.capability}"]
    for dtype, dim in itertools.product(SIZE, (32, 64, 96, 128, 192, 256)):
        case = Case(dtype=dtype, dim=dim, softcap=float(general))
        inputs = build(case)
        call = attention_ptx.Call(inputs.q, inputs.k, inputs.v, case.params(inputs))
        plan, large = call.plan(traits), call.plan(ptx.DEVICES["A100"])
        blocks = limits.shared // (plan.shared + 1024)
        few = dtype == "f32" and dim > 128  # half of a block's memory is Q
        assert blocks * plan.threads // 32 >= (4 if few else 8), (dtype, dim)
        tiles, of_large = ((x.tile_rows, x.tile_keys, x.shared) for x in (plan, large))
        small = limits.shared < 164 << 10 and 2 * (large.shared + 1024) > limits.shared
        assert (tiles != of_large) == small, (dtype, dim)


def test_attention_kernel_of_few_blocks_has_no_more_rows():
    """In float32 small tiles have twice the rows: not where that would leave a multiprocessor
    without a block."""
    inputs = build(Case(dim=128, heads=(4, 4), batch=2))
    call = attention_ptx.Call(inputs.q, inputs.k, inputs.v, Case().params(inputs))
    for rows, expected in ((1024, (64, 128)), (1025, (128, 72))):
        call.args.max_q = rows
        plan = call.plan(ptx.DEVICES["RTX 4090"])
        assert (plan.tile_rows, plan.blocks) == expected


def open_tiles(mask, rows, columns):
    """How many tiles have an open element, and how many rows of tiles have such a tile."""
    tiles = mask.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).any(-3).any(-1)
    return int(tiles.sum()), int(tiles.any(-1).sum())


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_kernel_closed_tiles(kind):
    """Tiles that the mask closes are neither read nor multiplied, forward and backward."""
    torch.manual_seed(0)
    length, dim, heads = 256, 64, 2
    ids = torch.zeros(heads, length)
    ids[0, 100:160], ids[0, 160:] = 1, 2  # three documents
    open_ = ids[:, :, None] == ids[:, None, :]
    open_[1, :, :130] = open_[1, 128:] = False  # nothing at the beginning; rows that see nothing
    mask = open_[None]
    if kind == "float":
        mask = torch.randn(mask.shape).masked_fill(~mask, -torch.inf).bfloat16().requires_grad_()
    q = torch.randn(1, heads, length, dim).bfloat16().requires_grad_()
    k, v = (torch.randn(1, 1, length, dim).bfloat16().requires_grad_() for _ in range(2))
    dout = torch.randn(q.shape).bfloat16()
    leaves = [q, k, v, mask] if kind == "float" else [q, k, v]
    with attention_ptx.emulated():
        out = attention_ptx.op.attention(q, k, v, mask=mask)
        (forward,), ((rows, keys),) = list(attention_ptx.launches), attention_ptx.tiles()
        gradients = torch.autograd.grad(out, leaves, dout)
        backward, tiles = list(attention_ptx.launches), attention_ptx.tiles()
        for of_launches in (backward, tiles):
            del of_launches[2], of_launches[0]  # what rows need; the sum over the heads' blocks

    sectors = dim * 2 // SECTOR  # of a row
    tiles_open, blocks_open = open_tiles(open_, rows, keys)
    assert tiles_open < heads * (length // rows) * (length // keys) / 2
    assert forward.counters.mma == 2 * tiles_open * rows * keys * dim // (16 * 8 * 16)
    assert forward.counters.loads["q"].sectors == blocks_open * rows * sectors
    for name in ("k", "v"):
        assert forward.counters.loads[name].sectors == tiles_open * keys * sectors
    for launch, (rows, columns), products, by_keys in zip(
        backward, tiles, (4, 3, 2), (True, False, False), strict=False
    ):
        seen = open_.transpose(1, 2) if by_keys else open_
        count, _ = open_tiles(seen, rows, columns)
        assert launch.counters.mma == products * count * rows * columns * dim // (16 * 8 * 16)
        for name in ("q", "dout") if by_keys else ("k", "v"):
            assert launch.counters.loads[name].sectors == count * columns * sectors
    assert len(backward) == (3 if kind == "float" else 2)

    def reference(dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        rule = Rule(dim**-0.5)
        given = inputs[3] if kind == "float" else mask
        result, _ = attention_reference(*inputs[:3], rule, mask=given)
        return result.detach(), *torch.autograd.grad(result, inputs, dout.to(dtype))

    results = zip(
        (out.detach(), *gradients), reference(torch.float64), reference(q.dtype), strict=True
    )
    for mine, exact, same in results:
        assert_as_accurate(mine, exact, same)


@pytest.mark.parametrize(
    ("case", "dim", "general"),
    [
        (Case(dtype="bf16", dim=64), 64, False),
        (Case(dtype="f16", dim=8, causal="bottom_right", window=(5, 3)), 32, False),
        (Case(dtype="bf16", dim=40), 64, False),
        (Case(dtype="bf16", dim=80), 96, False),
        (Case(dtype="bf16", dim=104, dim_v=64), 128, False),
        (Case(dtype="bf16", dim=64, dim_v=136), 192, False),
        (Case(dtype="f16", dim=256), 256, False),
        (Case(dtype="f32", dim=4), 32, False),
        (Case(dtype="f32", dim=96), 128, False),
        (Case(dtype="f32", dim=192), 256, False),
        (Case(dtype="bf16", dim=33), 64, True),  # rows that are not 16-byte aligned
        (Case(dtype="bf16", dim=64, layout="nan"), 64, True),
        (Case(dtype="bf16", dim=64, softcap=1.0), 64, True),
        (Case(dtype="bf16", dim=64, alibi="H"), 64, True),
        (Case(dtype="bf16", dim=64, mask="bool:QK"), 64, True),
        (Case(dtype="bf16", dim=64, dropout=0.5), 64, True),
    ],
    ids=str,
)
def test_attention_kernel_choice(case, dim, general):
    inputs = build(case)
    call = attention_ptx.Call(inputs.q, inputs.k, inputs.v, case.params(inputs))
    call.args.out = call.view(inputs.dout, "out")
    plan = call.plan()
    assert (plan.tile_dim, bool(plan.general)) == (dim, general)
    assert plan.blocks == -(-case.lengths[0] // plan.tile_rows) * case.heads[0] * case.batch
    assert plan.shared <= 99 * 1024  # what every GPU from sm_80 on can give a block


@pytest.mark.parametrize("device", ptx.DEVICES)
@pytest.mark.parametrize("case", [Case(dtype="bf16", dim=256), Case(dim=256, softcap=1.0)], ids=str)
def test_attention_kernel_plan_is_bounded_by_the_device(case, device):
    inputs = build(case)
    call = attention_ptx.Call(inputs.q, inputs.k, inputs.v, case.params(inputs))
    traits = ptx.DEVICES[device]
    if traits.capability < 80:
        with pytest.raises(RuntimeError, match=r"compute capability 8\.0 or later.*has 7\.5\."):
            call.plan(traits)
        return
    plan = call.plan(traits)
    assert plan.generation <= traits.capability
    assert 48 << 10 <= plan.shared <= traits.shared_per_block
    plan = call.plan(ptx.DEVICES["RTX 4090"])  # the smallest
    with pytest.raises(RuntimeError) as refused:
        call.plan(traits._replace(shared_per_block=plan.shared - 1))
    assert str(refused.value) == (
        f"bigkernel.attention_fwd: {plan.name.decode()} takes {plan.shared} bytes of shared memory "
        f"for a block, and this GPU (compute capability {traits.capability / 10}) has "
        f"{plan.shared - 1}. bigkernel.use_backend('torch') computes it in PyTorch."
    )
    narrow = build(replace(case, dim=32))
    call = attention_ptx.Call(narrow.q, narrow.k, narrow.v, case.params(narrow))
    assert call.plan(traits._replace(shared_per_block=plan.shared - 1)).shared < plan.shared


def test_attention_kernel_launch_asks_the_device():
    """The launcher itself: the same kernel on another GPU, a sentence on one that is too old."""
    case = Case(dtype="bf16", dim=64, batch=1, heads=(1, 1))
    inputs = build(case)
    results = {}
    for name in ("A100", "H100"):
        call = attention_ptx.Call(inputs.q, inputs.k, inputs.v, case.params(inputs))
        out, lse = torch.empty_like(inputs.dout), torch.empty(*inputs.q.shape[:3], 2)
        call.args.out, call.args.lse = call.view(out, "out"), call.view_lse(lse, "lse")
        call.run("attention_fwd_run", ptx.DEVICES[name])
        results[name] = out, lse, attention_ptx.launches[0].kernel
    (out, lse, kernel), again = results["A100"], results["H100"]
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
    assert kernel == again[2]
    with pytest.raises(RuntimeError, match=r"attention_fwd_kernel<bf16> is for GPUs of compute"):
        call.run("attention_fwd_run", ptx.DEVICES["T4"])
    assert attention_ptx.launches == []


def test_attention_kernel_grid_that_does_not_exist():
    case = Case(dtype="bf16", dim=64)
    inputs = build(case)
    call = attention_ptx.Call(inputs.q, inputs.k, inputs.v, case.params(inputs))
    call.args.batch = call.args.heads_q = 1 << 16
    with pytest.raises(RuntimeError, match="65536 sequences of 65536 heads and up to 19 rows take"):
        call.plan()


def test_attention_kernel_failed_launch_is_named():
    """The emulator says what is wrong, the launcher which kernel and grid."""
    case = Case(dtype="bf16", dim=64)
    inputs = build(case)
    call = attention_ptx.Call(inputs.q, inputs.k, inputs.v, case.params(inputs))
    short = torch.empty_like(inputs.q)[:, :, :-1]
    call.args.out, call.args.lse = (
        call.view(short, "out"),
        call.view_lse(torch.empty(2, 4, 19, 2), "lse"),
    )
    library = attention_ptx.host().library
    with (
        pytest.raises(ptx.OutOfBounds, match="'out'"),
        attention_ptx.host().running(call.memory),
    ):
        error = library.attention_fwd_run(ctypes.byref(call.args), 0).decode()
    assert "launching CUDA kernel attention_fwd_kernel<bf16> with grid (8, 1, 1)" in error


@pytest.mark.parametrize(
    "bounds", [(-5, 3, 40), (0, 30, 10), (0, 1 << 30, 1 << 31 - 1), (7, 7, 7)], ids=str
)
def test_attention_kernel_wrong_cu_seqlens(bounds):
    """Bounds on the device cannot be checked before the launch; they reach no other memory."""
    q, k, v = (torch.randn(20, 2, 64).bfloat16() for _ in range(3))
    cu = torch.tensor(bounds, dtype=torch.int64).clamp(-(2**31), 2**31 - 1).int()
    params = Params(None, None, None, cu, cu, 20, 20, Rule(0.125, causal=True))
    out, _ = attention_ptx.attention_fwd(q, k, v, *params.arguments)
    assert out.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_attention_kernel_offsets_of_64_bits(dtype):
    """Heads and rows more than 2^31 elements apart. The memory between is never touched."""
    rows, dim, far = 3, 32, (1 << 31) + 8
    room = torch.empty(far * 2 + rows * dim, dtype=DTYPES[dtype])
    x = room.as_strided((1, 2, rows, dim), (0, far, dim, 1))
    x.copy_(torch.randn(1, 2, rows, dim))
    rest = Params(None, None, None, None, None, rows, rows, Rule(0.2)).arguments
    out, lse = attention_ptx.attention_fwd(x, x, x, *rest)
    near = x.clone(memory_format=torch.contiguous_format)
    same, same_lse = attention_ptx.attention_fwd(near, near, near, *rest)
    assert torch.equal(out, same)
    assert torch.equal(lse, same_lse)


@pytest.mark.parametrize("together", [1, 2, 3, 5, 7])
def test_attention_kernel_order_of_blocks(together):
    """Every tile of every head once; of the heads that go together the longest tiles first, and
    heads that are left over before the others."""
    heads, tiles = 7, 3
    places = (ctypes.c_uint32 * 2 * (heads * tiles))()
    attention_ptx.host().library.attention_places(heads * tiles, heads, tiles, together, places)
    found = [tuple(place) for place in places]
    first = heads % together
    bounds = [0, first, *range(first + together, heads + 1, together)]
    expected = [
        (head, rank)
        for begin, end in itertools.pairwise(bounds)
        for rank in range(tiles)
        for head in range(begin, end)
    ]
    assert found == expected


def test_attention_kernel_heads_together():
    """Under a causal mask those whose keys and values fit into the L2 cache, else one."""

    def together(heads, length, batch=1, **options):
        args = cuda_schedule.arguments(cuda_schedule.Shape(*heads, 128, (length,), batch))
        for name, value in options.items():
            setattr(args, name, value)
        forward, keys, queries = (
            cuda_schedule.plan_of(args, role, ptx.DEVICES["H100"]).together
            for role in cuda_schedule.ROLES
            if not attention_ptx.split(args, splits=1)
        )
        assert forward == queries
        return forward, keys

    assert together((24, 24), 4608) == (22, 22)  # of 2.25 MiB, in 50
    assert together((24, 24), 4608, right=-1) == (1, 1)
    assert together((24, 24), 4608, left=1024) == (1, 1)
    assert together((32, 8), 2048, batch=4) == (128, 12)  # four heads share 1 MiB; or stream 4
    assert together((32, 8), 1 << 18) == (4, 1)  # the heads that share keys stay side by side
    assert together((2, 2), 128) == (2, 2)
