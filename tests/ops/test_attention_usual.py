"""Calls of attention that go past their checks: what they are, and that nothing is kept of them.

Feature -> test: the op gets what the checks would give it -> test_usual_*; everything else goes to
the checks -> test_what_is_not_usual_*, test_numbers_that_*, test_a_mask_that_*,
test_what_is_followed_*; what is kept from call to call is never of another call ->
test_nothing_of_an_earlier_call_*, test_threads_*, test_what_is_kept_*; not in a compiled call ->
test_what_is_traced_*; the same sentences for offsets -> test_offsets_that_do_not_fit_*.
"""

import itertools
import threading

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import bigkernel
from bigkernel import ops
from bigkernel.expect import FLOATING
from bigkernel.ops.attention import op, usual

needs_native = pytest.mark.skipif(
    not bigkernel.cpu_isas(), reason="the native library is not built"
)
USUAL = (False, "top_left", (None, None), 0.0, 0.0, None)
NAMES = ("causal", "align", "window", "softcap", "dropout_p", "scale")


def qkv(batch=2, heads=4, rows=6, dim=8, kv_heads=2, keys=7, dtype=torch.float32, dim_v=8):
    torch.manual_seed(0)
    shapes = (
        (batch, heads, rows, dim),
        (batch, kv_heads, keys, dim),
        (batch, kv_heads, keys, dim_v),
    )
    return [torch.randn(shape).to(dtype) for shape in shapes]


def the_long_way(monkeypatch):
    for name in ("dense", "packed"):
        monkeypatch.setattr(usual, name, lambda *given, **more: None)


def arguments_of(call, monkeypatch):
    """Those that the op gets."""
    got = []

    def run(namespace, name, *arguments):
        got.append((namespace.name, name, *arguments))
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(op, "call", run)
        patched.setattr(op, "call_usual", run)
        patched.setattr(op, "call_below", run)
        with pytest.raises(InterruptedError):
            call()
    return got[0]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one is other or (one.dtype == other.dtype and torch.equal(one, other))
    return type(one) is type(other) and one == other


OPTIONS = [
    {},
    {"causal": True, "align": "bottom_right"},
    {"window": (3, None)},
    {"window": (3, 0), "causal": True},
    {"window": None, "softcap": None, "scale": 0.3},
    {"softcap": 5, "scale": 2},
    {"dropout_p": 0.25},
]
MASKS = [
    None,
    lambda: torch.rand(2, 1, 1, 7) > 0.2,
    lambda: torch.randn(1, 4, 6, 7),
    lambda: torch.randn(2, 4, 6, 7).transpose(2, 3).contiguous().transpose(2, 3),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=["none", "keys", "bias", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_usual_call_gets_what_the_checks_give(options, mask, dtype, monkeypatch):
    q, k, v = qkv(dtype=dtype)
    mask = None if mask is None else mask()
    given = dict(zip(NAMES, USUAL, strict=True)) | options
    assert usual.dense(q, k, v, mask, tuple(given.values())) is not None

    def call():
        torch.manual_seed(1)
        return ops.attention(q, k, v, mask=mask, **options)

    short = arguments_of(call, monkeypatch)
    the_long_way(monkeypatch)
    long = arguments_of(call, monkeypatch)
    assert all(map(same, short, long)), (short, long)
    assert len(short) == len(long)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [(None, None), (4, 9)])
def test_usual_packed_call_gets_what_the_checks_give(options, lengths, monkeypatch):
    q, k, v = (x[0].transpose(0, 1) for x in qkv())
    cu_q = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    cu_k = torch.tensor([0, 3, 4, 7], dtype=torch.int32)

    def call():
        torch.manual_seed(1)
        longest = dict(zip(("max_seqlen_q", "max_seqlen_k"), lengths, strict=True))
        return ops.attention_varlen(q, k, v, cu_q, cu_k, **longest, **options)

    given = dict(zip(NAMES, USUAL, strict=True)) | options
    assert usual.packed(q, k, v, cu_q, cu_k, *lengths, tuple(given.values())) is not None
    short = arguments_of(call, monkeypatch)
    the_long_way(monkeypatch)
    assert all(map(same, short, arguments_of(call, monkeypatch)))


def changed(tensors, **new):
    return tuple(new.get(name, x) for name, x in zip("qkv", tensors, strict=True))


Q, K, V = qkv()
NOT_USUAL = {
    "float64": [x.double() for x in (Q, K, V)],
    "two dtypes": (Q, K.bfloat16(), V),
    "head dim": qkv(dim=257),
    "head dim of v": qkv(dim_v=300),
    "no keys' heads": (Q, K[:, :0], V[:, :0]),
    "heads that do not divide": (Q[:, :3], K, V),
    "rank": (Q[0], K[0], V[0]),
    "batch": (Q, K[:1], V[:1]),
    "lengths": (Q, K, V[:, :, :6]),
    "a gap in a row": (torch.randn(2, 4, 6, 16)[..., ::2], K, V),
    "sparse": (Q.to_sparse(), K, V),
    "meta": (Q.to("meta"), K, V),
    "no tensor": (Q, K, None),
    "none of three": (None, K, [[0.0]]),
    "arrays": tuple(x.numpy() for x in (Q, K, V)),
    "nested": (torch.nested.nested_tensor([Q[0], Q[1]]), K, V),
    "a subclass": (Q.as_subclass(type("Own", (torch.Tensor,), {})), K, V),
}


@pytest.mark.parametrize("tensors", NOT_USUAL.values(), ids=NOT_USUAL)
def test_what_is_not_usual_goes_to_the_checks(tensors):
    assert usual.dense(Q, K, V, None, USUAL) is not None
    assert usual.dense(*tensors, None, USUAL) is None


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("causal", True, 1),
        ("causal", True, "yes"),
        ("causal", True, torch.tensor(True)),
        ("align", "top_left", "left"),
        ("window", (2, None), (2.0, None)),
        ("window", (1, None), (True, None)),
        ("window", (2, 3), (2, 3, 4)),
        ("window", (2, 3), (2, -3)),
        ("window", (2, 3), 2),
        ("softcap", 2.0, -2.0),
        ("softcap", 2.0, torch.tensor(2.0)),
        ("softcap", 2.0, np.float64(2.0)),
        ("dropout_p", 0.5, 1.5),
        ("dropout_p", 0.5, None),
        ("dropout_p", 0.5, torch.tensor(0.5)),
        ("scale", 2.0, float("nan")),
        ("scale", 2.0, "2.0"),
        ("scale", 2.0, torch.tensor(2.0)),
    ],
)
def test_numbers_that_are_not_usual_go_to_the_checks(name, good, bad):
    """Also where one that is equal to it was there before."""
    options = dict(zip(NAMES, USUAL, strict=True))
    assert usual.dense(Q, K, V, None, tuple((options | {name: good}).values())) is not None
    found = usual.dense(Q, K, V, None, tuple((options | {name: bad}).values()))
    if name == "causal" and bad is not True and type(bad) is int:  # which the checks let through
        assert [type(x) for x in found][8] is int
        return
    assert found is None


def test_a_mask_that_is_not_usual_goes_to_the_checks():
    for mask in (
        torch.ones(6, 7, dtype=torch.bool),
        torch.ones(2, 1, 6, 6, dtype=torch.bool),
        torch.ones(2, 1, 6, 7, dtype=torch.int64),
        torch.ones(2, 1, 6, 7, dtype=torch.float64),
        torch.ones(2, 1, 6, 7).to_sparse(),
        torch.ones(2, 1, 6, 7, device="meta"),
        [[True]],
    ):
        assert usual.dense(Q, K, V, mask, USUAL) is None


def test_what_is_followed_or_traced_is_not_usual():
    seen = []

    def look(q):
        seen.append(usual.dense(q, K, V, None, USUAL))
        return q.sum()

    torch.func.grad(look)(Q)
    torch.func.vmap(look)(Q[None])
    torch.jit.trace(look, (Q,), check_trace=False)
    with forward_ad.dual_level():
        look(Q)
        look(forward_ad.make_dual(Q, torch.ones_like(Q)))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (Q, K, V)]
        seen.append(usual.dense(*fake, None, USUAL))
    with torch.autocast("cpu", torch.bfloat16):
        look(Q)
    leaked = []
    torch.func.grad(lambda q: leaked.append(q) or q.sum())(Q)
    seen.append(usual.dense(leaked[0], K, V, None, USUAL))
    assert seen == [None] * 8
    with torch.autocast("cpu", torch.bfloat16):  # q, k and v are what it would make of them
        assert usual.dense(*qkv(dtype=torch.bfloat16), None, USUAL) is not None


@needs_native
def test_nothing_of_an_earlier_call_is_in_a_later_one(monkeypatch):
    """Every call differs from that before it in one thing, and gives what it gives by itself."""
    base = {"dtype": torch.float32, "dim": 8, "layout": "bhsd", "grads": "qkv", "grad_mode": True}
    base |= {"isa": bigkernel.cpu_isas()[-1], "backend": None, "options": {}}
    other = {
        "dtype": [torch.bfloat16, torch.float16, torch.float64],
        "dim": [16, 257],
        "layout": ["bshd"],
        "grads": ["", "k"],
        "grad_mode": [False],
        "isa": bigkernel.cpu_isas()[:1],
        "backend": ["torch"],
        "options": [{"causal": True}, {"scale": 0.3}, {"window": (1, 2)}, {"softcap": 3.0}],
    }
    calls = [base]
    for name, values in other.items():
        for value in values:
            calls += [base | {name: value}, base]

    def run(given):
        q, k, v = qkv(dim=given["dim"], dtype=given["dtype"])
        if given["layout"] == "bshd":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        leaves = [x for name, x in zip("qkv", (q, k, v), strict=True) if name in given["grads"]]
        for x in leaves:
            x.requires_grad_()
        with (
            bigkernel.use_cpu_isa(given["isa"]),
            bigkernel.use_backend(given["backend"]),
            torch.set_grad_enabled(given["grad_mode"]),
        ):
            out = ops.attention(q, k, v, **given["options"])
            assert out.requires_grad == bool(leaves and given["grad_mode"])
            grads = torch.autograd.grad(out.sum(), leaves) if out.requires_grad else ()
        return [out.detach(), *grads]

    monkeypatch.setattr(bigkernel.backend, "_fall_back", lambda *said: None)
    got = [run(given) for given in calls]
    the_long_way(monkeypatch)
    wanted = [run(given) for given in calls]
    for given, one, two in zip(calls, got, wanted, strict=True):
        assert len(one) == len(two)
        for x, y in zip(one, two, strict=True):
            assert x.dtype == y.dtype == given["dtype"]
            assert x.stride() == y.stride()
            assert torch.equal(x, y), given


def test_threads_get_each_their_own_numbers():
    scales = [0.01 * (i + 1) for i in range(40)]
    wanted = {scale: ops.attention(Q, K, V, scale=scale) for scale in scales}
    wrong = []

    def run(scales):
        for scale in scales:
            if not torch.equal(ops.attention(Q, K, V, scale=scale), wanted[scale]):
                wrong.append(scale)

    usual._rule.cache_clear()
    threads = [threading.Thread(target=run, args=(scales[i:] + scales[:i],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_kept_is_bounded_and_holds_no_tensor():
    for scale in range(1, 2000):
        usual.dense(Q, K, V, None, (*USUAL[:-1], float(scale)))
    kept = usual._rule.cache_info()
    assert kept.currsize == kept.maxsize < 2000
    numbers = usual._rule(torch.float32, 8, False, "top_left", 1, 2, 0.0, 0.0, None)
    assert all(type(x) in (int, float, bool) for x in numbers)


def test_what_is_traced_is_not_kept():
    """Compiled for any length, in one graph; what eager calls keep is as before."""
    torch._dynamo.reset()
    usual._rule.cache_clear()
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph

    function = torch.compile(
        lambda q, k, v: (
            ops.attention(q, k, v, causal=True)
            + bigkernel.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        ),
        backend=note,
        fullgraph=True,
        dynamic=True,
    )
    for keys in (7, 9, 12):
        function(*qkv(keys=keys))
    assert len(graphs) == 1
    assert usual._rule.cache_info().currsize == usual._rule.cache_info().hits == 0


@needs_native
@pytest.mark.parametrize(
    ("cu_q", "cu_k", "longest"),
    [
        ([0, 2, 5], [0, 3, 7], {}),
        ([1, 2, 6], [0, 3, 7], {}),
        ([0, 4, 2, 6], [0, 3, 4, 7], {}),
        ([0, 2, 6], [0, 3, 8], {}),
        ([0, 2, 6], [0, 3, 7], {"max_seqlen_q": 3}),
        ([0, 2, 6], [0, 3, 7], {"max_seqlen_k": 3}),
    ],
)
def test_offsets_that_do_not_fit_are_refused_in_the_same_words(cu_q, cu_k, longest, monkeypatch):
    """The kernel sees that they do not; the sentence is that of the checks."""
    q, k, v = (x[0].transpose(0, 1).requires_grad_() for x in qkv())
    said = []
    for long in (False, True):
        if long:
            the_long_way(monkeypatch)
        cu = [torch.tensor(x, dtype=torch.int32) for x in (cu_q, cu_k)]
        with pytest.raises(ValueError, match=r"bigkernel\.attention_varlen: ") as refused:
            ops.attention_varlen(q, k, v, *cu, **longest)
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_scaled_dot_product_attention_of_a_usual_call(monkeypatch):
    """The same as by its own checks; what they refuse is refused."""
    q, k, v = qkv(kv_heads=4)
    cases = [
        ((q, k, v), {}),
        ((q, k, v), {"is_causal": True, "scale": 0.5}),
        ((q, k[:, :1], v[:, :1]), {}),
        ((q, k[:, ::2], v[:, ::2]), {"enable_gqa": True}),
        ((q, k, v), {"attn_mask": torch.rand(2, 1, 1, 7) > 0.2}),
    ]
    got = [bigkernel.scaled_dot_product_attention(*given, **more) for given, more in cases]
    with pytest.raises(ValueError, match="the numbers of heads of query, key and value"):
        bigkernel.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2])
    mask = torch.ones(6, 7, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="None when is_causal=True"):
        bigkernel.scaled_dot_product_attention(q, k, v, mask[None, None], is_causal=True)
    the_long_way(monkeypatch)
    for (given, more), out in zip(cases, got, strict=True):
        assert torch.equal(bigkernel.scaled_dot_product_attention(*given, **more), out)


def test_usual_calls_are_most_calls():
    """All pairs of common options: a mistake in the conditions would only make calls slow."""
    masks = (None, torch.rand(2, 1, 1, 7) > 0.2)
    for dtype, causal, mask, p in itertools.product(FLOATING[:3], (False, True), masks, (0.0, 0.1)):
        options = (causal, "top_left", (None, None), 0.0, p, None)
        assert usual.dense(*qkv(dtype=dtype), mask, options) is not None


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradients_of_a_usual_call_are_those_of_the_operator(packed, monkeypatch):
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    leaves = [x[0].transpose(0, 1) if packed else x for x in qkv(keys=6)]

    def out_of(*inputs):
        return ops.attention_varlen(*inputs, cu, cu) if packed else ops.attention(*inputs)

    def gradients(weight=1.0):
        inputs = [x.detach().requires_grad_() for x in leaves]
        out = out_of(*inputs)
        return out, torch.autograd.grad(out, inputs, torch.full_like(out, weight).cos())

    (short, found), (_, other) = gradients(), gradients(2.0)
    assert type(short.grad_fn).__name__ == "_ForOutBackward"
    with monkeypatch.context() as patched:
        the_long_way(patched)
        long, wanted = gradients()
    assert type(long.grad_fn).__name__ == "EagerBackward"
    for got, expected in zip((short, *found), (long, *wanted), strict=True):
        assert torch.equal(got, expected)

    inputs = [x.detach().requires_grad_() for x in leaves]
    out = out_of(*inputs)
    # What follows the gradient sees the operator.
    both = torch.stack([torch.full_like(out, weight).cos() for weight in (1.0, 2.0)])
    batched = torch.autograd.grad(out, inputs, both, retain_graph=True, is_grads_batched=True)
    for got, one, two in zip(batched, found, other, strict=True):
        torch.testing.assert_close(got, torch.stack([one, two]))
    first = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first[0].sum().backward()
    if packed:
        out = out_of(*inputs)
        cu[1] = 3
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
