"""Linear layers of 16-bit tensors in float32. Which feature has which test:

dtypes, bias, ranks, numbers of rows        matches_torch, rows
chunks of rows, blocks of a weight          many_chunks_and_blocks, sums_of_many_rows
strides, a transposed weight's gradient     noncontiguous, layout
which gradients, what is kept for them      every_choice_of_gradients, frozen
autocast                                    autocast
nothing to multiply                         empty
where it is torch's                         is_torchs
memory between calls                        memory, inference_mode, threads_of_python
opcheck, compile, torch.func, twice         opcheck, compile, torch_func, second_derivative
bad input                                   rejects_bad_input

They say that the processor multiplies no 16 bits, whether it does or not. There is no kernel, and
so no instruction set to go through.
"""

import itertools
import threading

import pytest
import torch
import torch._dynamo.testing
from fused_cases import BF16, F16, F32, F64, assert_fused, layouts, normal
from torch.nn import functional as F

import bigkernel
from bigkernel import ops, precision
from bigkernel.ops.linear import reference
from bigkernel.testing import assert_as_accurate

each_dtype = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])


@pytest.fixture
def without_products(monkeypatch):
    """A processor that multiplies no 16 bits."""
    monkeypatch.setattr(precision, "multiplies", lambda device, dtype: False)


@pytest.fixture
def small_parts(without_products, monkeypatch):
    """Several chunks of rows and several blocks of a weight, of small tensors."""
    monkeypatch.setattr(reference, "BLOCK", 300)
    monkeypatch.setattr(reference, "CHUNK", 500)
    monkeypatch.setattr(reference, "FEWEST_ROWS", 3)
    monkeypatch.setattr(reference, "MOST_ROWS", 11)
    monkeypatch.setattr(reference, "_kept", reference._Kept())


def inputs(*shape, outputs=24, dtype=BF16, bias=True, seed=0):
    given = [normal(shape, dtype, seed), normal((outputs, shape[-1]), dtype, seed + 1)]
    return [*given, normal((outputs,), dtype, seed + 2)] if bias else given


@pytest.mark.usefixtures("without_products")
@each_dtype
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(33,), (40, 33), (3, 7, 33), (2, 3, 5, 16)], ids=str)
def test_linear_matches_torch(shape, bias, dtype):
    assert_fused(ops.linear, F.linear, inputs(*shape, dtype=dtype, bias=bias))


@pytest.mark.usefixtures("without_products")
@each_dtype
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 511, 513, 1025])
def test_linear_rows(rows, dtype):
    """Few, which torch multiplies in forward, and the ends of chunks."""
    assert_fused(ops.linear, F.linear, inputs(rows, 20, dtype=dtype))


@pytest.mark.usefixtures("small_parts")
@each_dtype
@pytest.mark.parametrize("rows", [17, 22, 23, 100])
def test_linear_many_chunks_and_blocks(rows, dtype):
    for width, outputs in ((30, 47), (400, 3), (1, 700)):
        assert_fused(ops.linear, F.linear, inputs(rows, width, outputs=outputs, dtype=dtype))


@pytest.mark.usefixtures("without_products")
def test_linear_sums_of_many_rows():
    """Gradients of the parameters, in float32 until the end: every digit of bfloat16 is right."""
    x, w, b = inputs(20000, 8, outputs=4)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    dy = normal((20000, 4), BF16, 7)
    _, dw, db = torch.autograd.grad(ops.linear(*leaves), leaves, dy)
    for got, exact in ((dw, dy.double().T @ x.detach().double()), (db, dy.double().sum(0))):
        off = (got.double() - exact).abs()
        assert (off <= 0.501 * torch.finfo(BF16).eps * exact.abs()).all()


@pytest.mark.usefixtures("small_parts")
def test_linear_noncontiguous():
    x, w, b = inputs(3, 5, 30, outputs=47)
    want = ops.linear(x, w, b)
    assert want.is_contiguous()
    for name, other in layouts(x).items():
        assert torch.equal(ops.linear(other, w, b), want), name
    for name, other in (*layouts(w).items(), ("transposed", w.T.contiguous().T)):
        torch.testing.assert_close(ops.linear(x, other, b), want, rtol=1e-2, atol=1e-2, msg=name)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    y = ops.linear(*leaves)
    dy = normal(y.shape, BF16, 5)
    for gradient in (torch.ones((), dtype=BF16).expand_as(y), *layouts(dy).values()):
        got, want = (
            torch.autograd.grad(y, leaves, g, retain_graph=True)
            for g in (gradient, gradient.contiguous())
        )
        assert all(map(torch.equal, got, want))


@pytest.mark.usefixtures("small_parts")
@each_dtype
def test_linear_layout_of_a_weights_gradient(dtype):
    """A weight that stands [in, out], as transformers' Conv1D has it, gets such a gradient."""
    x, w = inputs(40, 30, outputs=47, dtype=dtype, bias=False)
    assert_fused(
        lambda x, w: ops.linear(x, w.T), lambda x, w: F.linear(x, w.T), [x, w.T.contiguous()]
    )
    stored = w.T.contiguous().requires_grad_()
    ops.linear(x, stored.T).sum().backward()
    assert stored.grad.is_contiguous()


@pytest.mark.usefixtures("without_products")
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_linear_every_choice_of_gradients(wanted):
    given = [t.requires_grad_(w) for t, w in zip(inputs(40, 33), wanted, strict=True)]
    y = ops.linear(*given)
    assert y.requires_grad == any(wanted)
    if not any(wanted):
        return
    y.sum().backward()
    wide = [t.detach().double().requires_grad_() for t in given]
    F.linear(*wide).sum().backward()
    for t, exact, want in zip(given, wide, wanted, strict=True):
        assert (t.grad is not None) == want
        if want:
            assert_as_accurate(t.grad, exact.grad, exact.grad.to(BF16))


@pytest.mark.usefixtures("without_products")
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_frozen_weights_keep_no_input_alive(frozen):
    x, w, b = (t.requires_grad_() for t in inputs(40, 33))
    w.requires_grad_(not frozen)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, id)
    with hooks:
        y = ops.linear(x * 2, w, b)
    assert type(y.grad_fn).__name__ == "EagerBackward"
    assert (x.shape in kept) == (not frozen)


@pytest.mark.usefixtures("without_products")
@each_dtype
@pytest.mark.parametrize("narrow", [False, True], ids=["wide input", "narrow input"])
def test_linear_autocast(dtype, narrow):
    """Weights of float32 are not rounded, so results are more exact than torch's."""
    x, w, b = inputs(300, 33, dtype=F32)
    x = x.to(dtype) if narrow else x
    dy = normal((300, 24), dtype, 5)

    def run(function, to):
        leaves = [t.detach().to(to or t.dtype).requires_grad_() for t in (x, w, b)]
        with torch.autocast("cpu", dtype, enabled=to is None):
            y = function(*leaves)
        grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return y, *grads

    got, torchs, exact = run(ops.linear, None), run(F.linear, None), run(F.linear, F64)
    for a, b, c in zip(got, torchs, exact, strict=True):
        assert a.dtype == b.dtype
        assert_as_accurate(a.detach(), c.detach(), b.detach())
    assert got[0].dtype == dtype
    error = (got[2].double() - exact[2]).abs().max() / exact[2].abs().max()
    assert error < (torch.finfo(dtype).eps if not narrow else 1e-5)


@pytest.mark.usefixtures("without_products")
def test_linear_autocast_leaves_float64_and_converts_the_other_16_bits():
    x, w, b = inputs(40, 33, dtype=F16)
    with torch.autocast("cpu", BF16):
        wide = ops.linear(x.double(), w.double(), b.double())
        y = ops.linear(x, w, b)
    assert wide.dtype == F64
    assert torch.equal(y, ops.linear(x.bfloat16(), w.bfloat16(), b.bfloat16()))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (5, 0), (0,)], ids=str)
@pytest.mark.parametrize("outputs", [0, 3])
def test_linear_empty(shape, outputs):
    leaves = [t.requires_grad_() for t in inputs(*shape, outputs=outputs)]
    got, want = ops.linear(*leaves), F.linear(*leaves)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.sum(), leaves),
        torch.autograd.grad(want.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_linear_is_torchs_where_that_is_as_fast(dtype, monkeypatch):
    """The bits too, and the second derivative."""
    monkeypatch.setattr(precision, "multiplies", lambda device, dtype: True)
    leaves = [t.requires_grad_() for t in inputs(40, 33, dtype=dtype)]
    y = ops.linear(*leaves)
    assert torch.equal(y, F.linear(*leaves))
    (dx,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    dx.sum().backward()
    assert leaves[1].grad.any()


@pytest.mark.usefixtures("without_products")
def test_linear_is_torchs_on_other_devices_and_of_other_kinds_of_tensors():
    x, w, b = inputs(40, 33)
    assert ops.linear(*(t.to("meta") for t in (x, w, b))).shape == (40, 24)

    class Labelled(torch.Tensor):
        pass

    assert type(ops.linear(x.as_subclass(Labelled), w, b)) is Labelled


def test_linear_memory_between_calls_is_bounded(small_parts):
    for width, outputs in ((30, 47), (2, 3), (20, 2), (700, 2)):
        x, w, b = (t.requires_grad_() for t in inputs(100, width, outputs=outputs))
        ops.linear(x, w, b).sum().backward()
        kept = reference._kept.memory
        assert kept is None or kept.numel() <= reference.BLOCK + reference.CHUNK
    assert kept is not None


def test_linear_after_inference_mode(small_parts):
    """What it keeps may be written to afterwards, by the operator as compiled code calls it too."""
    given = inputs(40, 33)
    with torch.inference_mode():
        want = ops.linear(*given)
    assert torch.equal(torch.ops.bigkernel.linear_fwd(*given), want)
    leaves = [t.requires_grad_() for t in given]
    y = ops.linear(*leaves)
    y.sum().backward()
    assert torch.equal(y, want)


def test_linear_in_threads_of_python(small_parts):
    cases = [inputs(40, 33, seed=10 * i) for i in range(4)]
    wanted = [ops.linear(*case) for case in cases]
    wrong = []

    def run(case, want):
        for _ in range(50):
            if not torch.equal(ops.linear(*case), want):
                wrong.append(case)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(cases, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_linear_under_other_defaults(small_parts):
    given = inputs(40, 33)
    want = ops.linear(*given)
    reference._kept.memory = None
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(F64)
        with torch.device("meta"):
            assert torch.equal(ops.linear(*given), want)
    finally:
        torch.set_default_dtype(before)


@each_dtype
@pytest.mark.parametrize("namespace", ["bigkernel", "bigkernel_torch"])
def test_linear_opcheck(namespace, dtype):
    operators = getattr(torch.ops, namespace)
    leaves = [t.requires_grad_() for t in inputs(3, 5, 33, dtype=dtype)]
    torch.library.opcheck(operators.linear_fwd.default, tuple(leaves))
    x, w, _ = (t.detach() for t in leaves)
    dy = normal((3, 5, 24), dtype, 2)
    for arguments in ((dy, x, w, True, True), (dy, None, w.T.contiguous().T, True, False)):
        torch.library.opcheck(operators.linear_bwd.default, arguments)


@pytest.mark.usefixtures("without_products")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear_compile(bias):
    """Without a break, and other numbers of rows compile nothing more."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.linear, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (5, 6, 17):
        results = []
        for function in (compiled, ops.linear):
            leaves = [t.requires_grad_() for t in inputs(2, rows, 33, bias=bias)]
            y = function(*leaves)
            y.float().square().sum().backward()
            results.append([y.detach(), *(t.grad for t in leaves)])
        assert all(map(torch.equal, *results))
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1
    assert "linear_fwd" in str(counter.graphs[0].code)


def test_linear_asks_the_machine_while_it_is_compiled():
    """The answer is a constant of the compiled code; how it is measured is none of its business."""
    torch._dynamo.reset()
    precision.speedup.cache_clear()
    given = inputs(16, 33, dtype=F16)
    compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), ops.linear(*given))
    assert precision.speedup.cache_info().currsize == 1


@pytest.mark.usefixtures("without_products")
def test_linear_torch_func():
    x, w, b = inputs(16, 33)

    def loss(x, function=ops.linear):
        return function(x, w, b).float().square().sum()

    wanted = torch.func.grad(lambda x: loss(x, F.linear))(x)
    torch.testing.assert_close(torch.func.grad(loss)(x), wanted)
    tangent = torch.func.jvp(lambda x: ops.linear(x, w, b), (x,), (x,))[1]
    torch.testing.assert_close(tangent, F.linear(x, w), rtol=2e-2, atol=2e-2)
    several = torch.vmap(ops.linear, (0, None, None))(torch.stack((x, x + 1)), w, b)
    torch.testing.assert_close(several[0], ops.linear(x, w, b), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("without_products")
def test_linear_has_no_second_derivative():
    x, w, b = (t.requires_grad_() for t in inputs(16, 33))
    (grad,) = torch.autograd.grad(ops.linear(x, w, b).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear has no second derivative"):
        grad.sum().backward()


def test_linear_says_that_its_products_are_torchs():
    assert "its products are torch's" in bigkernel.explain("linear")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, w, b: ops.linear(2.0, w, b), TypeError, "input must be a tensor, got float"),
        (lambda x, w, b: ops.linear(x.int(), w, b), TypeError, "input must be float16"),
        (lambda x, w, b: ops.linear(x.sum(), w, b), ValueError, r"input must be \[.., K\]"),
        (lambda x, w, b: ops.linear(x, w.T, b), ValueError, r"weight must be \[M, 8\]"),
        (lambda x, w, b: ops.linear(x, w[0], b), ValueError, "weight must be"),
        (lambda x, w, b: ops.linear(x, w, b[:2]), ValueError, r"bias must be of shape \(3,\)"),
        (lambda x, w, b: ops.linear(x, w.half(), b), TypeError, "weight must be of input's dtype"),
        (lambda x, w, b: ops.linear(x, w, b.half()), TypeError, "inside torch.autocast"),
        (lambda x, w, b: ops.linear(x, w.to("meta"), b), ValueError, "on input's device"),
        (lambda x, w, b: ops.linear(x.to_sparse(), w, b), TypeError, "a dense tensor"),
    ],
)
def test_linear_rejects_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(4, 8), torch.randn(3, 8), torch.randn(3))
