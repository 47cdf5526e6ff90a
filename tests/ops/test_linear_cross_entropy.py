"""A linear layer and its cross-entropy. Which feature has which test:

reductions, ignored rows, smoothing, z-loss,
softcap, class weights, soft labels, bias   matches_torch
numbers of classes, rows and features       sizes, many_chunks, noncontiguous, leading_dimensions
products of few rows, sums of many          sizes, a_row_among_few, gradient_of_the_bias
which gradients, frozen inputs              every_choice_of_gradients
upstream gradients, backward twice, hooks   upstream, backward_again, accumulates
bf16 with and without 16-bit products       matches_torch (instruction sets)
torch's own function of this name           is_torchs_with_its_arguments
autocast                                    autocast
num_items                                   num_items
NaN, infinity                               non_finite, an_ignored_row_may_hold_anything
nothing counted, no rows                    all_ignored, no_rows
bits: again, threads                        repeats_its_bits
bits: other rows, padding                   a_row_depends_on_nothing_else
memory                                      memory
opcheck, compile, gradcheck, torch.func     opcheck, compile, gradcheck, torch_func
float64, bad input                          float64, rejects_bad_input
"""

import os
import subprocess
import sys

import hypothesis
import pytest
import torch
import torch._dynamo.testing
from fused_cases import BF16, DTYPES, F16, F32, F64, assert_fused, normal, threads
from hypothesis import HealthCheck
from hypothesis import strategies as st
from torch.nn import functional as F

import bigkernel
from bigkernel import ops
from bigkernel.backend import use_backend

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "weight": {"weight": True},
    "bias": {"bias": True},
    "soft": {"soft": True},
    "everything": {
        "label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 30.0, "weight": True, "bias": True,
    },
    "everything soft": {
        "label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 30.0, "weight": True, "bias": True,
        "soft": True,
    },
}  # fmt: skip
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def torch_linear_cross_entropy(
    input, linear_weight, target, linear_bias=None, *, weight=None, ignore_index=-100,
    reduction="mean", label_smoothing=0.0, z_loss=0.0, softcap=0.0,
):  # fmt: skip
    """torch's linear, then its cross-entropy on float32 logits, with what it does not have."""
    z = F.linear(input, linear_weight, linear_bias)
    z = z.to(torch.promote_types(z.dtype, F32))
    z = softcap * torch.tanh(z / softcap) if softcap else z
    weight = None if weight is None else weight.to(z.dtype)
    soft = target.is_floating_point()
    given = {} if soft else {"ignore_index": ignore_index}
    target = target.to(z.dtype) if soft else target
    given |= {"weight": weight, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(z, target, reduction=reduction, **given)
    if z_loss == 0:
        return loss
    kept = torch.ones(len(z), dtype=torch.bool) if soft else target != ignore_index
    extra = (z_loss * z.logsumexp(-1).square()).masked_fill(~kept, 0.0)
    if reduction == "none":
        return loss + extra
    if reduction == "sum":
        return loss + extra.sum()
    counted = kept.sum() if weight is None or soft else weight[target[kept]].sum()
    return loss + extra.sum() / counted


def case(rows, classes, width, dtype, options, *, draw=0, **more):
    """(ours, torch's) as functions of the inputs, and the inputs."""
    options, seed = dict(options, **more), 10 * draw
    inputs = [
        normal((rows, width), dtype, seed),
        normal((classes, width), dtype, seed + 1, 2 / width**0.5),
    ]
    if options.pop("bias", False):
        inputs.append(normal((classes,), dtype, seed + 2))
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed + 3))
    if options.pop("soft", False):
        target = normal((rows, classes), F32, seed + 4).softmax(-1).to(dtype)
    else:
        target[1::5] = -100
    if "weight" in options:
        options["weight"] = normal((classes,), F32, seed + 8).abs() + 0.1
    return (
        lambda x, w, b=None: ops.linear_cross_entropy(x, w, target, linear_bias=b, **options),
        lambda x, w, b=None: torch_linear_cross_entropy(x, w, target, b, **options),
        inputs,
    )


@each_option
@each_dtype
@each_reduction
def test_linear_cross_entropy_matches_torch(cpu_isa, options, dtype, reduction):
    assert_fused(*case(70, 700, 40, dtype, options, reduction=reduction))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", ["plain", "everything", "everything soft"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_many_chunks(dtype, backend, name, reduction):
    """64 rows at a time, some chunks with all rows and some without, and blocks of classes."""
    rows, classes = 300, 8500
    ours, theirs, inputs = case(rows, classes, 70, dtype, OPTIONS[name], reduction=reduction)
    with use_backend(backend):
        assert_fused(ours, theirs, inputs)


def loss_and_gradients(function, inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = function(*leaves)
    return [t.double() for t in (loss.detach(), *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 1025])
@pytest.mark.parametrize(("rows", "width"), [(2, 1), (3, 17), (130, 8)])
def test_linear_cross_entropy_sizes(cpu_isa, rows, classes, width):
    """The largest error of few numbers is luck: of those the root mean square over many draws."""
    options = {"z_loss": 0.01, "bias": True}
    for dtype in (F32, F16):
        if classes >= 3 and rows * width > 100:
            assert_fused(*case(rows, classes, width, dtype, options))
            continue
        squares = [], [], []
        for draw in range(24):
            ours, theirs, inputs = case(rows, classes, width, dtype, options, draw=draw)
            exact, mine, same = (
                loss_and_gradients(function, [t.to(to) for t in inputs])
                for function, to in ((theirs, F64), (ours, dtype), (theirs, dtype))
            )
            for kept, got in zip(squares, (None, mine, same), strict=True):
                off = exact if got is None else [a - b for a, b in zip(got, exact, strict=True)]
                kept.append([x.square().sum() for x in off])
        size, ours, torchs = (torch.tensor(kept).sum(0).sqrt() for kept in squares)
        # Where torch hits all exactly, half an ulp.
        allowed = 1.3 * torchs + size * torch.finfo(dtype).eps / 2
        assert (ours <= allowed).all(), (ours, torchs, size)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("rows", "counted"),
    [(2, [1]), (20, [7]), (40, [0, 9, 39]), (321, range(321))],
    ids=["one of two", "one of many", "few of many", "five chunks of 64 and a row"],
)
def test_linear_cross_entropy_a_row_among_few(backend, rows, counted):
    """PyTorch's products of few rows are less exact than those of many: what we leave out of one,
    or do in a chunk of its own, costs the rows that count none of their digits."""
    classes, width = 8200, 64
    target = torch.full((rows,), -100)
    target[list(counted)] = torch.arange(len(counted)) * 25
    last, squares = counted[-1], torch.zeros(3, dtype=F64)

    def ours(x, w):
        return ops.linear_cross_entropy(x, w, target)

    def theirs(x, w):
        return F.cross_entropy(F.linear(x, w), target)

    for draw in range(8):
        inputs = [normal((n, width), F32, 2 * draw + i) for i, n in enumerate((rows, classes))]
        inputs[1] *= 2 / width**0.5
        with use_backend(backend):
            mine = loss_and_gradients(ours, inputs)[1]
        same = loss_and_gradients(theirs, inputs)[1]
        exact = loss_and_gradients(theirs, [t.double() for t in inputs])[1]
        off = [x[last] - exact[last] for x in (torch.zeros_like(exact), mine, same)]
        squares += torch.stack([x.square().sum() for x in off])
    size, error, torchs = squares.sqrt()
    assert size > 0
    assert error <= 1.3 * torchs + size * torch.finfo(F32).eps / 2, squares.sqrt() / size


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_linear_cross_entropy_gradient_of_the_bias_of_many_rows(backend):
    """A sum over all rows, whose error does not grow with their number."""
    for dtype in (F32, BF16):
        squares = torch.zeros(3, dtype=F64)
        for draw in range(4):
            ours, theirs, inputs = case(20000, 8, 4, dtype, {"bias": True}, draw=draw)
            exact, same = (
                loss_and_gradients(theirs, [t.to(to) for t in inputs])[-1] for to in (F64, dtype)
            )
            with use_backend(backend):
                mine = loss_and_gradients(ours, inputs)[-1]
            squares += torch.stack([x.square().sum() for x in (exact, mine - exact, same - exact)])
        size, error, torchs = squares.sqrt()
        assert error <= 1.3 * torchs + size * torch.finfo(dtype).eps / 2


def test_linear_cross_entropy_noncontiguous():
    target = torch.randint(0, 50, (9,))
    x, w = normal((9, 24), F32, 0), normal((50, 24), F32, 1)
    want = ops.linear_cross_entropy(x, w, target, reduction="none")
    wide = torch.zeros(9, 100)
    wide[:, 30:54] = x
    for other in (wide[:, 30:54], x.T.contiguous().T, torch.stack((x, x), -1)[..., 0]):
        got = ops.linear_cross_entropy(other, w, target, reduction="none")
        torch.testing.assert_close(got, want)
    for other in (w.T.contiguous().T, torch.stack((w, w), -1)[..., 0]):
        torch.testing.assert_close(
            ops.linear_cross_entropy(x, other, target, reduction="none"), want
        )
    same = x[:1].expand(9, 24)
    torch.testing.assert_close(
        ops.linear_cross_entropy(same, w, target), F.cross_entropy(same @ w.T, target)
    )
    strided = torch.stack((target, target), -1)[:, 0]
    assert torch.equal(ops.linear_cross_entropy(x, w, strided, reduction="none"), want)
    soft = normal((50, 9), F32, 3).softmax(0).T
    torch.testing.assert_close(ops.linear_cross_entropy(x, w, soft), F.cross_entropy(x @ w.T, soft))


def test_linear_cross_entropy_leading_dimensions():
    x, w, target = normal((2, 5, 8), F32, 0), normal((30, 8), F32, 1), torch.arange(10).view(2, 5)
    flat = ops.linear_cross_entropy(x.view(10, 8), w, target.view(10), reduction="none")
    got = ops.linear_cross_entropy(x, w, target, reduction="none")
    assert torch.equal(got, flat.view(2, 5))
    one = ops.linear_cross_entropy(x[0, 0], w, target[0, 0], reduction="none")
    assert one.shape == ()
    torch.testing.assert_close(one, got[0, 0])
    soft = normal((2, 5, 30), F32, 2).softmax(-1)
    want = F.cross_entropy((x @ w.T).view(10, 30), soft.view(10, 30))
    torch.testing.assert_close(ops.linear_cross_entropy(x, w, soft), want)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("which", range(1, 8))
def test_linear_cross_entropy_every_choice_of_gradients(dtype, reduction, which):
    """With what is left frozen; the same as with all of them."""
    ours, _, inputs = case(70, 90, 16, dtype, {"bias": True}, reduction=reduction)
    results = []
    for mask in (7, which):
        leaves = [t.clone().requires_grad_(bool(mask >> i & 1)) for i, t in enumerate(inputs)]
        ours(*leaves).sum().backward()
        results.append([t.grad for t in leaves])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if which >> i & 1:
            torch.testing.assert_close(a, b)
        else:
            assert b is None


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("factor", [0.0, 1.0, -3.3, 1e-3, 65536.0])
def test_linear_cross_entropy_upstream_gradient(dtype, factor):
    """Scaled after they were made, gradients lose nothing: not fp16's smallest ones either."""
    ours, theirs, inputs = case(100, 900, 32, dtype, {"bias": True}, reduction="mean")
    if dtype == F16 and factor == 65536.0:
        inputs[0] *= 0.01  # so that the gradient of the weight fits

    results = []
    for function, given in (
        (ours, inputs),
        (theirs, [t.double() for t in inputs]),
        (theirs, inputs),
    ):
        leaves = [t.detach().requires_grad_() for t in given]
        loss = function(*leaves)
        results.append(torch.autograd.grad(loss, leaves, torch.tensor(factor, dtype=loss.dtype)))
    for gradients in zip(*results, strict=True):
        bigkernel.testing.assert_as_accurate(*gradients)


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_linear_cross_entropy_backward_again(factor, dtype):
    """What backward kept is as it was, although .grad may be the same memory as what it gave."""
    ours, _, inputs = case(70, 90, 16, dtype, {"bias": True})
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = ours(*leaves) * factor
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in leaves]
    loss.backward(retain_graph=True)
    for leaf, first in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * first)
        leaf.grad = None
    loss.backward()
    for leaf, first in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_linear_cross_entropy_accumulates_into_grad():
    """Micro-batches one after the other, and a weight that has a second use."""
    ours, theirs, (x, w) = case(64, 80, 16, F32, {}, reduction="sum")
    a, b = (w.clone().requires_grad_() for _ in range(2))
    for function, leaf in ((ours, a), (theirs, b)):
        for _ in range(3):
            (function(x, leaf) / 3 + leaf.square().sum()).backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
@each_reduction
def test_linear_cross_entropy_is_torchs_with_its_arguments(reduction):
    x, w, b = normal((6, 8), F32, 0), normal((20, 8), F32, 1), normal((20,), F32, 2)
    target = torch.tensor([0, 19, -100, 4, 7, 7])
    for given in (
        {}, {"linear_bias": b}, {"weight": b.abs()}, {"ignore_index": 7}, {"ignore_index": None},
        {"label_smoothing": 0.3},
    ):  # fmt: skip
        y = target if given.get("ignore_index") != 7 else target.clamp(min=0)
        got = ops.linear_cross_entropy(x, w, y, reduction=reduction, **given)
        torch.testing.assert_close(
            got, F.linear_cross_entropy(x, w, y, reduction=reduction, **given)
        )


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("given", [F32, None], ids=["float32 input", "input in its dtype"])
def test_linear_cross_entropy_autocast(dtype, given):
    """As torch's linear and cross-entropy, with a weight that stays float32."""
    ours, theirs, inputs = case(70, 300, 24, F32, {"bias": True})
    inputs[0] = inputs[0].to(given or dtype)
    results = []
    for function in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with torch.autocast("cpu", dtype):
            loss = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in leaves)])
    wide = [t.to(dtype).double().requires_grad_() for t in inputs]
    exact = theirs(*wide)
    exact.backward()
    exacts = [exact.detach(), *(t.grad for t in wide)]
    for a, torchs, e, like in zip(*results, exacts, [None, *inputs], strict=True):
        assert a.dtype == (F32 if like is None else like.dtype)
        bigkernel.testing.assert_as_accurate(a, e, torchs)


@pytest.mark.parametrize("items", [40, 40.0, torch.tensor(40), torch.tensor([40.0])], ids=str)
def test_linear_cross_entropy_num_items(items):
    """The mean over all micro-batches of a step, as transformers counts them."""
    _, _, inputs = case(30, 50, 8, F32, {})
    target = torch.arange(30)
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = ops.linear_cross_entropy(*leaves, target, num_items=items)
    want = F.cross_entropy(F.linear(*leaves), target, reduction="sum") / 40
    torch.testing.assert_close(loss, want)
    for a, b in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_linear_cross_entropy_non_finite(cpu_isa, dtype, bad):
    """In an input: its own loss and gradient, and that of the weight. In a weight: all of them."""
    ours, theirs, inputs = case(70, 300, 24, dtype, {}, reduction="none")
    kept = torch.ones(70, dtype=torch.bool)
    kept[1::5] = False
    for place, row in enumerate((2, 5)):
        given = [t.clone() for t in inputs]
        given[place][row, 3] = bad
        results = []
        for function in (ours, theirs):
            leaves = [t.clone().requires_grad_() for t in given]
            losses = function(*leaves)
            gradients = torch.autograd.grad(losses.sum(), leaves)
            results.append([t.isnan().view(len(t), -1).any(1) for t in (losses, *gradients)])
        for got, want, rows in zip(*results, (kept, kept, slice(None)), strict=True):
            assert torch.equal(got[rows], want[rows])


@each_dtype
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_an_ignored_row_may_hold_anything(dtype, backend):
    ours, _, inputs = case(70, 300, 24, dtype, {"bias": True})
    results = []
    for value in (0.0, float("nan"), float("inf")):
        leaves = [t.clone() for t in inputs]
        leaves[0][1::5] = value
        leaves = [t.requires_grad_() for t in leaves]
        with use_backend(backend):
            loss = ours(*leaves)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not results[0][1][1::5].any()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
def test_linear_cross_entropy_all_ignored(backend, dtype):
    x, w = (normal((n, 8), dtype, n).requires_grad_() for n in (5, 30))
    target = torch.full((5,), -100)
    with use_backend(backend):
        assert ops.linear_cross_entropy(x, w, target).isnan()  # as torch's
        for reduction in ("mean", "sum", "none"):
            loss = ops.linear_cross_entropy(x, w, target, reduction=reduction)
            for gradient in torch.autograd.grad(loss.sum(), (x, w)):
                assert not gradient.any()
        loss = ops.linear_cross_entropy(x, w, target, num_items=3)
    assert loss == 0


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_linear_cross_entropy_no_rows(backend, soft):
    x, w = (normal((n, 8), F32, n).requires_grad_() for n in (0, 30))
    target = torch.zeros(0, 30) if soft else torch.zeros(0, dtype=torch.int64)
    with use_backend(backend):
        for reduction in ("sum", "none"):
            loss = ops.linear_cross_entropy(x, w, target, reduction=reduction)
            assert loss.sum() == 0
            dx, dw = torch.autograd.grad(loss.sum(), (x, w))
            assert dx.shape == (0, 8)
            assert not dw.any()
        assert ops.linear_cross_entropy(x, w, target).isnan()


@hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    rows=st.sampled_from([2, 9, 16, 17, 63, 100, 300]),
    first=st.floats(0, 1),
    count=st.sampled_from([1, 2, 3, 7, 15, 16, 31, 64]),
    classes=st.sampled_from([16, 50, 777, 4200]),
    width=st.sampled_from([1, 8, 64, 100, 1030]),
    dtype=st.sampled_from(sorted(DTYPES)),
    name=st.sampled_from(["plain", "everything", "everything soft"]),
    padding=st.booleans(),
)
def test_linear_cross_entropy_a_row_depends_on_nothing_else(
    rows, first, count, classes, width, dtype, name, padding
):
    """Alone or among others, padded or not; of fewer than 16 classes torch's products change."""
    options = dict(OPTIONS[name])
    soft = options.pop("soft", False)
    target = torch.arange(rows) * 7 % classes
    if soft:
        target = normal((rows, classes), F32, 4).softmax(1)
    if "weight" in options:
        options["weight"] = normal((classes,), F32, 3).abs() + 0.1
    w = normal((classes, width), DTYPES[dtype], 1)
    bias = normal((classes,), DTYPES[dtype], 2) if options.pop("bias", False) else None
    x = normal((rows, width), DTYPES[dtype], 0)

    def run(some, padding=False):
        leaf, labels = x[some].clone().requires_grad_(), target[some]
        given = leaf
        if padding and not soft:
            given = torch.cat([leaf, torch.ones_like(leaf)])
            labels = torch.cat([labels, torch.full_like(labels, -100)])
        losses = ops.linear_cross_entropy(
            given, w, labels, linear_bias=bias, reduction="none", **options
        )
        losses.sum().backward()
        return losses.detach()[: len(leaf)], leaf.grad

    begin = round(first * max(rows - count, 0))
    some = slice(begin, min(begin + count, rows))
    for number in (1, 2):
        with threads(number):
            for a, b in zip(run(some, padding), run(slice(None)), strict=True):
                assert torch.equal(a, b[some]), number


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ["everything", "everything soft"])
def test_linear_cross_entropy_repeats_its_bits(dtype, name):
    """Run after run; of the sums over rows, whatever the threads."""
    ours, _, inputs = case(300, 4200, 40, dtype, OPTIONS[name])
    results = []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in inputs]
        loss = ours(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    with threads(1):
        leaves = [t.clone().requires_grad_() for t in inputs]
        loss = ours(*leaves)
        one = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for a, b in zip(results[0], one, strict=True):
        torch.testing.assert_close(a, b)


MEMORY = """
import torch
from bigkernel import ops
def number(name):
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) << 10 for l in file if l.startswith(name))
def over(f):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = number("VmRSS")
    kept = f()
    return number("VmHWM") - before
torch.manual_seed(0)
dtype, reduction = torch.%s, "%s"
N, V, D = 2048, 16384, 64
x, w = (torch.randn(n, D).to(dtype).requires_grad_() for n in (N, V))
y = torch.randint(0, V, (N,))
def call(n):
    loss = ops.linear_cross_entropy(x[:n], w, y[:n], reduction=reduction)
    return torch.autograd.grad(loss.sum(), (x, w))
call(64)
results = N * D * x.element_size() + V * D * 4 + (V * D * 2 if dtype != torch.float32 else 0)
print((over(lambda: call(N)) - results) / (N * V * x.element_size()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
@pytest.mark.skipif(
    os.environ.get("BIGKERNEL_EXPECT_SANITIZER") == "1",
    reason="AddressSanitizer keeps memory that was given back",
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_memory(dtype, reduction):
    """Above the gradients, and above the sum of the weight's in float32: a tenth of the logits."""
    run = [sys.executable, "-c", MEMORY % (dtype, reduction)]
    share = float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert share < 0.1


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_linear_cross_entropy_opcheck(dtype, soft):
    x, w, b = normal((6, 8), dtype, 0), normal((40, 8), dtype, 1), normal((40,), dtype, 2)
    target = normal((6, 40), F32, 3).softmax(-1) if soft else torch.tensor([0, 39, -100, 4, 7, 7])
    weight, divisor = normal((40,), F32, 4).abs(), torch.tensor(3.0)
    namespace = torch.ops.bigkernel
    numbers = (-100, 0.1, 1e-3, 20.0)
    for wanted in ((True, True, True), (False, False, False)):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        torch.library.opcheck(
            namespace.linear_cross_entropy_fwd.default,
            (*leaves, target, weight, divisor, *numbers, *wanted),
        )
        stats = namespace.linear_cross_entropy_fwd(
            x, w, None, target, None, None, *numbers, False, False, False
        )[2]
        torch.library.opcheck(
            namespace.linear_cross_entropy_bwd.default,
            (normal((6,), F32, 5), x, w, b, target, weight, stats, *numbers, *wanted),
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_compile(reduction):
    """Without a break, and other lengths compile nothing more."""
    w = normal((24, 8), F32, 1)

    def model(x, w, target):
        return ops.linear_cross_entropy(x * 2, w, target, reduction=reduction, softcap=4.0)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (5, 6, 17):
        target, results = torch.arange(rows) % 24, []
        for function in (compiled, model):
            leaves = [normal((rows, 8), F32, 0).requires_grad_(), w.clone().requires_grad_()]
            loss = function(*leaves, target)
            (loss.sum() * 0.7).backward()
            results.append((loss.detach(), *(t.grad for t in leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


@each_option
@each_reduction
def test_linear_cross_entropy_gradcheck_of_the_reference(options, reduction):
    ours, theirs, inputs = case(6, 7, 3, F64, options, reduction=reduction)
    leaves = [t.requires_grad_() for t in inputs]
    with use_backend("torch"):
        assert torch.autograd.gradcheck(ours, leaves)
        torch.testing.assert_close(ours(*leaves), theirs(*leaves))


@each_reduction
def test_linear_cross_entropy_torch_func(reduction):
    ours, _, inputs = case(6, 12, 8, F32, {"bias": True}, reduction=reduction)

    def loss(*leaves):
        return ours(*leaves).sum()

    leaves = [t.clone().requires_grad_() for t in inputs]
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@each_reduction
def test_linear_cross_entropy_has_no_second_derivative(reduction):
    ours, _, inputs = case(6, 12, 8, F32, {}, reduction=reduction)
    leaves = [t.clone().requires_grad_() for t in inputs]
    want = torch.autograd.grad(ours(*leaves).sum(), leaves)
    grads = torch.autograd.grad(ours(*leaves).sum(), leaves, create_graph=True)
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a.detach(), b)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            a.sum().backward(retain_graph=True)


def test_linear_cross_entropy_float64_runs_in_pytorch(monkeypatch):
    monkeypatch.delenv("BIGKERNEL_STRICT")
    x, w, target = normal((4, 12), F64, 0), normal((9, 12), F64, 1), torch.arange(4)
    assert "float64 has no native kernel" in bigkernel.explain("linear_cross_entropy", x)
    bigkernel.backend._warned.clear()
    with pytest.warns(bigkernel.backend.FallbackWarning, match="float64"):
        loss = ops.linear_cross_entropy(x, w, target)
    torch.testing.assert_close(loss, F.cross_entropy(x @ w.T, target))


X, W = torch.randn(4, 8), torch.randn(6, 8)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"input": torch.tensor(1.0)}, ValueError, r"input must be \[.., D\], got shape \(\)"),
        ({"input": X.int()}, TypeError, "input must be float16"),
        ({"input": X[:, :7]}, ValueError, r"linear_weight must be \[V, 7\], got shape \(6, 8\)"),
        ({"linear_weight": W[0]}, ValueError, r"linear_weight must be \[V, 8\]"),
        ({"linear_weight": W[:0]}, ValueError, r"linear_weight must be \[V, 8\]"),
        ({"linear_weight": W.bfloat16()}, TypeError, "linear_weight must be of input's dtype"),
        ({"linear_weight": W.tolist()}, TypeError, "linear_weight must be a tensor, got list"),
        ({"linear_weight": W.to("meta")}, ValueError, "linear_weight must be on input's device"),
        ({"linear_bias": torch.ones(7)}, ValueError, r"linear_bias must be of shape \(6,\)"),
        ({"linear_bias": torch.ones(6).half()}, TypeError, "linear_bias must be of input's dtype"),
        ({"target": torch.zeros(4).int()}, TypeError, "target must be an int64 tensor, or prob"),
        ({"target": [0, 1, 2, 3]}, TypeError, "target must be an int64 tensor.*got list"),
        ({"target": torch.zeros(5).long()}, ValueError, r"target must be of shape \(4,\)"),
        ({"target": torch.zeros(4)}, ValueError, r"target must be of shape \(4, 6\)"),
        ({"target": torch.ones(4, 6, requires_grad=True)}, ValueError, "without requires_grad"),
        ({"target": torch.tensor([0, 6, 1, 1])}, ValueError, "0 to 5 or ignore_index.*6 at row 1"),
        ({"target": torch.tensor([0, 1, -1, 1])}, ValueError, "got -1 at row 2"),
        ({"reduction": "avg"}, ValueError, "'mean', 'sum' or 'none'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be a number from 0 to 1"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be a finite number of at least 0"),
        ({"softcap": -3.0}, ValueError, "softcap must be 0"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must be of shape \(6,\)"),
        ({"weight": torch.ones(6, dtype=F64)}, TypeError, "weight must be float32"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items must be None, as the"),
        ({"num_items": torch.ones(2)}, ValueError, "num_items must be one number"),
        ({"num_items": "3"}, TypeError, "num_items must be a number"),
    ],
)  # fmt: skip
def test_linear_cross_entropy_rejects_bad_input(change, error, words):
    given = {"input": X, "linear_weight": W, "target": torch.tensor([0, 1, 2, 5])} | change
    with pytest.raises(error, match=words):
        ops.linear_cross_entropy(**given)


def test_a_label_out_of_range_in_compiled_code_is_refused():
    """Where Python cannot look: the kernel does."""
    compiled = torch.compile(ops.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"target must be 0 to 5 or ignore_index.*6 at row 1"):
        compiled(X, W, torch.tensor([0, 6, 1, 1]))
