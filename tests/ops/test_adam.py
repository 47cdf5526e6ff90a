"""The Adam op. Which feature has which test:

Adam, AdamW, amsgrad, maximize, decay      reference_is_torch_optim, matches_reference
dtypes, masters, bf16 moments, mixed lists matches_reference
1,000 steps                                thousand_steps
lr and step as numbers or tensors          lr_and_step
lengths, misalignment, instruction sets    lengths_and_misalignment
layouts, gaps                              noncontiguous, rejects_expanded
clipping, norm                             clipping, norm_*
unscaling, found_inf, skipping             unscaling, skips
NaN, infinities, extremes in each input    extremes_*, norm_from_end_to_end, odd_scalars
stochastic rounding                        stochastic_*
no read-back, compile, opcheck             opcheck, compile
float64, forced backends                   float64_*
bad input                                  rejects_bad_input
"""

import copy
import functools

import adam_extremes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bigkernel
from bigkernel import ops
from bigkernel.backend import FallbackWarning, use_backend
from bigkernel.ops.adam import AdamGroup, reference
from bigkernel.testing.tolerance import assert_as_accurate

# 0 and 1; around the lanes of every instruction set; around one unit of 512; several units.
SIZES = [(0,), (), (1,), (7,), (15, 3), (512,), (513,), (1030,), (33, 100)]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.05}
VARIANTS = {
    "adamw": {"decoupled": True},
    "adam-l2": {"decoupled": False},
    "adam-no-decay": {"decoupled": False, "weight_decay": 0.0},
    "amsgrad-adamw": {"amsgrad": True, "decoupled": True},
    "amsgrad-adam-l2": {"amsgrad": True, "decoupled": False},
    "amsgrad-no-decay": {"amsgrad": True, "weight_decay": 0.0},
    "maximize": {"maximize": True},
}
# parameter, gradient, moments, masters
DTYPES = {
    "fp32": (F32, F32, F32, False),
    "fp32-bf16-moments": (F32, F32, BF16, False),
    "fp32-bf16-gradient": (F32, BF16, F32, False),
    "bf16": (BF16, BF16, F32, False),
    "bf16-masters": (BF16, BF16, F32, True),
    "bf16-masters-bf16-moments": (BF16, BF16, BF16, True),
    "bf16-masters-fp32-gradient": (BF16, F32, F32, True),
    "fp16": (F16, F16, F32, False),
    "fp16-masters": (F16, F16, F32, True),
}


pytestmark = pytest.mark.usefixtures("one_thread")  # the thread count has a test of its own


def make(dtypes, sizes=SIZES, amsgrad=False, seed=0, steps=3.0):
    """The lists of one group, as after some steps, keyed as adam_step_ names them."""
    param, grad, moment, masters = dtypes
    g = torch.Generator().manual_seed(seed)
    normal = [torch.randn(s, generator=g) for s in sizes]
    lists = {
        "params": [x.to(param) for x in normal],
        "grads": [torch.randn(s, generator=g).to(grad) for s in sizes],
        "exp_avgs": [(torch.randn(s, generator=g) * 0.1).to(moment) for s in sizes],
        "exp_avg_sqs": [(torch.rand(s, generator=g) * 0.1).to(moment) for s in sizes],
        "steps": [torch.tensor(steps) for _ in sizes],
    }
    if amsgrad:
        lists["max_exp_avg_sqs"] = [(torch.rand(s, generator=g) * 0.1).to(moment) for s in sizes]
    if masters:
        lists["masters"] = list(normal)
    return lists


def to64(lists):
    """The same problem in float64 without masters: the exact answer is what the masters hold."""
    wide = {k: [t.double() for t in v] for k, v in lists.items() if k not in ("masters", "steps")}
    if "masters" in lists:
        wide["params"] = [t.double() for t in lists["masters"]]
    return wide | {"steps": [t.clone() for t in lists["steps"]]}


def step(lists, backend=None, **options):
    with use_backend(backend):
        return ops.adam_step_(**lists, **(HYPER | options))


def clone(lists):
    return {k: [t.clone() for t in v] for k, v in lists.items()}


def assert_same_lists(a, b):
    for name in a:
        for i, (x, y) in enumerate(zip(a[name], b[name], strict=True)):
            assert torch.equal(x, y), f"{name}[{i}] differs"


def assert_lists_as_accurate(actual, exact, same):
    """The rule of assert_as_accurate over each list as a whole: PyTorch's error on a tensor of one
    element may happen to be nothing.
    """

    def flat(tensors):
        return torch.cat([t.flatten() for t in tensors])

    for name in actual:
        wanted = exact["params"] if name == "masters" else exact[name]
        assert_as_accurate(flat(actual[name]), flat(wanted).double(), flat(same[name]))


def assert_norm(actual, exact):
    """Within two ulps."""
    torch.testing.assert_close(actual.double(), exact, rtol=2 * torch.finfo(F32).eps, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adam_reference_is_torch_optim(variant):
    """The definition against torch.optim in float64: equal to rounding after 8 steps."""
    options = HYPER | {"amsgrad": False, "maximize": False, "decoupled": True} | VARIANTS[variant]
    lists = to64(make(DTYPES["fp32"], amsgrad=options["amsgrad"], steps=0.0))
    for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        for t in lists.get(name, []):
            t.zero_()
    theirs = [torch.nn.Parameter(t.clone()) for t in lists["params"]]
    optimizer = (torch.optim.AdamW if options["decoupled"] else torch.optim.Adam)(
        theirs,
        lr=options["lr"],
        betas=(options["beta1"], options["beta2"]),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        amsgrad=options["amsgrad"],
        maximize=options["maximize"],
        foreach=False,
    )
    g = torch.Generator().manual_seed(5)
    for _ in range(8):
        lists["grads"] = [torch.randn(t.shape, generator=g).double() for t in theirs]
        for p, grad in zip(theirs, lists["grads"], strict=True):
            p.grad = grad.clone()
        optimizer.step()
        step(lists, "torch", **VARIANTS[variant])
    for p, ours, s in zip(theirs, lists["params"], lists["steps"], strict=True):
        torch.testing.assert_close(ours, p.detach(), rtol=1e-12, atol=1e-12)
        assert s == 8


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_adam_matches_reference(cpu_isa, dtypes, variant):
    options = VARIANTS[variant]
    ours = make(DTYPES[dtypes], amsgrad=options.get("amsgrad", False))
    exact, same = to64(ours), clone(ours)
    step(ours, "cpu", **options)
    step(exact, "torch", **options)
    step(same, "torch", **options)
    assert_lists_as_accurate(ours, exact, same)
    assert all(s == 4 for s in ours["steps"])


def test_adam_mixed_list(cpu_isa):
    """Every dtype in one call gives what each gives alone."""
    parts = [make(DTYPES[d], seed=i) for i, d in enumerate(DTYPES) if not DTYPES[d][3]]
    together = {k: [t.clone() for part in parts for t in part[k]] for k in parts[0]}
    for part in parts:
        step(part, "cpu")
    step(together, "cpu")
    assert_same_lists({k: [t for part in parts for t in part[k]] for k in parts[0]}, together)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_adam_steps_that_differ_within_a_group(backend):
    """Each tensor has a count of its own, also beside one that is a step ahead or behind."""
    counts = [0.0, 1.0, 0.0, 2.0, 2.0, 1.0, 7.0]
    apart = [make(DTYPES["fp32"], [(5,)], seed=i, steps=n) for i, n in enumerate(counts)]
    together = {k: [part[k][0].clone() for part in apart] for k in apart[0]}
    for part in apart:
        step(part, backend)
    step(together, backend)
    assert_same_lists({k: [part[k][0] for part in apart] for k in apart[0]}, together)


@functools.cache
def _torch_thousand_steps(kind):
    """Start, gradients, and where torch.optim ends in float64 and, fused, in float32."""
    n, g = 1013, torch.Generator().manual_seed(7)
    start = torch.randn(n, generator=g)
    grads = torch.randn(1000, n, generator=g)
    theirs = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    ends = []
    for dtype, options in ((F64, {"foreach": False}), (F32, {"fused": True})):
        p = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = theirs([p], weight_decay=DECAY[kind], **options)
        for grad in grads:
            p.grad = grad.to(dtype)
            optimizer.step()
        ends.append(p.detach())
    return start, grads, *ends


DECAY = {"adamw": 0.01, "adam": 0.0}


@pytest.mark.parametrize("kind", DECAY)
def test_adam_thousand_steps(cpu_isa, kind):
    """After 1,000 steps each element is within twice the largest error of torch's fused kernel."""
    start, grads, exact, fused = _torch_thousand_steps(kind)
    n = start.numel()
    lists = {
        "params": [start.clone()],
        "exp_avgs": [torch.zeros(n)],
        "exp_avg_sqs": [torch.zeros(n)],
        "steps": [torch.zeros(())],
    }
    for grad in grads:
        ops.adam_step_(grads=[grad], **lists, weight_decay=DECAY[kind], decoupled=kind == "adamw")
    assert_as_accurate(lists["params"][0], exact, fused)


def test_adam_lr_and_step_as_numbers_or_tensors():
    want = make(DTYPES["fp32"])
    lists = [clone(want) for _ in range(4)]
    step(want)
    step(lists[0], lr=torch.tensor(HYPER["lr"], dtype=F64))
    step(lists[1], lr=torch.tensor([HYPER["lr"]], dtype=F64), backend="cpu")
    step(lists[2] | {"steps": 4})  # this step's number: three were done
    assert_same_lists(want, lists[0])
    assert_same_lists(want, lists[1])
    del want["steps"], lists[2]["steps"]
    assert_same_lists(want, lists[2])
    single = step(lists[3], lr=torch.tensor(HYPER["lr"]))  # float32
    assert single is None
    for a, b in zip(lists[3]["params"], want["params"], strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 70) | st.integers(500, 530),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.sampled_from(["fp32", "bf16", "fp16", "bf16-masters", "fp32-bf16-moments"]),
    st.booleans(),
)
def test_adam_lengths_and_misalignment(n, offsets, dtypes, amsgrad):
    """Any length at any offset from an aligned address; nothing is written beside it."""
    whole = make(DTYPES[dtypes], [(n + 8,), (2000,)], amsgrad=amsgrad)
    shifts = dict(zip(["params", "grads", "exp_avgs", "exp_avg_sqs"], offsets, strict=True))
    for isa in bigkernel.cpu_isas():
        buffers = clone(whole)
        views = {
            name: buffers[name]
            if name == "steps"
            else [buffers[name][0][s : s + n], buffers[name][1]]
            for name, s in ((name, shifts.get(name, 1)) for name in buffers)
        }
        apart, exact, same = clone(views), to64(views), clone(views)
        with bigkernel.use_cpu_isa(isa):
            step(views, "cpu", amsgrad=amsgrad)
            step(apart, "cpu", amsgrad=amsgrad)
        step(exact, "torch", amsgrad=amsgrad)
        step(same, "torch", amsgrad=amsgrad)
        assert_same_lists(views, apart)
        assert_lists_as_accurate(views, exact, same)
        for name in set(buffers) - {"steps"}:
            s = shifts.get(name, 1)
            assert torch.equal(buffers[name][0][:s], whole[name][0][:s])
            assert torch.equal(buffers[name][0][s + n :], whole[name][0][s + n :])


def test_adam_noncontiguous(cpu_isa):
    """Dense layouts in place; differing strides and gaps give the same result."""
    shape = (4, 6, 5, 3)
    want = make(DTYPES["bf16-masters"], [shape], amsgrad=True)
    layouts = {
        "channels_last": lambda t: t.to(memory_format=torch.channels_last),
        "transposed": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "gaps": lambda t: torch.stack((t, t), -1)[..., 0],
        "contiguous": torch.clone,
    }
    cases = []
    for layout in layouts.values():
        cases.append({k: [layout(t) if t.dim() else t.clone() for t in want[k]] for k in want})
    mixed = list(layouts.values())
    cases.append(
        {
            k: [mixed[(i + 1) % 4](t) if t.dim() else t.clone() for t in want[k]]
            for i, k in enumerate(want)
        }
    )
    step(want, "cpu", amsgrad=True)
    for case in cases:
        before = {k: [t.stride() for t in v] for k, v in case.items()}
        step(case, "cpu", amsgrad=True)
        assert_same_lists(want, case)
        assert before == {k: [t.stride() for t in v] for k, v in case.items()}


def test_adam_thread_count_changes_nothing():
    lists = make(DTYPES["fp32"], [(70_001,), (513,), (200_000,)])
    other = clone(lists)
    torch.set_num_threads(2)
    a = step(lists, max_norm=1.0)
    torch.set_num_threads(1)
    b = step(other, max_norm=1.0)
    assert torch.equal(a, b)
    assert_same_lists(lists, other)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, float("inf")])
def test_adam_clipping(backend, max_norm):
    """As clip_grad_norm_ before the step, over groups of different hyper-parameters."""
    lists = [make(DTYPES["fp32"], seed=1), make(DTYPES["bf16-masters"], seed=2, amsgrad=True)]
    hyper = [
        {"lr": 1e-2, "weight_decay": 0.0},
        {"lr": 1e-3, "beta1": 0.8, "amsgrad": True, "maximize": True, "decoupled": False},
    ]
    want = [clone(x) for x in lists]
    groups = [AdamGroup(**a, **b) for a, b in zip(lists, hyper, strict=True)]
    with use_backend(backend):
        norm = ops.adam_groups_step_(groups, max_norm=max_norm)
    grads = [g.double() for x in want for g in x["grads"]]
    total = torch.nn.utils.get_total_norm(grads)
    assert_norm(norm, total)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for x, options in zip(want, hyper, strict=True):
        x["grads"] = [g.double() * factor for g in x["grads"]]
        exact, same = to64(x), x | {"grads": [g.float() for g in x["grads"]]}
        with use_backend("torch"):
            ops.adam_step_(**exact, **options)
            ops.adam_step_(**same, **options)
        got = lists.pop(0)
        del got["grads"], exact["grads"], same["grads"]
        assert_lists_as_accurate(got, exact, same)


def test_adam_takes_a_norm_from_outside():
    lists = make(DTYPES["fp32"])
    other = clone(lists)
    norm = ops.adam_norm(lists["grads"])
    a = step(lists, max_norm=0.25)
    b = step(other, max_norm=0.25, total_norm=norm.reshape(1))
    assert torch.equal(a, norm)
    assert torch.equal(b, norm)
    assert_same_lists(lists, other)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_adam_norm_is_accurate(cpu_isa, dtype):
    grads = [g.to(dtype) for g in make(DTYPES["fp32"], [*SIZES, (100_003,)])["grads"]]
    grads.append(torch.randn(40, 30, dtype=dtype)[::2, ::3])  # gaps
    exact = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads]))
    assert_norm(ops.adam_norm(grads), exact)
    assert_norm(ops.adam_norm(grads, torch.tensor(8.0)), exact / 8)


@pytest.mark.parametrize("scale", [1e25, 1e-25, 1e-36])
def test_adam_norm_neither_overflows_nor_underflows(cpu_isa, scale):
    grads = [torch.randn(700) * scale, torch.zeros(600), torch.randn(3) * scale]
    exact = torch.linalg.vector_norm(torch.cat(grads).double())
    assert_norm(ops.adam_norm(grads), exact)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_adam_norm_from_end_to_end(cpu_isa, dtype):
    """Each decade from 1e-38 to 1e38, as far as the dtype holds it; on both backends."""
    for scale in adam_extremes.GRADIENT_SCALES:
        grads = adam_extremes.gradients_of_scale(scale, dtype)
        for backend in ("cpu", "torch"):
            with use_backend(backend):
                adam_extremes.assert_norm(ops.adam_norm(grads), grads)


@pytest.mark.parametrize("variant", adam_extremes.VARIANTS)
@pytest.mark.parametrize("dtypes", adam_extremes.DTYPES)
def test_adam_extremes_are_as_in_torch(cpu_isa, dtypes, variant):
    """NaN, infinities, the largest and the smallest numbers, once in every input."""
    options = adam_extremes.VARIANTS[variant]
    start = adam_extremes.extreme_lists(dtypes, options.get("amsgrad", False))
    wanted = adam_extremes.torch_step(start, options)
    for backend in ("cpu", "torch"):
        lists = clone(start)
        step(lists, backend, **adam_extremes.HYPER | options)
        adam_extremes.assert_like_torch(lists, wanted)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["grad_scale", "found_inf", "total_norm", "lr"])
def test_adam_odd_scalars_are_the_same_on_every_backend(cpu_isa, name, value):
    lists = make(DTYPES["fp32"], amsgrad=True)
    lists["grads"][1].fill_(float("inf"))
    other, options = clone(lists), {name: torch.tensor(value), "amsgrad": True}
    if name == "total_norm":
        options["max_norm"] = 1.0
    step(lists, "cpu", **options)
    step(other, "torch", **options)
    for key in lists:
        for a, b in zip(lists[key], other[key], strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("n", [1, 9, 600])
def test_adam_norm_of_non_finite_is_non_finite(cpu_isa, bad, n):
    grad = torch.ones(n)
    grad[n // 2] = bad
    assert not ops.adam_norm([torch.ones(5), grad]).isfinite()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtypes", ["fp32", "fp16-masters"])
def test_adam_unscaling(backend, dtypes):
    lists = make(DTYPES[dtypes])
    scaled = clone(lists)
    scaled["grads"] = [g * 1024 for g in lists["grads"]]
    given_grads = [g.clone() for g in scaled["grads"]]
    a = step(lists, backend, max_norm=2.0)
    b = step(scaled, backend, max_norm=2.0, grad_scale=torch.tensor(1024.0))
    assert torch.equal(a, b)
    for before, after in zip(given_grads, scaled.pop("grads"), strict=True):
        assert torch.equal(before, after), "gradients are only read"
    del lists["grads"]
    for name in lists:
        for x, y in zip(lists[name], scaled[name], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16-masters-bf16-moments"])
def test_adam_skips(backend, dtypes):
    """found_inf, and with clipping a norm that is not finite: nothing changes, nor the count."""
    lists = make(DTYPES[dtypes], amsgrad=True)
    before = clone(lists)
    seed = torch.tensor(3)
    step(lists, backend, amsgrad=True, found_inf=torch.ones(1), seed=seed)
    assert_same_lists(before, lists)
    lists["grads"][5].view(-1)[100] = float("inf")
    before = clone(lists)
    norm = step(lists, backend, amsgrad=True, max_norm=1.0, seed=seed)
    assert not norm.isfinite()
    assert_same_lists(before, lists)
    step(lists, backend, amsgrad=True, max_norm=1.0, total_norm=torch.tensor(float("nan")))
    assert_same_lists(before, lists)
    step(lists, backend, amsgrad=True, found_inf=torch.zeros(1))
    assert all(s == 4 for s in lists["steps"])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16-masters", "fp16"])
@pytest.mark.parametrize("seed", [None, 5])
def test_adam_zero_gradient_and_zero_lr_change_no_parameter(backend, dtypes, seed):
    lists = make(DTYPES[dtypes])
    if "masters" in lists:
        lists["params"] = [
            m.to(p.dtype) for m, p in zip(lists["masters"], lists["params"], strict=True)
        ]
    for grad in lists["grads"]:
        grad.zero_()
    before = clone(lists)
    step(lists, backend, lr=0.0, seed=None if seed is None else torch.tensor(seed))
    assert_same_lists({"params": before["params"]}, {"params": lists["params"]})


def _decay_only(sizes, seed):
    """A step that is x <- x - x / 512, exact in fp32, so that only the rounding is random."""
    g = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=g).to(BF16) for s in sizes]
    zeros = [[torch.zeros(s) for s in sizes] for _ in range(2)]
    return {
        "params": params,
        "grads": [torch.zeros(s, dtype=BF16) for s in sizes],
        "exp_avgs": zeros[0],
        "exp_avg_sqs": zeros[1],
        "steps": [torch.tensor(7.0) for _ in sizes],
    }


def test_adam_stochastic_rounding_is_the_same_everywhere(cpu_isa):
    sizes = [*SIZES, (2, 3, 4, 5), (3000,)]
    ours = _decay_only(sizes, 0)
    ours["params"][-2] = ours["params"][-2].to(memory_format=torch.channels_last)
    theirs, nearest = copy.deepcopy(ours), clone(ours)
    options = {"lr": 2.0**-9, "weight_decay": 1.0, "seed": torch.tensor(-(2**62) + 12345)}
    step(ours, "cpu", **options)
    step(theirs, "torch", **options)
    assert_same_lists(ours, theirs)
    step(nearest, "cpu", **options | {"seed": None})
    assert not all(
        torch.equal(a, b) for a, b in zip(ours["params"], nearest["params"], strict=True)
    )
    # Another step, another seed or another place in the list: other bits.
    again = [_decay_only([(3000,)] * 2, 0) for _ in range(3)]
    again[2]["steps"][0] += 1
    for lists in again:
        lists["params"][1].copy_(lists["params"][0])
    step(again[0], "cpu", **options)
    step(again[1], "cpu", **options | {"seed": torch.tensor(1)})
    step(again[2], "cpu", **options)
    results = [again[0]["params"][0], *(lists["params"][0] for lists in again[1:])]
    results.append(again[0]["params"][1])
    for i, a in enumerate(results):
        for b in results[i + 1 :]:
            assert not torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_adam_stochastic_rounding_keeps_the_mean(backend):
    """Rounding to nearest would leave 1.0 where it is for ever."""
    n = 200_000
    lists = _decay_only([(n,)], 0)
    lists["params"][0].fill_(1.0)
    step(lists, backend, lr=2.0**-12, weight_decay=1.0, seed=torch.tensor(9))
    p = lists["params"][0].double()
    assert set(p.unique().tolist()) == {1.0, 1.0 - 2.0**-8}
    probability = 2.0**-4  # 2^-12 of the 2^-8 to the next number below
    sigma = 2.0**-8 * (probability * (1 - probability) / n) ** 0.5
    assert abs(p.mean().item() - (1 - 2.0**-12)) < 4 * sigma


def test_adam_stochastic_rounding_passes_non_finite_values():
    lists = make(DTYPES["bf16"], [(40,)])
    lists["grads"][0][::7] = float("nan")
    lists["params"][0][3] = float("inf")
    other = clone(lists)
    step(lists, "cpu", seed=torch.tensor(1))
    step(other, "torch", seed=torch.tensor(1))
    a, b = lists["params"][0], other["params"][0]
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.isinf(), b.isinf())


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_adam_stochastic_rounding_keeps_every_nan(backend, bits):
    """Of one whose bits are all ones, the random bits must not make a number."""
    lists = make((BF16, F32, F32, False), [(40,)])
    lists["grads"][0].view(torch.int32).fill_(bits)
    assert lists["grads"][0].isnan().all()
    step(lists, backend, seed=torch.tensor(1))
    assert lists["params"][0].isnan().all()
    nan = torch.full((40,), bits, dtype=torch.int32).view(F32)
    noise = torch.arange(40, dtype=torch.int32) * 1680
    assert reference.round_stochastically(nan, noise).isnan().all()


def test_adam_huge_gradients_behave_as_in_torch(cpu_isa):
    """v may overflow to infinity; then the element stands still and never becomes NaN."""
    grad = torch.full((40,), 1e25)
    p = torch.nn.Parameter(torch.ones(40))
    theirs = torch.optim.AdamW([p], fused=True)
    lists = make(DTYPES["fp32"], [(40,)], steps=0.0)
    lists["params"][0].fill_(1.0)
    for name in ("exp_avgs", "exp_avg_sqs"):
        lists[name][0].zero_()
    for _ in range(3):
        p.grad = grad.clone()
        lists["grads"] = [grad]
        theirs.step()
        step(lists, "cpu", lr=1e-3, weight_decay=0.01, beta2=0.999)
    torch.testing.assert_close(lists["params"][0], p.detach())


def test_adam_empty_lists():
    empty = {"params": [], "grads": [], "exp_avgs": [], "exp_avg_sqs": [], "steps": []}
    assert ops.adam_step_(**empty) is None
    assert ops.adam_step_(**empty, max_norm=1.0) == 0
    assert ops.adam_norm([]) == 0
    assert ops.adam_norm([torch.empty(0), torch.empty(3, 0)]) == 0
    only_empty = make(DTYPES["fp32"], [(0,), (0, 5)])
    step(only_empty, "cpu", max_norm=1.0)
    assert all(s == 4 for s in only_empty["steps"])


def _op_arguments(lists, **options):
    """Arguments of the registered op, for opcheck."""
    return (
        lists["params"],
        lists["grads"],
        lists["exp_avgs"],
        lists["exp_avg_sqs"],
        lists.get("max_exp_avg_sqs", []),
        lists.get("masters", []),
        lists["steps"],
        [len(lists["params"])],
        [options.get("flags", 4)],
        [1e-3],
        options.get("lr_tensors", []),
        [0.9],
        [0.999],
        [1e-8],
        [0.01],
        options.get("max_norm"),
        options.get("total_norm"),
        options.get("grad_scale"),
        options.get("found_inf"),
        options.get("seed"),
    )


def test_adam_arguments_are_those_of_the_schema():
    schema = torch.ops.bigkernel.adam_step_.default._schema
    assert tuple(a.name for a in schema.arguments) == reference.StepArguments._fields


@pytest.mark.parametrize("namespace", ["bigkernel", "bigkernel_torch"])
@pytest.mark.parametrize("case", ["plain", "everything"])
def test_adam_opcheck(namespace, case):
    op = getattr(torch.ops, namespace)
    if case == "plain":
        arguments = _op_arguments(make(DTYPES["fp32"], [(5,), (3, 4)]))
    else:
        arguments = _op_arguments(
            make(DTYPES["bf16-masters"], [(5,), (3, 4)], amsgrad=True),
            flags=7,
            lr_tensors=[torch.tensor(1e-3)],
            max_norm=1.0,
            grad_scale=torch.tensor(2.0),
            found_inf=torch.zeros(()),
            seed=torch.tensor(3),
        )
    torch.library.opcheck(op.adam_step_.default, arguments)
    torch.library.opcheck(op.adam_norm.default, (arguments[1], torch.tensor(2.0)))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_adam_compile(backend, compiler):
    lists = make(DTYPES["fp32"], [(5,), (3, 4)])
    want = clone(lists)
    a = step(want, backend, max_norm=1.0)

    @torch.compile(fullgraph=True, backend=compiler)
    def run(lists):
        return ops.adam_step_(**lists, **HYPER, max_norm=1.0)

    with use_backend(backend):
        b = run(lists)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for name in want:
        for x, y in zip(want[name], lists[name], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_adam_marks_parameters_as_changed():
    """A backward through a graph from before the step must fail, not use the new values."""
    lists = make(DTYPES["fp32"], [(4,)])
    p = torch.nn.Parameter(lists["params"][0])
    x = torch.ones(4, requires_grad=True)
    loss = (x * p).sum()
    with torch.no_grad():
        step(lists | {"params": [p]})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_adam_float64_runs_in_pytorch_aloud(monkeypatch):
    lists = to64(make(DTYPES["fp32"]))
    with pytest.raises(RuntimeError, match="float64 has no native kernel"):
        step(clone(lists))
    with pytest.raises(RuntimeError, match="float64 has no native kernel"):
        step(clone(lists), "cpu")
    monkeypatch.setenv("BIGKERNEL_STRICT", "0")
    monkeypatch.setattr("bigkernel.backend._warned", set())
    with pytest.warns(FallbackWarning, match="float64"):
        step(lists)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": lambda x: x[:-1]}, "grads must be a list of 9 tensors"),
        ({"exp_avgs": lambda x: [*x[:-1], x[-1].half()]}, r"exp_avgs\[8\] must be torch.float32"),
        ({"exp_avg_sqs": lambda x: [t.bfloat16() for t in x]}, r"exp_avg_sqs\[0\] must be"),
        ({"grads": lambda x: [*x[:-1], x[-1].T]}, r"grads\[8\] must be of its parameter's shape"),
        ({"grads": lambda x: [*x[:-1], x[-1].int()]}, r"grads\[8\] must be of a float dtype"),
        ({"grads": lambda x: [*x[:-1], x[-1].to_sparse()]}, "SparseAdam"),
        ({"steps": lambda x: [t.long() for t in x]}, r"steps\[0\] must be a float32 tensor"),
        ({"masters": lambda x: [torch.zeros(3)]}, "masters must be empty or one for each of the 0"),
        ({"lr": lambda x: -1.0}, "lr must be at least 0"),
        ({"lr": lambda x: torch.ones(2)}, "lr must be a tensor of one element"),
        ({"beta1": lambda x: 1.0}, "beta1 must be at least 0 and below 1"),
        ({"eps": lambda x: -1e-8}, "eps must be at least 0"),
        ({"weight_decay": lambda x: -0.1}, "weight_decay must be at least 0"),
        ({"max_norm": lambda x: -1.0}, "max_norm must be None or at least 0"),
        ({"total_norm": lambda x: torch.ones(())}, "total_norm must be given only with max_norm"),
        ({"seed": lambda x: torch.ones(())}, "seed must be one int64 element"),
        ({"grad_scale": lambda x: torch.ones(2)}, "grad_scale must be a tensor of one element"),
        ({"found_inf": lambda x: torch.ones((), device="meta")}, "found_inf must be on cpu"),
        ({"amsgrad": lambda x: True}, "max_exp_avg_sqs must be a list of 9 tensors"),
        ({"steps": lambda x: 0}, "steps must be the number of this step"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_adam_rejects_bad_input(change, message):
    arguments = make(DTYPES["fp32"])
    for name, edit in change.items():
        arguments[name] = edit(arguments.get(name))
    with pytest.raises(ValueError, match=message):
        ops.adam_step_(**arguments)


def test_adam_rejects_bad_input_in_the_binding():
    """The native kernel checks again what memory safety depends on."""
    op = torch.ops.bigkernel.adam_step_
    for name, edit, message in [
        ("exp_avgs", lambda x: [x[0][:-1], x[1]], "exp_avgs.0. must have its parameter's shape"),
        ("grads", lambda x: x[:1], "grads must have one tensor per parameter"),
        ("steps", lambda x: [t.double() for t in x], "steps.0. must be one float32 element"),
        ("exp_avgs", lambda x: [t.half() for t in x], "exp_avgs.0. must be float32 or bfloat16"),
        ("params", lambda x: [t.double() for t in x], "params must be float32"),
    ]:
        lists = make(DTYPES["fp32"], [(5,), (3, 4)])
        lists[name] = edit(lists[name])
        with pytest.raises(RuntimeError, match=message):
            op(*_op_arguments(lists))


def test_adam_rejects_expanded_parameters():
    lists = make(DTYPES["fp32"], [(5, 4)])
    lists["params"] = [torch.zeros(5, 1).expand(5, 4)]
    with pytest.raises(RuntimeError, match="its elements share memory"):
        step(lists, "cpu")


def _cuda(value):
    if isinstance(value, dict):
        return {k: [t.cuda() for t in v] for k, v in value.items()}
    return value.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_adam_cuda_matches_reference(dtypes, variant):
    options = VARIANTS[variant]
    ours = make(DTYPES[dtypes], [*SIZES, (40_000,)], amsgrad=options.get("amsgrad", False))
    exact, same, ours = to64(ours), clone(ours), _cuda(ours)
    norm = step(ours, "cuda", max_norm=3.0, grad_scale=_cuda(torch.tensor(2.0)), **options)
    want = step(exact, "torch", max_norm=3.0, grad_scale=torch.tensor(2.0), **options)
    step(same, "torch", max_norm=3.0, grad_scale=torch.tensor(2.0), **options)
    assert_norm(norm.cpu(), want.double())
    ours = {k: [t.cpu() for t in v] for k, v in ours.items()}
    assert_lists_as_accurate(ours, exact, same)
    assert all(s == 4 for s in ours["steps"])


@pytest.mark.gpu
def test_adam_cuda_rounds_stochastically_as_the_cpu():
    ours = _decay_only([*SIZES, (3000,)], 0)
    theirs = clone(ours)
    options = {"lr": 2.0**-9, "weight_decay": 1.0}
    step(theirs, "cpu", **options, seed=torch.tensor(77))
    ours = _cuda(ours)
    step(ours, "cuda", **options, seed=_cuda(torch.tensor(77)))
    assert_same_lists(theirs, {k: [t.cpu() for t in v] for k, v in ours.items()})


@pytest.mark.gpu
def test_adam_cuda_is_captured_in_a_graph_and_skips_on_the_device():
    lists = _cuda(make(DTYPES["fp32"], [(5,)] * 1000))
    want = clone(lists)
    found_inf, lr = torch.zeros((), device="cuda"), torch.tensor(1e-2, device="cuda")
    options = {"found_inf": found_inf, "lr": lr, "max_norm": 1.0}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(clone(lists), "cuda", **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = step(lists, "cuda", **options)
    for _ in range(3):
        graph.replay()
        expected = step(want, "cuda", **options)
    found_inf.fill_(1)
    graph.replay()
    assert torch.equal(norm, expected)
    assert_same_lists(want, lists)


def test_adam_explain():
    assert "cpu" in bigkernel.explain("adam", torch.zeros(3))
    assert "float64" in bigkernel.explain("adam", torch.zeros(3, dtype=F64))


def _norm_of(g):
    return ops.adam_norm([g])


def _step_of(g):
    p, m, v = torch.ones(5), torch.zeros(5), torch.zeros(5)
    ops.adam_step_([p], [g], [m], [v], 1, lr=0.1)
    return p


def _dual(f):
    def call(x):
        with torch.autograd.forward_ad.dual_level():
            return f(torch.autograd.forward_ad.make_dual(x, x))

    return call


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("function", [_norm_of, _step_of])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
        lambda f: torch.func.grad(lambda x: f(x).sum()),
        lambda f: lambda x: torch.func.vjp(f, x),
        torch.func.jacrev,
        torch.func.jacfwd,
        lambda f: lambda x: torch.vmap(f)(torch.stack((x, x))),
        _dual,
    ],
    ids=["jvp", "grad", "vjp", "jacrev", "jacfwd", "vmap", "dual"],
)
def test_adam_refuses_transforms(transform, function, compiled):
    """A derivative was a silent 0."""
    torch._dynamo.reset()
    call = transform(function)
    call = torch.compile(call, backend="aot_eager") if compiled else call
    with pytest.raises(NotImplementedError, match=r"must be (outside of torch\.func|without tang)"):
        call(torch.randn(5))


def test_adam_norm_has_no_backward():
    """Its result said that it had a gradient, and backward gave none."""
    grad = torch.randn(5, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"without requires_grad.*torch\.no_grad"):
        ops.adam_norm([grad])
    with torch.no_grad():
        torch.testing.assert_close(ops.adam_norm([grad]), grad.norm())
