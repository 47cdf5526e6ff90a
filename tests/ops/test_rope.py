"""Rotary position embedding. Which feature has which test:

half-split, interleaved, partial, dtypes    matches_transformers, is_transformers
head dims, lengths, heads                   shapes
tables: batch, [S, R], float32, own halves  tables
strides, layout of results                  strides
in place: autograd's rules, views, leaves   in_place_*
gradient of one result, second derivative   one_result, second_derivative
bits: threads, batch                        thread_count, a_position_depends_on_nothing_else
NaN and infinity, empty                     non_finite, empty
opcheck, compile, gradcheck, torch.func     opcheck, compile, gradcheck, torch_func
float64, bad input                          float64, rejects_bad_input
"""

import pytest
import torch
import torch._dynamo.testing
from fused_cases import BF16, DTYPES, F16, F32, F64, assert_fused, normal, threads

import bigkernel
from bigkernel import ops
from bigkernel.backend import use_backend


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rotate_every_two(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def torch_rope(q, k, cos, sin, interleaved=False):
    """apply_rotary_pos_emb of transformers, for partial rotation too."""
    turn = rotate_every_two if interleaved else rotate_half
    cos, sin = (t.to(q.dtype).reshape(-1, *t.shape[-2:])[:, None] for t in (cos, sin))
    rotary = cos.shape[-1]

    def one(x):
        part = x[..., :rotary]
        return torch.cat((part * cos + turn(part) * sin, x[..., rotary:]), -1)

    return one(q), one(k)


def tables(length, rotary, dtype, batch=1, interleaved=False, first=0):
    inverse = 10000.0 ** (-torch.arange(0, rotary, 2).float() / rotary)
    starts = torch.arange(batch)[:, None, None] * 3 + first
    angles = (torch.arange(length)[:, None] + starts) * inverse
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def problem(dtype, batch=2, heads=(4, 2), length=9, dim=32, seed=0):
    """q and k as projections leave them: [B, S, H, D] transposed."""
    return [
        normal((batch, length, h, dim), dtype, seed + i).transpose(1, 2)
        for i, h in enumerate(heads)
    ]


def check(inputs, cos, sin, interleaved=False):
    assert_fused(
        lambda q, k: ops.rope(q, k, cos, sin, interleaved=interleaved),
        lambda q, k: torch_rope(q, k, cos, sin, interleaved),
        inputs,
    )


each_form = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@each_form
@each_dtype
@pytest.mark.parametrize("rotary", [32, 12, 2])
def test_rope_matches_transformers(cpu_isa, interleaved, dtype, rotary):
    check(problem(dtype), *tables(9, rotary, dtype, interleaved=interleaved), interleaved)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_rope_is_transformers(dtype):
    """Its functions themselves: to the rounding of two products and a sum."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    q, k = problem(dtype, dim=64)
    for module, interleaved in ((llama, False), (cohere, True)):
        cos, sin = tables(9, 64, dtype, batch=2, interleaved=interleaved)
        want = module.apply_rotary_pos_emb(q, k, cos, sin)
        got = ops.rope(q, k, cos, sin, interleaved=interleaved)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=8 * torch.finfo(dtype).eps)


@each_form
@pytest.mark.parametrize("dim", [2, 3, 6, 16, 20, 33, 34, 64, 80, 96, 128, 256])
def test_rope_shapes(cpu_isa, interleaved, dim):
    """Of an odd dimension the last element is left as it is."""
    for heads, length, batch in (((3, 1), 5, 2), ((1, 1), 1, 1)):
        inputs = problem(F32, batch, heads, length, dim)
        check(inputs, *tables(length, dim // 2 * 2, F32, interleaved=interleaved), interleaved)


@each_form
def test_rope_tables(cpu_isa, interleaved):
    """A table for each sequence, without batch, in float32 for 16-bit tensors, in other strides,
    and with halves of their own, as no model has them: the gradient is the transposed rotation.
    """
    for dtype in (F32, BF16, F16):
        inputs = problem(dtype)
        cos, sin = tables(9, 32, F32, batch=2, interleaved=interleaved)
        check(inputs, cos, sin, interleaved)
        check(inputs, cos[0], sin[0], interleaved)
        own = normal((2, 9, 32), dtype, 7), normal((2, 9, 32), dtype, 8)
        check(inputs, *own, interleaved)
        want = ops.rope(*inputs, *own, interleaved=interleaved)
        strided = [torch.stack((t, t), -1)[..., 0] for t in own]
        for a, b in zip(want, ops.rope(*inputs, *strided, interleaved=interleaved), strict=True):
            assert torch.equal(a, b)


@each_form
def test_rope_strides(interleaved):
    q, k = (t.contiguous() for t in problem(F32))
    cos, sin = tables(9, 32, F32, interleaved=interleaved)
    want = ops.rope(q, k, cos, sin, interleaved=interleaved)
    assert [t.stride() for t in want] == [q.stride(), k.stride()]
    together = torch.cat((q, k, k), 1).transpose(1, 2).contiguous().transpose(1, 2)
    others = {
        "heads inside": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)],
        "parts of one product": [together[:, :4], together[:, 4:6]],
        "last dimension strided": [torch.stack((t, t), -1)[..., 0] for t in (q, k)],
        "batch last": [t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for t in (q, k)],
    }
    for name, (a, b) in others.items():
        got = ops.rope(a, b, cos, sin, interleaved=interleaved)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True)), name
    got = ops.rope(*others["heads inside"], cos, sin, interleaved=interleaved)
    assert got[0].transpose(1, 2).is_contiguous()


@each_form
@each_dtype
def test_rope_in_place(cpu_isa, interleaved, dtype):
    for rotary in (32, 12):
        cos, sin = tables(9, rotary, dtype, interleaved=interleaved)
        for layout in (
            lambda t: t,
            torch.Tensor.contiguous,
            lambda t: torch.stack((t, t), -1)[..., 0],
        ):
            q, k = (layout(t.clone()) for t in problem(dtype))
            want = ops.rope(q, k, cos, sin, interleaved=interleaved)
            got = ops.rope_(q, k, cos, sin, interleaved=interleaved)
            assert got[0] is q
            assert got[1] is k
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_rope_in_place_gradient(backend):
    """Through views of a projection's result, as in a model; and what is read afterwards."""
    cos, sin = tables(9, 32, F32)
    x, weight = normal((2, 9, 48), F32, 0), normal((48, 6 * 32), F32, 1)
    grads = []
    for function in (ops.rope_, ops.rope):
        leaf, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        q, k = (leaf @ w).view(2, 9, 6, 32).transpose(1, 2).split([4, 2], 1)
        if function is ops.rope_:  # two results of split may not be changed: views that may
            both = (leaf @ w).view(2, 9, 6, 32).transpose(1, 2)
            q, k = both[:, :4], both[:, 4:]
        with use_backend(backend):
            q2, k2 = function(q, k, cos, sin)
            if function is ops.rope_:
                assert torch.equal(both[:, :4], q2)
            (q2.pow(3).sum() + (k2 * k2.detach().cos()).sum()).backward()
        grads.append((leaf.grad, w.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_rope_in_place_keeps_autograds_rules():
    cos, sin = tables(9, 32, F32)
    q, k = (t.clone() for t in problem(F32))
    with pytest.raises(RuntimeError, match="leaf"):
        ops.rope_(q.clone().requires_grad_(), k, cos, sin)
    leaf = q.clone().requires_grad_()
    kept = leaf * 1.0
    loss = kept.square().sum()  # backward wants it as it was
    ops.rope_(kept, k.clone(), cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.no_grad():
        plain = q.clone()
        before = plain._version
        ops.rope_(plain, k.clone(), cos, sin)
        assert plain._version > before
    with torch.no_grad():
        weights = torch.ones(2, 4, 9, 32, requires_grad=True)
    other = q.clone()
    loss = (weights * other).sum()
    with torch.no_grad():
        ops.rope_(other, k.clone(), cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rope_gradient_of_one_result_only():
    cos, sin = tables(9, 32, F32)
    for pick in (0, 1):
        grads = []
        for function in (ops.rope, torch_rope):
            leaves = [t.clone().requires_grad_() for t in problem(F32)]
            function(*leaves, cos, sin)[pick].pow(3).sum().backward()
            assert leaves[1 - pick].grad is None or not leaves[1 - pick].grad.any()
            grads.append(leaves[pick].grad)
        torch.testing.assert_close(*grads)
    q, k = problem(F32)
    leaf = q.clone().requires_grad_()
    ops.rope(leaf, k, cos, sin)[0].sum().backward()
    assert leaf.grad is not None


def test_rope_second_derivative():
    cos, sin = tables(3, 4, F64)
    inputs = [t.requires_grad_() for t in problem(F64, 1, (2, 1), 3, 6)]
    with use_backend("torch"):
        for interleaved in (False, True):

            def call(q, k, interleaved=interleaved):
                return ops.rope(q, k, cos, sin, interleaved=interleaved)

            assert torch.autograd.gradcheck(call, inputs)
            assert torch.autograd.gradgradcheck(call, inputs)
    q, k = (t.float().detach().requires_grad_() for t in inputs)
    cos, sin = cos.float(), sin.float()
    out, _ = ops.rope(q, k, cos, sin)
    (grad,) = torch.autograd.grad(out.pow(3).sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), q)
    want, _ = torch_rope(q, k, cos, sin)
    (grad,) = torch.autograd.grad(want.pow(3).sum(), q, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(grad.sum(), q)[0])


@each_form
@each_dtype
def test_rope_thread_count_changes_nothing(interleaved, dtype):
    inputs = problem(dtype, 3, (8, 4), 100, 64)
    cos, sin = tables(100, 64, dtype, batch=3, interleaved=interleaved)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(ops.rope(*inputs, cos, sin, interleaved=interleaved))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each_form
def test_rope_a_position_depends_on_nothing_else(cpu_isa, interleaved):
    """Alone, in a batch, at another place of it: the same bits."""
    inputs = problem(F32, 3, (4, 2), 12, 40)
    cos, sin = tables(12, 40, F32, batch=3, interleaved=interleaved)
    whole = ops.rope(*inputs, cos, sin, interleaved=interleaved)
    for b, rows in ((1, slice(4, 5)), (2, slice(3, 11))):
        part = [t[b : b + 1, :, rows] for t in inputs]
        table = [t[b : b + 1, rows] for t in (cos, sin)]
        got = ops.rope(*part, *table, interleaved=interleaved)
        for a, w in zip(got, whole, strict=True):
            assert torch.equal(a, w[b : b + 1, :, rows])


@each_form
@each_dtype
def test_rope_non_finite_stays_in_its_pair(cpu_isa, interleaved, dtype):
    q, k = problem(dtype)
    cos, sin = tables(9, 32, dtype, interleaved=interleaved, first=1)
    clean, _ = ops.rope(q, k, cos, sin, interleaved=interleaved)
    for bad in (float("nan"), float("inf")):
        q[1, 2, 3, 6] = bad
        got, _ = ops.rope(q, k, cos, sin, interleaved=interleaved)
        hit = torch.zeros_like(got, dtype=torch.bool)
        hit[1, 2, 3, [6, 7] if interleaved else [6, 22]] = True
        assert not got[hit].isfinite().any()
        assert torch.equal(got[~hit], clean[~hit])


@pytest.mark.parametrize(
    ("batch", "heads", "length"), [(0, (4, 2), 9), (2, (0, 0), 9), (2, (4, 0), 9), (2, (4, 2), 0)]
)
def test_rope_empty(batch, heads, length):
    inputs = [t.requires_grad_() for t in problem(F32, batch, heads, length)]
    cos, sin = tables(length, 32, F32)
    got = ops.rope(*inputs, cos, sin)
    assert [t.shape for t in got] == [t.shape for t in inputs]
    grads = torch.autograd.grad(got[0].sum() + got[1].sum(), inputs)
    assert [t.shape for t in grads] == [t.shape for t in inputs]
    with torch.no_grad():
        ops.rope_(*(t.detach().clone() for t in inputs), cos, sin)


@each_form
def test_rope_opcheck(interleaved):
    cos, sin = tables(9, 12, F32, interleaved=interleaved)
    for transposed in (False, True):
        q, k = (t.requires_grad_() for t in problem(F32))
        forward = torch.ops.bigkernel.rope_fwd.default
        torch.library.opcheck(forward, (q, k, cos, sin, interleaved, transposed))
        torch.library.opcheck(forward, (q, None, cos, sin, interleaved, transposed))
    q = problem(F32)[0].clone()
    torch.library.opcheck(torch.ops.bigkernel.rope_.default, (q, cos, sin, interleaved))


@pytest.mark.parametrize("function", [ops.rope, ops.rope_], ids=["rope", "in_place"])
def test_rope_compile(function):
    """Without a break, and other lengths compile nothing more."""

    def model(q, k, cos, sin):
        q, k = function(q * 2, k * 2, cos, sin)
        return q + 1, k + 1

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for length in (5, 6, 17):
        cos, sin = tables(length, 16, F32)
        results = []
        for f in (compiled, model):
            leaves = [t.requires_grad_() for t in problem(F32, 2, (4, 2), length)]
            out = f(*leaves, cos, sin)
            (out[0].square().sum() + out[1].pow(3).sum()).backward()
            results.append([*(t.detach() for t in out), *(t.grad for t in leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


def test_rope_torch_func():
    q, k = problem(F32)
    cos, sin = tables(9, 32, F32)

    def loss(q):
        return ops.rope(q, k, cos, sin)[0].pow(3).sum()

    leaf = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), want)
    tangent = normal(q.shape, F32, 2)
    _, along = torch.func.jvp(loss, (q,), (tangent,))
    torch.testing.assert_close(along, (want * tangent).sum(), rtol=1e-4, atol=1e-3)


def test_rope_float64_runs_in_pytorch(monkeypatch):
    monkeypatch.delenv("BIGKERNEL_STRICT")
    q, k = problem(F64)
    assert "float64 has no native kernel" in bigkernel.explain("rope", q)
    cos, sin = tables(9, 32, F64)
    want = torch_rope(q, k, cos, sin)
    for function in (ops.rope, ops.rope_):
        bigkernel.backend._warned.clear()
        with pytest.warns(bigkernel.backend.FallbackWarning, match="float64"):
            got = function(q.clone(), k.clone(), cos, sin)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda q, k, c, s: ops.rope(q[0], k, c, s), ValueError, r"q must be \[B, H, S, D\]"),
        (lambda q, k, c, s: ops.rope(q, k[:, :, :4], c, s), ValueError, r"k must be \[2, H, 9"),
        (lambda q, k, c, s: ops.rope(q, k[:1], c, s), ValueError, "k must be"),
        (lambda q, k, c, s: ops.rope(q, k.half(), c, s), TypeError, "k must be of q's dtype"),
        (lambda q, k, c, s: ops.rope(q, k, c[:, :5], s), ValueError, r"cos must be \[2 or 1"),
        (lambda q, k, c, s: ops.rope(q, k, c[..., :3], s), ValueError, "R even"),
        (lambda q, k, c, s: ops.rope(q, k, c.repeat(1, 1, 2), s), ValueError, "at most 32"),
        (lambda q, k, c, s: ops.rope(q, k, c, s[..., :16]), ValueError, "sin must be of cos's"),
        (lambda q, k, c, s: ops.rope(q, k, c.half(), s.half()), TypeError, "or float32"),
        (lambda q, k, c, s: ops.rope(q, k, c.repeat(3, 1, 1), s), ValueError, "cos must be"),
        (lambda q, k, c, s: ops.rope(q, k, c.requires_grad_(), s), ValueError, "requires_grad"),
        (lambda q, k, c, s: ops.rope(q.int(), k, c, s), TypeError, "q must be float16"),
        (lambda q, k, c, s: ops.rope(q, None, c, s), TypeError, "k must be a tensor, got NoneType"),
        (lambda q, k, c, s: ops.rope_(q, k[:, :1].expand_as(k), c, s), ValueError, "expanded"),
        (lambda q, k, c, s: ops.rope_(q, q, c, s), ValueError, "in other memory than q"),
    ],
)  # fmt: skip
def test_rope_rejects_bad_input(call, error, words):
    q, k = problem(F32)
    with pytest.raises(error, match=words):
        call(q.clone(), k.clone(), *tables(9, 32, F32))
