"""The Newton-Schulz iteration. Which feature has which test:

dtypes, shapes, instruction sets     matches_torch, any_shape, rounds_every_product, vectors
strides, batches, experts            noncontiguous, many_at_once
bits: threads, batch                 a_matrix_depends_on_nothing_else
NaN, infinity, zero, scales          non_finite, singular_values
opcheck, compile                     opcheck, compile
bad input, nothing to do             rejects_bad_input, empty
"""

import itertools
import re

import pytest
import torch
from fused_cases import BF16, DTYPES, F32, layouts, normal, threads
from hypothesis import given, settings
from hypothesis import strategies as st

import bigkernel
from bigkernel import ops
from bigkernel.backend import use_backend
from bigkernel.ops.newton_schulz import op
from bigkernel.ops.newton_schulz.op import COEFFICIENTS, orthogonalize
from bigkernel.ops.newton_schulz.reference import iterate
from bigkernel.testing import assert_as_accurate

# Squares, both sides of a block and of a vector, wide and tall, batches.
SHAPES = [
    *[(16, 16), (33, 33), (48, 96), (50, 47), (97, 31), (128, 344), (200, 65)],
    *[(3, 17, 5), (2, 2, 40, 49)],
]


def compared(x, dtype, steps=5, eps=1e-7):
    """What is computed in ``dtype``, by us and by torch, and in float64 from the same numbers."""
    mine = ops.newton_schulz(x, steps=steps, eps=eps, dtype=dtype)
    with use_backend("torch"):
        theirs = ops.newton_schulz(x, steps=steps, eps=eps, dtype=dtype)
    wide = x.to(dtype).double().reshape(-1, *x.shape[-2:])
    exact = iterate(wide, *COEFFICIENTS, steps, eps).reshape(x.shape)
    assert mine.dtype == theirs.dtype == dtype
    assert mine.is_contiguous()
    return mine, exact, theirs


def assert_accurate(x, dtype, steps=5):
    assert_as_accurate(*compared(x, dtype, steps))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_matches_torch(cpu_isa, shape, given, dtype):
    for steps in (1, 5):
        assert_accurate(normal(shape, DTYPES[given], 0), dtype, steps)


def test_newton_schulz_rounds_every_product_to_bf16(cpu_isa):
    """Bits are torch's but for ties, also where products of bf16 are computed in float32."""
    x = normal((60, 80), F32, 0)
    mine = ops.newton_schulz(x, steps=2)
    a, b, c = COEFFICIENTS
    theirs = (x.to(BF16).float() / x.to(BF16).float().norm()).to(BF16)
    for _ in range(2):
        gram = theirs @ theirs.mT
        theirs = torch.addmm(theirs, torch.addmm(gram, gram, gram, beta=b, alpha=c), theirs, beta=a)
    assert (mine != theirs).float().mean() < 0.05


def test_newton_schulz_of_vectors(cpu_isa):
    """They end at the same multiple of their directions: torch's error there is one of chance."""
    multiple = iterate(torch.ones(1, 1, 1).double(), *COEFFICIENTS, 5, 1e-7).item()
    for shape in ((1, 1), (1, 50), (50, 1)):
        x = normal(shape, F32, 0)
        y = ops.newton_schulz(x, dtype=F32)
        torch.testing.assert_close(y, x / x.norm() * multiple, rtol=2e-6, atol=0)


def test_newton_schulz_of_a_matrix_that_all_threads_share(cpu_isa):
    with threads(2):
        assert_accurate(normal((260, 300), F32, 0), BF16)
        assert_accurate(normal((300, 230), F32, 0), F32)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 110), st.integers(2, 110)),
    dtype=st.sampled_from([BF16, F32]),
    seed=st.integers(0, 1000),
)
def test_newton_schulz_any_shape(shape, dtype, seed):
    # Of a small rank many, and all their errors: the largest is that of one nearly singular matrix.
    count = 1 + 3000 // min(shape) ** 2
    mine, exact, theirs = compared(normal((count, *shape), F32, seed), dtype)
    ours, torchs = ((y.double() - exact).abs().mean() for y in (mine, theirs))
    assert ours <= 2 * torchs


@pytest.mark.parametrize("layout", layouts(torch.zeros(2, 2, 2)))
def test_newton_schulz_noncontiguous(layout):
    for shape in ((2, 40, 24), (2, 24, 40)):
        x = normal(shape, F32, 0)
        y = layouts(x)[layout]
        assert not y.is_contiguous()
        assert torch.equal(ops.newton_schulz(y), ops.newton_schulz(x))
        assert torch.equal(ops.newton_schulz(y.mT), ops.newton_schulz(x.mT.contiguous()))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
def test_newton_schulz_a_matrix_depends_on_nothing_else(cpu_isa, dtype):
    """The same bits alone, in a batch, among others, and with other numbers of threads."""
    xs = [
        normal(s, F32, i)
        for i, s in enumerate([(3, 40, 60), (130, 70), (40, 60), (9, 9), (260, 200)])
    ]
    with threads(1):
        alone = [ops.newton_schulz(x, dtype=dtype) for x in xs]
        first = ops.newton_schulz(xs[0][1], dtype=dtype)
    assert torch.equal(alone[0][1], first)
    for count in (1, 2, 3, 5):
        with threads(count), use_backend("cpu"):
            together = orthogonalize(xs, COEFFICIENTS, 5, 1e-7, dtype)
            assert all(map(torch.equal, together, alone))
            assert torch.equal(ops.newton_schulz(xs[-1], dtype=dtype), alone[-1])


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
def test_newton_schulz_is_the_transpose_of_the_transpose(cpu_isa, dtype):
    """A tall matrix is a wide one that is read and written the other way."""
    for shape in ((100, 37), (64, 48)):
        x = normal(shape, F32, 0)
        assert torch.equal(
            ops.newton_schulz(x, dtype=dtype), ops.newton_schulz(x.mT, dtype=dtype).mT
        )


def test_newton_schulz_singular_values_near_one(cpu_isa):
    """Of whatever shape; and of a product of scales from 1e-5 to 1e15 the same."""
    x = normal((3, 12, 40), F32, 0)
    y = ops.newton_schulz(x, dtype=F32)
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.6
    assert values.max() < 1.3
    for scale, i in itertools.product((1e-5, 1e15), range(3)):
        z = ops.newton_schulz((x[i] * scale).mT, dtype=F32, eps=1e-30)
        torch.testing.assert_close(z.mT, y[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
def test_newton_schulz_non_finite(cpu_isa, dtype):
    """One NaN or infinity is everywhere, as with torch, and in no other matrix."""
    for value in (float("nan"), float("inf"), -float("inf")):
        x = normal((2, 20, 70), F32, 0)
        x[0, 7, 11] = value
        y = ops.newton_schulz(x, dtype=dtype)
        with use_backend("torch"):
            theirs = ops.newton_schulz(x, dtype=dtype)
        assert torch.equal(y[0].isnan(), theirs[0].isnan())
        assert y[0].isnan().all()
        assert torch.equal(y[1], ops.newton_schulz(x[1], dtype=dtype))


def test_newton_schulz_of_nothing_is_nothing(cpu_isa):
    assert torch.equal(ops.newton_schulz(torch.zeros(5, 7)), torch.zeros(5, 7, dtype=BF16))
    tiny = torch.full((4, 4), 1e-9)
    assert ops.newton_schulz(tiny, steps=0, dtype=F32).max() == pytest.approx(1e-2)  # by eps
    for shape in ((0, 4), (4, 0), (0, 3, 3), (2, 0, 3)):
        assert ops.newton_schulz(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("namespace", ["bigkernel", "bigkernel_torch"])
def test_newton_schulz_opcheck(namespace):
    op = getattr(torch.ops, namespace).newton_schulz.default
    for narrow in (False, True):
        xs = [normal((3, 6), F32, 0), normal((2, 5, 4), BF16, 1)]
        torch.library.opcheck(op, (xs, *COEFFICIENTS, 5, 1e-7, narrow))


def test_newton_schulz_compile():
    compiled = torch.compile(ops.newton_schulz, fullgraph=True)
    x = normal((30, 20), F32, 0)
    assert torch.equal(compiled(x), ops.newton_schulz(x))


def test_muon_leaves_to_torch_what_torch_multiplies_faster(monkeypatch):
    """Portable code, and float64, without a warning; what is asked for by name is ours."""
    called = []
    monkeypatch.setattr(op._library, "call", lambda ops, *given: called.append(ops.name) or [])
    x = normal((4, 6), F32, 0)
    for isa in bigkernel.cpu_isas():
        with bigkernel.use_cpu_isa(isa):
            op.orthogonalize([x], COEFFICIENTS, 5, 1e-7, F32)
            with use_backend("cpu"):
                op.orthogonalize([x], COEFFICIENTS, 5, 1e-7, F32)
        wanted = "bigkernel_torch" if isa == "portable" else "bigkernel"
        assert called[-2:] == [wanted, "bigkernel"], isa
    op.orthogonalize([x.double()], COEFFICIENTS, 5, 1e-7, F32)
    assert called[-1] == "bigkernel_torch"


def test_newton_schulz_is_no_function_of_autograd():
    x = normal((4, 4), F32, 0).requires_grad_()
    assert not ops.newton_schulz(x).requires_grad


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, "x must be [.., rows, columns], got"),
        ({"x": torch.zeros(3, 3, dtype=torch.int64)}, TypeError, "x must be"),
        ({"x": [[1.0]]}, TypeError, "x must be"),
        ({"steps": -1}, ValueError, "steps must be a whole number of at least 0, got -1"),
        ({"steps": 1.5}, ValueError, "steps must be a whole number of at least 0, got 1.5"),
        ({"eps": 0.0}, ValueError, "eps must be a number above 0, got 0.0"),
        ({"eps": float("nan")}, ValueError, "eps must be a number above 0, got nan"),
        (
            {"coefficients": (1.0, 2.0)},
            ValueError,
            "coefficients must be three numbers, got (1.0, 2.0)",
        ),
        ({"dtype": torch.float16}, ValueError, "dtype must be torch.bfloat16 or torch.float32"),
    ],
    ids=str,
)
def test_newton_schulz_rejects_bad_input(given, error, message):
    arguments = {"x": torch.zeros(3, 3), **given}
    with pytest.raises(error, match=re.escape(message)):
        ops.newton_schulz(**arguments)
