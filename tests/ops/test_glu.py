"""Gated linear units. Which feature has which test:

activations, dtypes, two tensors or one     matches_torch, is_torch
lengths, instruction sets, strides          lengths, noncontiguous
accuracy of the activations themselves      activation_is_accurate
large values, NaN, infinity, empty          extremes, non_finite, empty
bits: threads, batch                        thread_count, an_element_depends_on_nothing_else
opcheck, compile, gradcheck, torch.func     opcheck, compile, gradcheck, torch_func
float64, bad input                          float64, rejects_bad_input
"""

import pytest
import torch
import torch._dynamo.testing
from fused_cases import (
    BF16,
    DTYPES,
    EXACT,
    F16,
    F32,
    F64,
    THEIRS,
    assert_fused,
    assert_fused_outputs,
    assert_strides_of_the_gradient_change_nothing,
    layouts,
    normal,
    threads,
)
from torch.nn import functional as F

import bigkernel
from bigkernel import ops
from bigkernel.backend import use_backend

each_activation = pytest.mark.parametrize("activation", THEIRS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def functions(activation, merged=False):
    act = THEIRS[activation]
    if not merged:
        return (lambda g, u: ops.glu(g, u, activation)), (lambda g, u: act(g) * u)

    def theirs(x):
        gate, up = x.chunk(2, -1)
        return act(gate) * up

    return (lambda x: ops.glu(x, activation=activation)), theirs


@each_activation
@each_dtype
def test_glu_matches_torch(cpu_isa, activation, dtype):
    inputs = [normal((3, 40, 100), dtype, i, 2.0) for i in range(2)]
    assert_fused(*functions(activation), inputs)
    assert_fused(*functions(activation, merged=True), [torch.cat(inputs, -1)])


def test_glu_is_torchs_with_its_halves_exchanged():
    x = normal((5, 24), F32, 0)
    torch.testing.assert_close(
        ops.glu(torch.cat(x.chunk(2, -1)[::-1], -1), activation="sigmoid"), F.glu(x)
    )


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 1027])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_glu_lengths(cpu_isa, activation, length):
    for dtype in (F32, BF16):
        inputs = [normal((3, length), dtype, i, 2.0) for i in range(2)]
        assert_fused(*functions(activation), inputs)
        assert_fused(*functions(activation, merged=True), [torch.cat(inputs, -1)])


@pytest.mark.parametrize("kinds", [(F32, BF16), (F16, F32), (BF16, F16)], ids=str)
def test_glu_mixed_dtypes(kinds):
    assert_fused(*functions("silu"), [normal((3, 20), d, i) for i, d in enumerate(kinds)])


def test_glu_noncontiguous():
    gate, up = (normal((3, 5, 24), F32, i) for i in range(2))
    want = ops.glu(gate, up)
    for name, other in layouts(gate).items():
        assert torch.equal(ops.glu(other, up), want), name
    for name, other in layouts(up).items():
        assert torch.equal(ops.glu(gate, other), want), name
    merged = torch.cat((gate, up), -1)
    for name, other in layouts(merged).items():
        assert torch.equal(ops.glu(other), want), name
    assert torch.equal(ops.glu(*merged.chunk(2, -1)), want)
    leaf = gate.clone().requires_grad_()
    y = ops.glu(leaf, up)
    assert_strides_of_the_gradient_change_nothing(y, leaf)


@each_activation
def test_glu_activation_is_accurate(cpu_isa, activation):
    """Of every size of gate, each judged apart: value and slope, the tails too."""
    ours, _ = functions(activation)

    def theirs(gate, up):
        own = EXACT if gate.dtype == F64 else THEIRS
        return own.get(activation, THEIRS[activation])(gate) * up

    for low, high in ((-90, -20), (-20, -8), (-8, -4), (-4, -1), (-1, 0), (0, 1), (1, 4), (4, 90)):
        gate = torch.linspace(low, high, 4001)
        assert_fused(ours, theirs, [gate, torch.ones_like(gate)])
    small = torch.logspace(-30, 0, 1000)
    assert_fused(ours, theirs, [torch.cat((small, -small)), torch.ones(2000)])


def test_gelu_keeps_the_digits_of_its_tail(cpu_isa):
    """Where 1 + erf has none left."""
    gate = torch.linspace(-8, -3, 1001)
    got = ops.glu(gate, torch.ones_like(gate), "gelu").double()
    x = gate.double()
    exact = x * 0.5 * torch.special.erfc(-x / 2**0.5)
    assert ((got - exact).abs() <= 1e-5 * exact.abs()).all()


@each_activation
@each_dtype
def test_glu_extremes(cpu_isa, activation, dtype):
    """Nothing that is finite becomes NaN on the way; torch's own derivative of tanh does."""
    top = torch.finfo(dtype).max
    gate = torch.tensor([top, -top, top / 4, -top / 4, 1e4, -1e4, 200, -200, 0.0, -0.0]).to(dtype)
    one = torch.ones_like(gate)
    ours, theirs = functions(activation)
    assert_fused_outputs(ours, theirs, [gate, one])
    leaf, wide = gate.clone().requires_grad_(), gate.double().requires_grad_()
    (a,) = torch.autograd.grad(ours(leaf, one), leaf, one)
    (b,) = torch.autograd.grad(theirs(wide, one.double()), wide, one.double())
    torch.testing.assert_close(a, b.to(dtype))


@each_activation
def test_glu_non_finite(cpu_isa, activation):
    gate = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0, 1.0, 1.0, 2.0])
    up = torch.tensor([1.0, 1.0, 1.0, float("nan"), float("inf"), float("-inf"), 2.0])
    ours, theirs = functions(activation)  # in float64: torch's fp32 gelu of infinity is NaN
    leaves = [t.requires_grad_() for t in (gate, up)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got, want = ours(*leaves), theirs(*wide)
    torch.testing.assert_close(got, want.float(), equal_nan=True)
    grads = torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), wide)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b.float(), equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (8,), (0,)])
def test_glu_empty_and_other_ranks(shape):
    for merged in (False, True):
        ours, theirs = functions("silu", merged)
        leaves = [normal(shape, F32, i).requires_grad_() for i in range(1 if merged else 2)]
        got, want = ours(*leaves), theirs(*leaves)
        assert got.shape == want.shape
        for a, b in zip(
            torch.autograd.grad(got.sum(), leaves),
            torch.autograd.grad(want.sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@each_activation
def test_glu_thread_count_changes_nothing(activation):
    inputs = [normal((300, 700), BF16, i) for i in range(2)]
    results = []
    for count in (1, 2, 3):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with threads(count):
            y = ops.glu(*leaves, activation)
            y.float().square().sum().backward()
        results.append([y.detach(), *(t.grad for t in leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each_activation
def test_glu_an_element_depends_on_nothing_else(cpu_isa, activation):
    """Whatever stands beside it: at every place of a vector the same bits."""
    gate, up = (normal((1, 50), F32, i, 2.0) for i in range(2))
    whole = ops.glu(gate, up, activation)
    for first, last in ((0, 1), (3, 20), (17, 50)):
        assert torch.equal(
            ops.glu(gate[:, first:last], up[:, first:last], activation), whole[:, first:last]
        )
    assert torch.equal(ops.glu(gate.T, up.T, activation), whole.T)


@pytest.mark.parametrize("merged", [False, True], ids=["two", "merged"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_glu_opcheck(merged, dtype):
    gate = normal((4, 6, 10), dtype, 0).requires_grad_()
    up = None if merged else normal((4, 6, 10), dtype, 1).requires_grad_()
    torch.library.opcheck(torch.ops.bigkernel.glu_fwd.default, (gate, up, 1))
    dy = normal((4, 6, 5 if merged else 10), dtype, 2)
    arguments = (dy, gate.detach(), None if merged else up.detach(), 1)
    torch.library.opcheck(torch.ops.bigkernel.glu_bwd.default, arguments)


@pytest.mark.parametrize("merged", [False, True], ids=["two", "merged"])
def test_glu_compile(merged):
    """Without a break, and other lengths compile nothing more."""
    ours, _ = functions("gelu_tanh", merged)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (5, 6, 17):
        results = []
        for function in (compiled, ours):
            leaves = [normal((2, rows, 24), F32, i).requires_grad_() for i in range(2 - merged)]
            y = function(*leaves)
            y.square().sum().backward()
            results.append([y.detach(), *(t.grad for t in leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


@each_activation
def test_glu_gradcheck_of_the_reference(activation):
    inputs = [normal((3, 5), F64, i).requires_grad_() for i in range(2)]
    with use_backend("torch"):
        assert torch.autograd.gradcheck(functions(activation)[0], inputs)
        merged = torch.cat([t.detach() for t in inputs], -1)[:, :8].requires_grad_()
        assert torch.autograd.gradcheck(functions(activation, True)[0], [merged])


def test_glu_torch_func():
    gate, up = (normal((4, 12), F32, i) for i in range(2))

    def loss(gate):
        return ops.glu(gate, up).pow(3).sum()

    leaf = gate.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(gate), want)
    torch.testing.assert_close(torch.vmap(ops.glu)(gate, up), ops.glu(gate, up))


def test_glu_has_no_second_derivative():
    gate = normal((4, 12), F32, 0).requires_grad_()
    (grad,) = torch.autograd.grad(ops.glu(gate).sum(), gate, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_glu_float64_runs_in_pytorch(monkeypatch):
    monkeypatch.delenv("BIGKERNEL_STRICT")
    x = normal((3, 8), F64, 0)
    assert "float64 has no native kernel" in bigkernel.explain("glu", x)
    bigkernel.backend._warned.clear()
    with pytest.warns(bigkernel.backend.FallbackWarning, match="float64"):
        y = ops.glu(x)
    torch.testing.assert_close(y, F.silu(x[:, :4]) * x[:, 4:])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g, u: ops.glu(g, u, "swish"), ValueError, "one of silu, gelu, gelu_tanh"),
        (lambda g, u: ops.glu(g, u, 0), ValueError, "activation must be one of"),
        (lambda g, u: ops.glu(g, u[:2]), ValueError, r"up must be of gate's shape \(4, 8\)"),
        (lambda g, u: ops.glu(g[:, :7]), ValueError, r"gate must be \[.., 2 I\]"),
        (lambda g, u: ops.glu(g[0, 0], u[0, 0]), ValueError, r"gate must be \[.., I\]"),
        (lambda g, u: ops.glu(g[0, 0]), ValueError, "gate must be"),
        (lambda g, u: ops.glu(g.int(), u), TypeError, "gate must be float16"),
        (lambda g, u: ops.glu(g, 2.0), TypeError, "up must be a tensor, got float"),
        (lambda g, u: ops.glu(g, u.to("meta")), ValueError, "up must be on gate's device"),
        (lambda g, u: ops.glu(g.to_sparse(), u), TypeError, "a dense tensor"),
    ],
)
def test_glu_rejects_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(4, 8), torch.randn(4, 8))
