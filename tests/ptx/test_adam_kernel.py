"""Adam's CUDA kernels, compiled by nvcc and launched by their own C++ launcher, in the emulator.

Against the reference: dtypes, masters, bf16 moments, amsgrad, maximize, both decays, lr on the
device, several groups, clipping, unscaling, found_inf, stochastic rounding, odd sizes,
misalignment, many tensors. And what the update reads and writes, counted.
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from bigkernel.reference import adam as reference
from bigkernel.testing import ptx
from bigkernel.testing.tolerance import assert_as_accurate

ROOT = Path(__file__).resolve().parents[2]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [(0,), (), (1,), (7,), (15, 3), (512,), (1030,), (33, 131)]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.05}
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
TYPE_CODES = {F32: 0, BF16: 1, F16: 2}  # DType in csrc/common/dtypes.h
P, I32, I64, F64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double


class AdamTensor(ctypes.Structure):
    _fields_ = (
        *((name, P) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "largest", "master")),
        *(("step", P), ("numel", I64), ("param_type", I32), ("grad_type", I32)),
        *(("moment_type", I32), ("group", I32), ("index", I32)),
    )


class DeviceScalar(ctypes.Structure):
    _fields_ = (("data", P), ("is_double", I32))


class AdamGroup(ctypes.Structure):
    _fields_ = (("flags", I32), *((n, F64) for n in ("lr", "beta1", "beta2", "eps", "decay")),
                ("lr_tensor", DeviceScalar))  # fmt: skip


class AdamCall(ctypes.Structure):
    _fields_ = (
        *((name, DeviceScalar) for name in ("grad_scale", "found_inf", "total_norm")),
        *(("seed", P), ("max_norm", F64), ("norm", P), ("control", P), ("partials", P)),
        *(("partial_count", I32), ("scalars", P)),
    )


@pytest.fixture(scope="module")
def host():
    sources = [ROOT / "csrc/adam/adam.cu", ROOT / "tests/ptx/adam_shim.cpp"]
    host = ptx.HostLibrary(sources, flags=["-std=c++20", "-I", str(ROOT / "csrc")])
    host.library.adam_partials.restype = I64
    host.library.adam_run.restype = ctypes.c_char_p
    sizes = (I64 * 4)()
    host.library.adam_sizes(sizes)
    mine = [ctypes.sizeof(s) for s in (AdamTensor, AdamGroup, AdamCall)]
    assert list(sizes)[:3] == mine, "the structures in csrc/adam have changed"
    host.scalars_size = sizes[3]
    return host


def make(dtypes, sizes=SIZES, amsgrad=False, seed=0, steps=3.0):
    """The lists of one group, as after some steps."""
    param, grad, moment, masters = dtypes
    g = torch.Generator().manual_seed(seed)
    normal = [torch.randn(s, generator=g) for s in sizes]
    return {
        "params": [x.to(param, copy=True) for x in normal],
        "grads": [torch.randn(s, generator=g).to(grad) for s in sizes],
        "exp_avgs": [(torch.randn(s, generator=g) * 0.1).to(moment) for s in sizes],
        "exp_avg_sqs": [(torch.rand(s, generator=g) * 0.1).to(moment) for s in sizes],
        "steps": [torch.tensor(steps) for _ in sizes],
        "max_exp_avg_sqs": [(torch.rand(s, generator=g) * 0.1).to(moment) for s in sizes]
        if amsgrad
        else [],
        "masters": list(normal) if masters else [],
    }


def clone(lists):
    return {k: [t.clone() for t in v] for k, v in lists.items()}


def to64(lists):
    wide = {k: [t.double() for t in v] for k, v in lists.items()}
    wide["params"] = [t.double() for t in lists["masters"] or lists["params"]]
    return wide | {"masters": [], "steps": [t.clone() for t in lists["steps"]]}


def flags_of(options):
    return (
        reference.AMSGRAD * options.get("amsgrad", False)
        + reference.MAXIMIZE * options.get("maximize", False)
        + reference.DECOUPLED * options.get("decoupled", True)
    )


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


def step(host, lists, groups=None, only_norm=False, **options):
    """One step by the kernels; returns the norm and the launches."""
    memory, kept = ptx.Memory(), []

    def at(tensor, name=None):
        return memory.register(tensor, name)

    def scalar(value):
        if value is None:
            return DeviceScalar(None, 0)
        kept.append(value)
        return DeviceScalar(at(value), value.dtype == torch.float64)

    groups = groups or [(len(lists["params"]), HYPER | options)]
    group_of = [k for k, (n, _) in enumerate(groups) for _ in range(n)]
    maxima, masters = iter(lists["max_exp_avg_sqs"]), iter(lists["masters"])
    entries = []
    for i, param in enumerate(lists["params"]):
        names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
        arrays = [at(lists[n][i], f"{n}[{i}]") for n in names]
        amsgrad = groups[group_of[i]][1].get("amsgrad", False)
        arrays.append(at(next(maxima), f"maxima[{i}]") if amsgrad else None)
        narrow = lists["masters"] and param.dtype != F32
        arrays.append(at(next(masters), f"masters[{i}]") if narrow else None)
        types = [TYPE_CODES[lists[n][i].dtype] for n in ("params", "grads", "exp_avgs")]
        step_at = at(lists["steps"][i], f"steps[{i}]")
        entries.append(AdamTensor(*arrays, step_at, param.numel(), *types, group_of[i], i))
    tensors = (AdamTensor * len(entries))(*entries)
    device_groups = (AdamGroup * len(groups))(
        *(
            AdamGroup(
                *(flags_of(g), float(g["lr"]), g["beta1"], g["beta2"], g["eps"]),
                *(g["weight_decay"], scalar(g["lr"] if torch.is_tensor(g["lr"]) else None)),
            )
            for _, g in groups
        )
    )
    measure = options.get("max_norm") is not None and options.get("total_norm") is None
    measure = 2 if only_norm else int(measure)
    partials = host.library.adam_partials(tensors, I64(len(entries))) if measure else 0
    norm = torch.full((), torch.nan)
    scratch = [
        np.full(n, 255, np.uint8) for n in (4, 8 * partials, host.scalars_size * len(entries))
    ]
    seed, max_norm = options.get("seed"), options.get("max_norm")
    call = AdamCall(
        *(scalar(options.get(n)) for n in ("grad_scale", "found_inf", "total_norm")),
        *(None if seed is None else at(seed), -1.0 if max_norm is None else max_norm),
        *(at(norm), at(scratch[0]), at(scratch[1]), partials, at(scratch[2])),
    )
    with host.running(memory) as launches:
        run = host.library.adam_run
        error = run(tensors, I64(len(entries)), device_groups, I64(len(groups)),
                    ctypes.byref(call), measure)  # fmt: skip
    assert error == b""
    return norm, launches


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


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=["tiny", "huge"])
def test_adam_kernel_norm_of_extreme_gradients(host, scale):
    lists = make(DTYPES["fp32"])
    for g in lists["grads"]:
        g.mul_(scale)
    norm, launches = step(host, lists, only_norm=True)
    torch.testing.assert_close(norm, reference.adam_norm(lists["grads"], None), rtol=1e-6, atol=0)
    assert len(launches) == 2


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
