"""RMS norm and layer norm. Which feature has which test:

casting, offset, no weight, bias, residual  matches_torch, is_transformers, after_an_addition
dtypes, mixed dtypes                        matches_torch, mixed_dtypes
any length, instruction sets                lengths
strides, empty inputs                       noncontiguous, empty
gradients of one result only                one_result
bits: threads, batch                        thread_count, a_row_depends_on_nothing_else
NaN, infinity, large and small values       non_finite, extremes
what is kept for backward                   keeps
opcheck, compile, gradcheck, torch.func     opcheck, compile, gradcheck_*, torch_func
float64, bad input                          float64, rejects_bad_input
"""

import pytest
import torch
import torch._dynamo.testing
from fused_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    assert_fused,
    assert_fused_outputs,
    layouts,
    normal,
    threads,
)
from torch.nn import functional as F

import bigkernel
from bigkernel import ops
from bigkernel.backend import use_backend

EPS = 1e-6


def torch_rms(x, weight, residual, offset=0.0, casting="llama"):
    """What LlamaRMSNorm and GemmaRMSNorm of transformers compute, after the addition."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, F32))
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if casting == "llama":
        y = n.to(h.dtype) if weight is None else weight * n.to(h.dtype)
    else:
        y = (n * (offset + weight.to(wide.dtype))).to(h.dtype)
    return y if residual is None else (y, h)


def torch_layer_norm(x, weight, bias, residual):
    h = x if residual is None else x + residual
    weight, bias = (None if t is None else t.to(h.dtype) for t in (weight, bias))
    y = F.layer_norm(h, h.shape[-1:], weight, bias, EPS)
    return y if residual is None else (y, h)


# name -> (ours, theirs, weight, bias)
KINDS = {
    "llama": (lambda x, w, r: ops.rms_norm(x, w, EPS, residual=r), torch_rms, True, False),
    "gemma": (
        lambda x, w, r: ops.rms_norm(x, w, EPS, residual=r, offset=1.0, casting="gemma"),
        lambda x, w, r: torch_rms(x, w, r, 1.0, "gemma"),
        True,
        False,
    ),
    "unweighted": (lambda x, w, r: ops.rms_norm(x, w, EPS, residual=r), torch_rms, False, False),
    "layer": (
        lambda x, w, b, r: ops.layer_norm(x, w, b, EPS, residual=r),
        torch_layer_norm,
        True,
        True,
    ),
    "layer, no bias": (
        lambda x, w, r: ops.layer_norm(x, w, None, EPS, residual=r),
        lambda x, w, r: torch_layer_norm(x, w, None, r),
        True,
        False,
    ),
    "layer, bias alone": (
        lambda x, b, r: ops.layer_norm(x, None, b, EPS, residual=r),
        lambda x, b, r: torch_layer_norm(x, None, b, r),
        False,
        True,
    ),
}


def problem(kind, shape, dtype, residual, weight_dtype=None, residual_dtype=None):
    """(ours, theirs, inputs)."""
    ours, theirs, weight, bias = KINDS[kind]
    weight_dtype = weight_dtype or dtype
    inputs = [normal(shape, dtype, 1)]
    if weight:
        inputs.append(normal(shape[-1:], weight_dtype, 2))
    elif not bias:
        inputs.append(None)
    if bias:
        inputs.append(normal(shape[-1:], weight_dtype, 3))
    inputs.append(normal(shape, residual_dtype or dtype, 4) if residual else None)
    return ours, theirs, inputs


each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_residual = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])


@each_kind
@each_dtype
@each_residual
def test_norm_matches_torch(cpu_isa, kind, dtype, residual):
    """Outputs and all gradients; both results get one."""
    assert_fused(*problem(kind, (3, 37, 100), dtype, residual))


@each_kind
@pytest.mark.parametrize("dim", [1, 2, 7, 16, 17, 63, 64, 384, 1031, 5000])
def test_norm_lengths(cpu_isa, kind, dim):
    # Of one or two elements nearly everything in a gradient cancels, and what is left is rounding.
    check = assert_fused if dim > 2 else assert_fused_outputs
    check(*problem(kind, (33, dim), F32, True))
    check(*problem(kind, (5, dim), BF16, False))


@pytest.mark.parametrize("rows", [1, 4, 5, 63, 64, 65, 257, 1000, 4100])
def test_norm_numbers_of_rows(rows):
    """Gradients of weights are summed in chunks and runs of rows, the last of which are short."""
    assert_fused(*problem("layer", (rows, 24), F32, False))
    assert_fused(*problem("llama", (rows, 24), BF16, True))


@each_kind
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_norm_after_an_addition_is_that_of_the_sum(cpu_isa, kind, dtype):
    """Of the second result, which is rounded: but for an odd bit, as sums are not fused alike."""
    ours, _, inputs = problem(kind, (500, 8), dtype, True)
    y, total = ours(*inputs)
    assert torch.equal(total, inputs[0] + inputs[-1])
    assert (ours(total, *inputs[1:-1], None) == y).float().mean() > 0.999


@pytest.mark.parametrize("kind", ["llama", "gemma", "layer"])
@pytest.mark.parametrize("narrow", [BF16, F16], ids=["bf16", "f16"])
def test_norm_mixed_dtypes(cpu_isa, kind, narrow):
    """As under autocast: a 16-bit branch added to a float32 stream, float32 weights."""
    shape = (9, 70)
    assert_fused(*problem(kind, shape, narrow, True, weight_dtype=F32, residual_dtype=F32))
    assert_fused(*problem(kind, shape, F32, True, residual_dtype=narrow))
    assert_fused(*problem(kind, shape, narrow, True, residual_dtype=F32))
    assert_fused(*problem(kind, shape, narrow, False, weight_dtype=F32))
    assert_fused(*problem(kind, shape, F32, False, weight_dtype=narrow))
    other = BF16 if narrow == F16 else F16
    assert_fused(*problem(kind, shape, narrow, False, weight_dtype=other))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_norm_is_transformers(dtype):
    """The modules themselves, bit for bit in what they round to 16 bits."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    x = normal((4, 50, 96), dtype, 0)
    for module, options in (
        (llama.LlamaRMSNorm(96), {}),
        (gemma.GemmaRMSNorm(96), {"offset": 1.0, "casting": "gemma"}),
    ):
        module.to(dtype)
        with torch.no_grad():
            module.weight.copy_(normal((96,), dtype, 1))
            want = module(x)
            got = ops.rms_norm(x, module.weight, 1e-6, **options)
        eps = torch.finfo(dtype).eps
        assert ((got - want).abs() <= 4 * eps * want.abs()).all()
        if dtype == BF16:
            assert (got == want).float().mean() > 0.99


@each_kind
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_norm_noncontiguous(kind, dtype):
    ours, _, inputs = problem(kind, (3, 5, 24), dtype, True)
    want = ours(*inputs)
    x, residual = inputs[0], inputs[-1]
    for name, other in layouts(x).items():
        got = ours(other, *inputs[1:])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name
    for name, other in layouts(residual).items():
        got = ours(*inputs[:-1], other)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name
    # A gradient that is expanded, and one in other strides.
    leaf = x.clone().requires_grad_()
    y = ours(leaf, *inputs[1:-1], None)
    for gradient in (
        torch.ones((), dtype=dtype).expand_as(y),
        *layouts(normal(y.shape, dtype, 5)).values(),
    ):
        (a,) = torch.autograd.grad(y, leaf, gradient, retain_graph=True)
        (b,) = torch.autograd.grad(y, leaf, gradient.contiguous(), retain_graph=True)
        assert torch.equal(a, b)


@each_kind
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,), (1, 1, 1, 8)])
def test_norm_empty_and_other_ranks(kind, shape):
    ours, theirs, inputs = problem(kind, shape, F32, True)
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    got, want = ours(*leaves), theirs(*leaves)
    assert [t.shape for t in got] == [t.shape for t in want]
    given = [t for t in leaves if t is not None]
    for t, grad in zip(given, torch.autograd.grad(got[0].sum() + got[1].sum(), given), strict=True):
        assert grad.shape == t.shape
        assert 0 not in shape or not grad.any()


@each_kind
def test_norm_gradient_of_one_result_only(kind):
    for pick in (0, 1):
        ours, theirs, inputs = problem(kind, (6, 40), F32, True)
        inputs = [inputs[0], *inputs[1:-1], inputs[-1]]
        grads = []
        for function in (ours, theirs):
            leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
            function(*leaves)[pick].square().sum().backward()
            grads.append([None if t is None else t.grad for t in leaves])
        for a, b in zip(*grads, strict=True):
            if a is None or b is None:
                assert a is b
            else:
                torch.testing.assert_close(a, b)


@each_kind
@each_dtype
def test_norm_thread_count_changes_nothing(cpu_isa, kind, dtype):
    ours, _, inputs = problem(kind, (300, 700), dtype, True)
    results = []
    for count in (1, 2, 3):
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        with threads(count):
            y, total = ours(*leaves)
            (y.float().square().sum() + total.float().sum()).backward()
        results.append([y.detach(), total.detach(), *(t.grad for t in leaves if t is not None)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each_kind
def test_norm_a_row_depends_on_nothing_else(cpu_isa, kind):
    """Alone, in a batch, at another place of it: the same bits, forward and backward."""
    ours, _, inputs = problem(kind, (40, 100), F32, True)
    between = inputs[1:-1]

    def run(rows):
        x, residual = (t[rows].clone().requires_grad_() for t in (inputs[0], inputs[-1]))
        y, total = ours(x, *between, residual)
        (y.pow(3).sum() + total.sum()).backward()
        return y.detach(), total.detach(), x.grad, residual.grad

    whole = run(slice(None))
    for rows in (
        slice(7, 8),
        slice(3, 30),
        torch.randperm(40, generator=torch.Generator().manual_seed(0)),
    ):
        for a, b in zip(run(rows), whole, strict=True):
            assert torch.equal(a, b[rows])


@each_kind
@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_norm_non_finite_stays_in_its_row(cpu_isa, kind, dtype, bad):
    ours, theirs, inputs = problem(kind, (6, 40), dtype, True)
    clean = ours(*inputs)[0]
    inputs[0][2, 5] = bad
    got, want = ours(*inputs)[0], theirs(*inputs)[0]
    assert torch.equal(got.isnan(), want.isnan())
    others = torch.arange(6) != 2
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-4, 1e4, 1e15])
@pytest.mark.parametrize("kind", ["llama", "layer"])
def test_norm_extremes(cpu_isa, kind, scale):
    ours, theirs, inputs = problem(kind, (8, 200), F32, False)
    inputs[0] *= scale
    assert_fused(ours, theirs, inputs)


def test_layer_norm_of_a_large_mean(cpu_isa):
    """Distances from the mean are squared, not squares subtracted."""
    x = normal((8, 300), F32, 0) + 1000.0
    assert_fused(lambda x: ops.layer_norm(x), lambda x: F.layer_norm(x, (300,)), [x])


def test_norm_keeps_its_input_and_one_number_a_row():
    x, residual = (normal((64, 512), F32, s).requires_grad_() for s in (0, 1))
    weight = normal((512,), F32, 2).requires_grad_()
    kept = []

    def note(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = ops.rms_norm(x, weight)
        assert {t.data_ptr() for t in kept} >= {x.data_ptr(), weight.data_ptr()}
        assert sum(t.numel() for t in kept) == x.numel() + weight.numel() + 64
        kept.clear()
        y, total = ops.layer_norm(x, weight, residual=residual)
        assert total.data_ptr() in {t.data_ptr() for t in kept}
        assert sum(t.numel() for t in kept) == x.numel() + weight.numel() + 2 * 64
    assert y.requires_grad


@each_kind
@each_residual
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_norm_opcheck(kind, residual, dtype):
    x, r, w, b = (normal(s, dtype, i) for i, s in enumerate([(4, 6, 10)] * 2 + [(10,)] * 2))
    center, round_first = kind.startswith("layer"), kind == "llama"
    stats = torch.rand(2 if center else 1, 4, 6)
    arguments = (x, r if residual else None, r, w, stats, 1.0, center, True, center)
    torch.library.opcheck(torch.ops.bigkernel.norm_bwd.default, arguments)
    inputs = [x, r if residual else None, w, b if center else None]
    inputs = [None if t is None else t.requires_grad_() for t in inputs]
    arguments = (*inputs, EPS, 1.0, center, round_first)
    torch.library.opcheck(torch.ops.bigkernel.norm_fwd.default, arguments)


@pytest.mark.parametrize("kind", ["llama", "layer"])
def test_norm_compile(kind):
    """Without a break, and other lengths compile nothing more."""
    ours, _, _ = problem(kind, (2, 8), F32, True)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (5, 6, 17):
        _, _, inputs = problem(kind, (2, rows, 24), F32, True)
        results = []
        for function in (compiled, ours):
            leaves = [t.detach().requires_grad_() for t in inputs]
            y, total = function(*leaves)
            (y.square().sum() + total.sum()).backward()
            results.append([y.detach(), total.detach(), *(t.grad for t in leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


@each_kind
def test_norm_gradcheck_of_the_reference(kind):
    ours, _, inputs = problem(kind, (3, 5), F64, True)
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    with use_backend("torch"):
        given = [t for t in leaves if t is not None]
        places = [t is not None for t in leaves]

        def call(*some):
            rest = iter(some)
            return ours(*(next(rest) if there else None for there in places))

        assert torch.autograd.gradcheck(call, given)


def test_norm_torch_func():
    """Transforms that know no custom op get its plain PyTorch, and so derivatives of any order."""
    x, weight = normal((4, 12), F32, 0), normal((12,), F32, 1)

    def loss(x):
        return ops.rms_norm(x, weight).pow(3).sum()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), want)
    torch.testing.assert_close(
        torch.vmap(lambda r: ops.rms_norm(r, weight))(x), ops.rms_norm(x, weight)
    )
    tangent = normal((4, 12), F32, 2)
    _, along = torch.func.jvp(loss, (x,), (tangent,))
    torch.testing.assert_close(along, (want * tangent).sum(), rtol=1e-4, atol=1e-4)


def test_norm_has_no_second_derivative():
    x = normal((4, 12), F32, 0).requires_grad_()
    (grad,) = torch.autograd.grad(ops.rms_norm(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_norm_float64_runs_in_pytorch(monkeypatch):
    monkeypatch.delenv("BIGKERNEL_STRICT")
    x = normal((3, 8), F64, 0)
    assert "float64 has no native kernel" in bigkernel.explain("norm", x)
    bigkernel.backend._warned.clear()
    with pytest.warns(bigkernel.backend.FallbackWarning, match="float64"):
        y = ops.rms_norm(x)
    torch.testing.assert_close(y, torch_rms(x, None, None))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, w: ops.rms_norm(x.int(), w), TypeError, "x must be float16"),
        (lambda x, w: ops.rms_norm(None, w), TypeError, "x must be a tensor, got NoneType"),
        (lambda x, w: ops.rms_norm(x, 3), TypeError, "weight must be a tensor, got int"),
        (lambda x, w: ops.rms_norm(x, w[:5]), ValueError, r"weight must be of shape \(8,\)"),
        (lambda x, w: ops.rms_norm(x, w[None]), ValueError, "weight must be of shape"),
        (lambda x, w: ops.rms_norm(x[0, 0], w), ValueError, r"x must be \[.., D\]"),
        (lambda x, w: ops.rms_norm(x[:, :0], w[:0]), ValueError, "D of at least 1"),
        (lambda x, w: ops.rms_norm(x, w, residual=x[:2]), ValueError, "residual must be of x's"),
        (lambda x, w: ops.rms_norm(x, w, -1.0), ValueError, "eps must be a finite number"),
        (lambda x, w: ops.rms_norm(x, w, float("nan")), ValueError, "eps must be"),
        (lambda x, w: ops.rms_norm(x, w, "a"), ValueError, "eps must be"),
        (lambda x, w: ops.rms_norm(x, w, casting="gpt"), ValueError, "'llama' or 'gemma'"),
        (lambda x, w: ops.rms_norm(x.to_sparse(), w), TypeError, "a dense tensor"),
        (lambda x, w: ops.rms_norm(x, w.to("meta")), ValueError, "weight must be on x's device"),
        (lambda x, w: ops.layer_norm(x, w, w[:3]), ValueError, "bias must be of shape"),
    ],
)
def test_norm_rejects_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(4, 8), torch.randn(8))
