"""A bias with the activation after it. Which feature has which test:

activations, dtypes, with and without bias   matches_torch, bias_of_another_dtype
lengths, instruction sets, strides           lengths, noncontiguous
the gradient of the bias over many rows      bias_gradient_of_many_rows
large values, NaN, infinity, empty           extremes, non_finite, empty
bits: threads, batch                         thread_count, an_element_depends_on_nothing_else
opcheck, compile, gradcheck, torch.func      opcheck, compile, gradcheck, torch_func
float64, bad input                           float64, rejects_bad_input
the CUDA kernels, in the emulator, on a GPU  kernel_*, cuda_matches_torch
"""

import bias_act_ptx
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
    assert_strides_of_the_gradient_change_nothing,
    layouts,
    normal,
    threads,
)
from torch.nn import functional as F

import bigkernel
from bigkernel import ops
from bigkernel.backend import use_backend
from bigkernel.ops.bias_act import reference
from bigkernel.ops.glu.reference import ACTIVATIONS
from bigkernel.testing import assert_as_accurate, ptx

each_activation = pytest.mark.parametrize("activation", THEIRS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def functions(activation):
    """Ours and torch's of (x, bias), or of x alone."""

    def theirs(x, bias=None):
        own = EXACT if x.dtype == F64 else THEIRS
        x = x if bias is None else x + bias
        return own.get(activation, THEIRS[activation])(x)

    return (lambda x, bias=None: ops.bias_act(x, bias, activation)), theirs


@each_activation
@each_dtype
def test_bias_act_matches_torch(cpu_isa, activation, dtype):
    x, bias = normal((3, 40, 100), dtype, 0, 2.0), normal((100,), dtype, 1)
    assert_fused(*functions(activation), [x, bias])
    assert_fused(*functions(activation), [x])


@pytest.mark.parametrize("kinds", [(BF16, F32), (F32, BF16), (F16, BF16)], ids=str)
def test_bias_act_bias_of_another_dtype(kinds):
    """The result has x's dtype, whatever bias has, as after a product inside autocast."""
    x, bias = normal((30, 20), kinds[0], 0), normal((20,), kinds[1], 1)
    ours, theirs = functions("gelu_tanh")

    def in_fp32(x, bias):
        return theirs(x, bias) if x.dtype == F64 else theirs(x.float(), bias.float()).to(x.dtype)

    assert_fused(ours, in_fp32, [x, bias])


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 1027])
@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_bias_act_lengths(cpu_isa, activation, length):
    for dtype in (F32, BF16):
        x, bias = normal((3, length), dtype, 0, 2.0), normal((length,), dtype, 1)
        assert_fused(*functions(activation), [x, bias])


def test_bias_act_noncontiguous():
    x, bias = normal((5, 6, 40), F32, 0), normal((40,), F32, 1)
    ours, _ = functions("gelu")
    want = ours(x, bias)
    for name, strided in layouts(x).items():
        assert torch.equal(ours(strided, bias), want), name
    leaf = x.clone().requires_grad_()
    y = ours(leaf, layouts(bias[None])["part of wider rows"][0])
    assert_strides_of_the_gradient_change_nothing(y, leaf)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 31, 33, 65, 257, 3001])
@each_dtype
def test_bias_act_bias_gradient_of_many_rows(cpu_isa, rows, dtype):
    """Of numbers of one sign, whose sum loses most where it is added one by one in few bits."""
    x, bias = normal((rows, 18), dtype, 0).abs(), normal((18,), dtype, 1).abs()
    leaves = [x.requires_grad_(), bias.requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    gradient = normal((rows, 18), dtype, 2).abs()
    ours, theirs = functions("gelu")
    _, got = torch.autograd.grad(ours(*leaves), leaves, gradient)
    _, exact = torch.autograd.grad(theirs(*wide), wide, gradient.double())
    # To the rounding of the result, and in fp32 a little of the sum's.
    allowed = 0.51 * torch.finfo(dtype).eps if dtype != F32 else 4e-7
    assert ((got.double() - exact).abs() <= allowed * exact.abs()).all()


@each_activation
@each_dtype
def test_bias_act_extremes(cpu_isa, activation, dtype):
    """Nothing that is finite becomes NaN on the way."""
    top = torch.finfo(dtype).max
    x = torch.tensor([top, -top, top / 4, -top / 4, 1e4, -1e4, 200, -200, 0.0, -0.0]).to(dtype)
    zero = torch.zeros_like(x)
    ours, theirs = functions(activation)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    got, want = ours(leaf, zero), theirs(wide, zero.double())
    torch.testing.assert_close(got, want.to(dtype))
    (a,) = torch.autograd.grad(got, leaf, torch.ones_like(x))
    (b,) = torch.autograd.grad(want, wide, torch.ones_like(wide))
    torch.testing.assert_close(a, b.to(dtype))


@each_activation
def test_bias_act_non_finite(cpu_isa, activation):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0, 1.0, 1.0, 2.0])
    bias = torch.tensor([1.0, 1.0, 1.0, float("nan"), float("inf"), float("-inf"), 2.0])
    leaves = [t.requires_grad_() for t in (x, bias)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got, want = functions(activation)[0](*leaves), THEIRS[activation](wide[0] + wide[1])
    torch.testing.assert_close(got, want.float(), equal_nan=True)
    grads = torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), wide)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b.float(), equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (8,), (0,)])
def test_bias_act_empty_and_other_ranks(shape):
    ours, theirs = functions("silu")
    leaves = [normal(s, F32, i).requires_grad_() for i, s in enumerate((shape, shape[-1:]))]
    got, want = ours(*leaves), theirs(*leaves)
    assert got.shape == want.shape
    grads = torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@each_activation
def test_bias_act_thread_count_changes_nothing(activation):
    inputs = [normal((300, 700), BF16, 0), normal((700,), F32, 1)]
    results = []
    for count in (1, 2, 3):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with threads(count):
            y = ops.bias_act(*leaves, activation)
            y.float().square().sum().backward()
        results.append([y.detach(), *(t.grad for t in leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each_activation
def test_bias_act_an_element_depends_on_nothing_else(cpu_isa, activation):
    """Whatever stands beside it: at every place of a vector the same bits."""
    x, bias = normal((1, 50), F32, 0, 2.0), normal((50,), F32, 1)
    whole = ops.bias_act(x, bias, activation)
    for first, last in ((0, 1), (3, 20), (17, 50)):
        part = ops.bias_act(x[:, first:last], bias[first:last], activation)
        assert torch.equal(part, whole[:, first:last])


def test_bias_act_frozen_bias():
    """What is not wanted is not computed, and x has its gradient."""
    x, bias = normal((6, 12), F32, 0).requires_grad_(), normal((12,), F32, 1)
    (a,) = torch.autograd.grad(ops.bias_act(x, bias).sum(), x)
    (b,) = torch.autograd.grad(F.gelu(x + bias).sum(), x)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_bias_act_opcheck(dtype):
    x, bias = normal((4, 6, 10), dtype, 0).requires_grad_(), normal((10,), F32, 1).requires_grad_()
    for given in (bias, None):
        torch.library.opcheck(torch.ops.bigkernel.bias_act_fwd.default, (x, given, 1))
    dy = normal((4, 6, 10), dtype, 2)
    for needed in (True, False):
        arguments = (dy, x.detach(), bias.detach(), 1, needed)
        torch.library.opcheck(torch.ops.bigkernel.bias_act_bwd.default, arguments)


def test_bias_act_compile():
    """Without a break, and other lengths compile nothing more."""
    ours, _ = functions("gelu_tanh")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (5, 6, 17):
        results = []
        for function in (compiled, ours):
            leaves = [
                normal(s, F32, i).requires_grad_() for i, s in enumerate([(2, rows, 24), (24,)])
            ]
            y = function(*leaves)
            y.square().sum().backward()
            results.append([y.detach(), *(t.grad for t in leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


@each_activation
def test_bias_act_gradcheck_of_the_reference(activation):
    inputs = [normal(s, F64, i).requires_grad_() for i, s in enumerate([(3, 5), (5,)])]
    with use_backend("torch"):
        assert torch.autograd.gradcheck(functions(activation)[0], inputs)


def test_bias_act_torch_func():
    x, bias = normal((4, 12), F32, 0), normal((12,), F32, 1)

    def loss(bias):
        return ops.bias_act(x, bias).pow(3).sum()

    leaf = bias.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(bias), want)
    each = torch.vmap(ops.bias_act, in_dims=(0, None))(x[:, None], bias)
    torch.testing.assert_close(each[:, 0], ops.bias_act(x, bias))


def test_bias_act_has_no_second_derivative():
    x = normal((4, 12), F32, 0).requires_grad_()
    (grad,) = torch.autograd.grad(ops.bias_act(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_bias_act_float64_runs_in_pytorch(monkeypatch):
    monkeypatch.delenv("BIGKERNEL_STRICT")
    x, bias = normal((3, 8), F64, 0), normal((8,), F64, 1)
    bigkernel.backend._warned.clear()
    with pytest.warns(bigkernel.backend.FallbackWarning, match="float64"):
        y = ops.bias_act(x, bias)
    torch.testing.assert_close(y, F.gelu(x + bias))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, b: ops.bias_act(x, b, "swish"), ValueError, "one of silu, gelu, gelu_tanh"),
        (lambda x, b: ops.bias_act(x, b, 0), ValueError, "activation must be one of"),
        (lambda x, b: ops.bias_act(x, b[:4]), ValueError, r"bias must be of x's last dimension"),
        (lambda x, b: ops.bias_act(x, x), ValueError, r"bias must be of x's last dimension"),
        (lambda x, b: ops.bias_act(x[0, 0]), ValueError, r"x must be \[.., D\]"),
        (lambda x, b: ops.bias_act(x.int(), b), TypeError, "x must be float16"),
        (lambda x, b: ops.bias_act(x, b.int()), TypeError, "bias must be float16"),
        (lambda x, b: ops.bias_act(x, 2.0), TypeError, "bias must be a tensor, got float"),
        (lambda x, b: ops.bias_act(x, b.to("meta")), ValueError, "bias must be on x's device"),
        (lambda x, b: ops.bias_act(x.to_sparse(), b), TypeError, "a dense tensor"),
    ],
)
def test_bias_act_rejects_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(4, 8), torch.randn(8))


@pytest.fixture
def emulator():
    if ptx.nvcc() is None:
        pytest.skip("nvcc is not on the path")


def assert_kernel(x, bias, activation):
    """Forward and backward of the kernels against float64, beside plain PyTorch at x's dtype."""
    number, dy = ACTIVATIONS.index(activation), normal(x.shape, x.dtype, 7)
    _, theirs = functions(activation)

    def every(x, bias, dy):
        leaves = [t.detach().requires_grad_() for t in (x, bias)]
        y = theirs(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    y, _ = bias_act_ptx.run(x, bias, number)
    dx, dbias = bias_act_ptx.run(x, bias, number, dy, needs_dbias=True)
    exact = every(x.double(), bias.double(), dy.double())
    for got, want, same in zip((y, dx, dbias), exact, every(x, bias, dy), strict=True):
        assert_as_accurate(got, want, same.to(got.dtype))


@each_activation
@each_dtype
def test_bias_act_kernel_matches_torch(emulator, activation, dtype):
    assert_kernel(normal((70, 272), dtype, 0, 2.0), normal((272,), F32, 1), activation)


@pytest.mark.gpu
@each_activation
@each_dtype
def test_bias_act_cuda_matches_torch(activation, dtype):
    for rows, dim in ((70, 272), (65, 7)):
        x, bias = normal((rows, dim), dtype, 0, 2.0), normal((dim,), dtype, 1)
        assert_fused(*functions(activation), [x.cuda(), bias.cuda()])


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 33), (1, 256), (65, 7), (130, 40)], ids=str)
def test_bias_act_kernel_shapes(emulator, rows, dim):
    """Of odd lengths, of one chunk and of several."""
    for dtype in (F32, BF16):
        assert_kernel(normal((rows, dim), dtype, 0), normal((dim,), F32, 1), "relu2")


def test_bias_act_kernel_without_bias_and_its_gradient(emulator):
    x, dy = normal((5, 24), F32, 0), normal((5, 24), F32, 1)
    y, _ = bias_act_ptx.run(x, None, ACTIVATIONS.index("silu"))
    torch.testing.assert_close(y, F.silu(x))
    dx, dbias = bias_act_ptx.run(x, None, ACTIVATIONS.index("silu"), dy)
    torch.testing.assert_close(dx, reference.bias_act_bwd(dy, x, None, 0, False)[0])
    assert dbias.isnan().all()
    assert len(bias_act_ptx.launches) == 1


@each_activation
def test_bias_act_kernel_extremes(emulator, activation):
    """Of all sizes, and what is not finite, as in the definition."""
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[3e38, -3e38, 1e19, -1e19, 90, -90, 20, -20, 0.0, nan, inf, -inf]])
    dy, bias = torch.ones_like(x), torch.zeros(12)
    number = ACTIVATIONS.index(activation)
    wide = x.double().requires_grad_()
    want = functions(activation)[1](wide)
    (slope,) = torch.autograd.grad(want.sum(), wide)
    if activation in EXACT:  # whose formulas are no numbers at infinity
        wide = THEIRS[activation](x.double())
        want = torch.where(x.isinf(), wide, want)
    y, _ = bias_act_ptx.run(x, bias, number)
    torch.testing.assert_close(y, want.float().detach(), equal_nan=True)
    dx, _ = bias_act_ptx.run(x, bias, number, dy)
    finite = x.isfinite()
    torch.testing.assert_close(dx[finite], slope.float()[finite])


def test_bias_act_kernel_reads_and_writes_once(emulator):
    """In whole sectors, and no shared memory is fought over."""
    x, bias = normal((64, 512), BF16, 0), normal((512,), F32, 1)
    bias_act_ptx.run(x, bias, 1, normal((64, 512), BF16, 2), needs_dbias=True)
    first, second = (launch.counters for launch in bias_act_ptx.launches)
    sectors = x.numel() * 2 // 32
    assert [first.loads[name].sectors for name in ("x", "dy")] == [sectors, sectors]
    assert first.stores["y"].sectors == sectors
    assert second.loads["partials"].sectors == first.stores["partials"].sectors == 512 * 4 // 32
    assert first.shared_wavefronts == first.shared_wavefronts_minimum


def test_bias_act_kernel_refuses_a_device_that_is_too_old(emulator):
    x = normal((2, 8), F32, 0)
    with pytest.raises(RuntimeError, match=r"bias_act_kernel is for GPUs .* 8\.0"):
        bias_act_ptx.run(x, None, 0, device="T4")
