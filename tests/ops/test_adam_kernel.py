"""Adam's CUDA kernels, compiled by nvcc and launched by their own C++ launcher, in the emulator.

Against the reference: dtypes, masters, bf16 moments, amsgrad, maximize, both decays, lr on the
device, several groups, clipping, unscaling, found_inf, stochastic rounding, odd sizes,
misalignment, many tensors. And what the update reads and writes, counted.
"""

import adam_extremes
import adam_ptx
import pytest
import torch
from adam_ptx import BF16, F16, F32, HYPER, SIZES, flags_of, make, step

from bigkernel.ops.adam import reference
from bigkernel.testing import ptx
from bigkernel.testing.tolerance import assert_as_accurate

VARIANTS = {
    "adamw": {},
    "adam-l2": {"decoupled": False},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.0},
}
# parameter, gradient, moments, masters
DTYPES = {
    "fp32": (F32, F32, F32, False),
    "fp32-bf16-moments": (F32, F32, BF16, False),
    "fp32-bf16-gradient": (F32, BF16, F32, False),
    "fp32-fp16-gradient": (F32, F16, F32, False),
    "bf16": (BF16, BF16, F32, False),
    "bf16-bf16-moments": (BF16, BF16, BF16, False),
    "bf16-masters": (BF16, BF16, F32, True),
    "bf16-masters-bf16-moments": (BF16, BF16, BF16, True),
    "bf16-masters-fp32-gradient": (BF16, F32, F32, True),
    "fp16": (F16, F16, F32, False),
    "fp16-bf16-moments": (F16, F16, BF16, False),
    "fp16-masters": (F16, F16, F32, True),
}


@pytest.fixture(scope="module")
def host():
    if ptx.nvcc() is None:
        pytest.skip("nvcc is not on the path")
    return adam_ptx.host()


def clone(lists):
    return {k: [t.clone() for t in v] for k, v in lists.items()}


def to64(lists):
    wide = {k: [t.double() for t in v] for k, v in lists.items()}
    wide["params"] = [t.double() for t in lists["masters"] or lists["params"]]
    return wide | {"masters": [], "steps": [t.clone() for t in lists["steps"]]}


def options_of(options):
    return {name: options.get(name) for name in
            ("max_norm", "total_norm", "grad_scale", "found_inf", "seed")}  # fmt: skip


def expected(lists, groups=None, **options):
    """One step by the reference; returns the norm."""
    order = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "steps")
    groups = groups or [(len(lists["params"]), HYPER | options)]
    return reference.adam_step_(
        *(lists[name] for name in order),
        [n for n, _ in groups],
        [flags_of(g) for _, g in groups],
        [float(g["lr"]) for _, g in groups],
        [],
        *([g[n] for _, g in groups] for n in ("beta1", "beta2", "eps", "weight_decay")),
        **options_of(options),
    )


def assert_lists_as_accurate(actual, exact, same):
    for name in actual:
        wanted = exact["params"] if name == "masters" else exact[name]
        for a, e, s in zip(actual[name], wanted, same[name], strict=bool(actual[name])):
            assert_as_accurate(a, e.double(), s)


def assert_same_lists(a, b):
    for name in a:
        for i, (x, y) in enumerate(zip(a[name], b[name], strict=True)):
            assert torch.equal(x, y), f"{name}[{i}] differs"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_adam_kernel_matches_reference(host, dtypes, variant):
    options = VARIANTS[variant]
    ours = make(DTYPES[dtypes], amsgrad=options.get("amsgrad", False))
    exact, same = to64(ours), clone(ours)
    _, launches = step(host, ours, **options)
    expected(exact, **options)
    expected(same, **options)
    assert_lists_as_accurate(ours, exact, same)
    assert all(s == 4 for s in ours["steps"])
    assert len(launches) == 2  # prepare, update


def test_adam_kernel_groups_and_mixed_dtypes(host):
    """Several groups and every dtype in one call; lr as a tensor on the device."""
    parts = [
        make(DTYPES[d], amsgrad=k == 1, seed=k) for k, d in enumerate(["fp32", "bf16", "fp16"])
    ]
    ours = {name: [t for part in parts for t in part[name]] for name in parts[0]}
    groups = [
        (len(SIZES), HYPER | {"lr": torch.tensor(0.05)}),
        (len(SIZES), HYPER | {"amsgrad": True, "beta1": 0.8}),
        (len(SIZES), HYPER | {"lr": torch.tensor(0.02, dtype=torch.float64), "eps": 1e-3}),
    ]
    exact, same = to64(ours), clone(ours)
    _, launches = step(host, ours, groups)
    expected(exact, groups)
    expected(same, groups)
    assert_lists_as_accurate(ours, exact, same)
    assert len(launches) == 4  # one update for each combination of dtypes


@pytest.mark.parametrize("dtypes", ["fp32", "bf16-masters", "fp16"])
@pytest.mark.parametrize("max_norm", [0.5, 1e9, 0.0])
def test_adam_kernel_clips(host, dtypes, max_norm):
    options = {"max_norm": max_norm, "grad_scale": torch.tensor(8.0)}
    ours = make(DTYPES[dtypes])
    exact, same = to64(ours), clone(ours)
    norm, launches = step(host, ours, **options)
    want = expected(exact, **options)
    expected(same, **options)
    torch.testing.assert_close(norm, want.float(), rtol=1e-6, atol=0)
    assert_lists_as_accurate(ours, exact, same)
    assert len(launches) == 3  # norm, prepare, update


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
def test_adam_kernel_norm_from_end_to_end(host, dtype):
    """Each decade from 1e-38 to 1e38, as far as the dtype holds it."""
    for scale in adam_extremes.GRADIENT_SCALES:
        grads = adam_extremes.gradients_of_scale(scale, dtype)
        lists = make((dtype, dtype, F32, False), sizes=[g.shape for g in grads])
        norm, launches = step(host, lists | {"grads": grads}, only_norm=True)
        adam_extremes.assert_norm(norm, grads)
        assert len(launches) == 2


@pytest.mark.parametrize("variant", adam_extremes.VARIANTS)
@pytest.mark.parametrize("dtypes", adam_extremes.DTYPES)
def test_adam_kernel_extremes_are_as_in_torch(host, dtypes, variant):
    """NaN, infinities, the largest and the smallest numbers, once in every input."""
    options = adam_extremes.HYPER | adam_extremes.VARIANTS[variant]
    lists = adam_extremes.extreme_lists(dtypes, options.get("amsgrad", False))
    wanted = adam_extremes.torch_step(lists, options)
    step(host, lists, **options)
    adam_extremes.assert_like_torch(lists, wanted)


def test_adam_kernel_total_norm_is_taken(host):
    ours, options = make(DTYPES["fp32"]), {"max_norm": 1.0, "total_norm": torch.tensor(50.0)}
    exact, same = to64(ours), clone(ours)
    norm, _ = step(host, ours, **options)
    expected(exact, **options)
    expected(same, **options)
    assert norm == 50
    assert_lists_as_accurate(ours, exact, same)


@pytest.mark.parametrize("reason", ["found_inf", "norm"])
def test_adam_kernel_skips(host, reason):
    """A skipped step changes nothing, the step counts included."""
    lists = make(DTYPES["bf16-masters"], amsgrad=True)
    options = {"amsgrad": True}
    if reason == "norm":
        lists["grads"][5][17] = float("inf")
        options["max_norm"] = 1.0
    else:
        options["found_inf"] = torch.tensor([1.0])
    before = clone(lists)
    step(host, lists, **options)
    assert_same_lists(lists, before)


def test_adam_kernel_found_inf_of_zero_goes_on(host):
    lists = make(DTYPES["fp32"])
    step(host, lists, found_inf=torch.tensor([0.0]))
    assert all(s == 4 for s in lists["steps"])


@pytest.mark.parametrize("dtypes", ["bf16", "bf16-bf16-moments"])
def test_adam_kernel_rounds_stochastically(host, dtypes):
    """The same random bits as the reference: equal but where fp32 differed before rounding."""
    seed = torch.tensor(0x1234_5678_9ABC, dtype=torch.int64)
    ours = make(DTYPES[dtypes])
    same, nearest = clone(ours), clone(ours)
    step(host, ours, seed=seed)
    expected(same, seed=seed)
    expected(nearest)
    differ = sum((a != b).sum() for a, b in zip(ours["params"], same["params"], strict=True))
    total = sum(p.numel() for p in ours["params"])
    assert differ <= total / 500
    changed = sum((a != b).sum() for a, b in zip(ours["params"], nearest["params"], strict=True))
    assert changed > total / 5


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_adam_kernel_misaligned_tensors(host, offset):
    lists = make(DTYPES["bf16"], sizes=[(1000,), (77,)])
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        for i, t in enumerate(lists[name]):
            room = torch.zeros(t.numel() + offset, dtype=t.dtype)
            room[offset:] = t
            lists[name][i] = room[offset:]
    aligned = clone(lists)
    step(host, lists)
    step(host, aligned)
    assert_same_lists(lists, aligned)


def test_adam_kernel_many_tensors(host):
    """More tensors than one table holds."""
    sizes = [(k % 5 + 1,) for k in range(390)]
    ours = make(DTYPES["fp32"], sizes=sizes)
    exact, same = to64(ours), clone(ours)
    _, launches = step(host, ours, max_norm=1.0)
    expected(exact, max_norm=1.0)
    expected(same, max_norm=1.0)
    assert_lists_as_accurate(ours, exact, same)
    assert len(launches) == 1 + 2 + 2


@pytest.mark.parametrize(
    ("dtypes", "variant", "width"),
    # bytes an element: reads param (or master), grad, m, v; writes param, m, v (and master)
    [
        ("fp32", {}, 16 + 12),
        ("fp32", {"amsgrad": True}, 20 + 16),
        ("bf16", {}, 12 + 10),
        ("bf16-bf16-moments", {}, 8 + 6),
        ("bf16-masters", {}, 14 + 14),
        ("bf16", {"seed": torch.tensor(5)}, 12 + 10),
    ],
    ids=["fp32", "fp32-amsgrad", "bf16", "bf16-bf16-moments", "bf16-masters", "bf16-stochastic"],
)
def test_adam_kernel_traffic(host, dtypes, variant, width):
    """The update moves at most 1.05 times the sectors that its arrays fill."""
    n = 40_000
    lists = make(DTYPES[dtypes], sizes=[(n,)], amsgrad=variant.get("amsgrad", False))
    _, launches = step(host, lists, **variant)
    counters = launches[-1].counters
    assert n * width / 32 <= counters.global_sectors <= 1.05 * n * width / 32
    assert counters.global_atomics == 0


def test_adam_kernel_norm_traffic(host):
    n = 40_000
    lists = make(DTYPES["bf16"], sizes=[(n,)])
    _, launches = step(host, lists, only_norm=True)
    assert launches[0].counters.loads["grads[0]"].sectors == n * 2 / 32
    assert launches[0].counters.bank_conflict_ratio == 1.0


def test_adam_kernel_out_of_bounds_is_caught(host):
    """The emulator does check these launches: a gradient that is too short is found."""
    lists = make(DTYPES["fp32"], sizes=[(100,)])
    lists["grads"][0] = lists["grads"][0][:99].clone()
    with pytest.raises(ptx.OutOfBounds, match=r"'grads\[0\]' \(float32 \[99\]\)"):
        step(host, lists)


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", DTYPES)
def test_adam_kernel_every_length(host, dtypes):
    sizes = [(n,) for n in [*range(70), 255, 256, 257, 1023, 4095, 4096, 4097, 8193]]
    ours = make(DTYPES[dtypes], sizes=sizes)
    exact, same = to64(ours), clone(ours)
    step(host, ours, max_norm=1.0)
    expected(exact, max_norm=1.0)
    expected(same, max_norm=1.0)
    assert_lists_as_accurate(ours, exact, same)


def test_adam_kernel_of_a_device_that_is_too_old():
    lists = make((F32, F32, F32, False))
    before = lists["params"][0].clone()
    for options, kernel in (({}, "update"), ({"max_norm": 1.0}, "norm")):
        with pytest.raises(RuntimeError, match=rf"adam_{kernel}_kernel is for .*8\.0.* has 7\.5"):
            step(adam_ptx.host(), lists, device="T4", **options)
    assert torch.equal(lists["params"][0], before)
    step(adam_ptx.host(), lists, device="B200")
