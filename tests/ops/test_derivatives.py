"""Derivatives of the ops of a training step under torch.func, forward mode and vmap.

In eager code they are right. Compiled, they are right or refused: never a derivative that is a
silent 0. Compiled code is also given a tangent after it was compiled for none. Attention's are in
test_attention_tensors.py, Adam's in test_adam.py, augmentation's in test_augment.py.
"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from bigkernel import ops, precision

ROWS, WIDTH = 4, 8
LABELS = torch.tensor([0, 3, 5, 7])


def _rotate(x, angle):
    a, b = x.chunk(2, -1)
    return x * angle.cos() + torch.cat((-b, a), -1) * angle.sin()


ANGLE = torch.linspace(0.1, 2.0, ROWS * WIDTH // 2, dtype=torch.float32).view(ROWS, -1).repeat(1, 2)
DIGITS = (torch.arange(5 * WIDTH) % 7 - 3).view(5, WIDTH).bfloat16()

# name -> (ours, torch's) as functions of x [4, 8] alone.
FUNCTIONS = {
    "rms_norm": (lambda x: ops.rms_norm(x), lambda x: F.rms_norm(x, (WIDTH,), eps=1e-6)),
    "rms_norm weight": (
        lambda x: ops.rms_norm(ANGLE, x[0]),
        lambda x: F.rms_norm(ANGLE, (WIDTH,), x[0], eps=1e-6),
    ),
    "layer_norm": (
        lambda x: ops.layer_norm(x, x[0], x[1]),
        lambda x: F.layer_norm(x, (WIDTH,), x[0], x[1]),
    ),
    "glu": (lambda x: ops.glu(x, x.sin()), lambda x: F.silu(x) * x.sin()),
    "bias_act": (
        lambda x: ops.bias_act(x, x[0].cos(), "gelu_tanh"),
        lambda x: F.gelu(x + x[0].cos(), approximate="tanh"),
    ),
    "rope": (
        lambda x: ops.rope(x[None, None], x[None, None], ANGLE.cos(), ANGLE.sin())[0][0, 0],
        lambda x: _rotate(x, ANGLE),
    ),
    # Of few digits, so that sums are exact and rounded alike.
    "linear": (
        lambda x: ops.linear(x.bfloat16(), DIGITS).float(),
        lambda x: F.linear(x.bfloat16(), DIGITS).float(),
    ),
    "linear_cross_entropy": (
        lambda x: ops.linear_cross_entropy(x, x.cos(), LABELS % ROWS, linear_bias=x[:, 0]),
        lambda x: F.cross_entropy(F.linear(x, x.cos(), x[:, 0]), LABELS % ROWS),
    ),
    "linear_cross_entropy none": (
        lambda x: ops.linear_cross_entropy(x, ANGLE, LABELS % ROWS, reduction="none"),
        lambda x: F.cross_entropy(F.linear(x, ANGLE), LABELS % ROWS, reduction="none"),
    ),
    "cross_entropy": (lambda x: ops.cross_entropy(x, LABELS), lambda x: F.cross_entropy(x, LABELS)),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def _dual(f):
    def call(x):
        with forward_ad.dual_level():
            tangent = torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent

    return call


def _along(x):
    return torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)


TRANSFORMS = {
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (_along(x),))[1],
    "grad": lambda f: torch.func.grad(lambda x: (f(x) * 1.5).sin().sum()),
    "vjp": lambda f: lambda x: torch.func.vjp(lambda x: f(x).sin().sum(), x)[1](torch.ones(()))[0],
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "vmap": lambda f: lambda x: torch.vmap(f)(torch.stack((x, x.sin()))),
    "dual": _dual,
}
each_transform = pytest.mark.parametrize("transform", TRANSFORMS)
REFUSED = (NotImplementedError, RuntimeError, torch._dynamo.exc.TorchDynamoException)


@pytest.fixture(autouse=True)
def without_products(monkeypatch):
    """A processor that multiplies no 16 bits, or linear would be torch's."""
    monkeypatch.setattr(precision, "multiplies", lambda device, dtype: False)


@pytest.fixture
def x():
    torch._dynamo.reset()
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))


def assert_right_or_refused(call, want, x):
    try:
        got = call(x)
    except REFUSED:
        return
    assert got is not None, "the tangent was dropped"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@each_transform
@each_function
def test_a_transform_of_an_op(name, transform, x):
    ours, theirs = FUNCTIONS[name]
    want = TRANSFORMS[transform](theirs)(x)
    torch.testing.assert_close(TRANSFORMS[transform](ours)(x), want, rtol=1e-4, atol=1e-5)


@each_transform
@each_function
def test_a_compiled_transform_of_an_op_is_right_or_refused(name, transform, x):
    ours, theirs = FUNCTIONS[name]
    compiled = torch.compile(TRANSFORMS[transform](ours), backend="aot_eager")
    assert_right_or_refused(compiled, TRANSFORMS[transform](theirs)(x), x)


@each_transform
@each_function
def test_a_transform_of_a_compiled_op_is_right_or_refused(name, transform, x):
    ours, theirs = FUNCTIONS[name]
    compiled = torch.compile(ours, backend="aot_eager")
    compiled(x)  # for an input without a tangent
    assert_right_or_refused(TRANSFORMS[transform](compiled), TRANSFORMS[transform](theirs)(x), x)


@each_function
def test_code_compiled_without_a_tangent_is_given_one(name, x):
    ours, theirs = FUNCTIONS[name]
    want = _dual(theirs)(x)
    with forward_ad.dual_level():
        compiled = torch.compile(ours, backend="aot_eager")
        compiled(x)
        dual = forward_ad.make_dual(x, _along(x))
        assert_right_or_refused(lambda _: forward_ad.unpack_dual(compiled(dual)).tangent, want, x)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("warm", [False, True])
def test_attention_refuses_a_tangent_in_any_input_of_compiled_code(place, warm):
    """Of one input alone it was dropped, once code for another without one had been compiled."""
    torch._dynamo.reset()
    inputs = [torch.randn(1, 1, 4, 8) for _ in range(3)]
    with forward_ad.dual_level():
        compiled = torch.compile(lambda q, k, v: ops.attention(q, k, v), backend="aot_eager")
        if warm:
            compiled(*inputs)
        inputs[place] = forward_ad.make_dual(inputs[place], torch.ones(1, 1, 4, 8))
        with pytest.raises(NotImplementedError, match="tangent"):
            compiled(*inputs)


@pytest.mark.parametrize("place", range(2))
@pytest.mark.parametrize("warm", [False, True])
def test_adam_refuses_a_tangent_in_any_input_of_compiled_code(place, warm):
    def step(grad, exp_avg):
        param = torch.ones(5)
        ops.adam_step_([param], [grad], [exp_avg], [torch.zeros(5)], 1)
        return param

    torch._dynamo.reset()
    inputs = [torch.ones(5), torch.zeros(5)]
    with forward_ad.dual_level():
        compiled = torch.compile(step, backend="aot_eager")
        if warm:
            compiled(*inputs)
        inputs[place] = forward_ad.make_dual(inputs[place].clone(), torch.ones(5))
        with pytest.raises(NotImplementedError, match="tangents"):
            compiled(*inputs)
