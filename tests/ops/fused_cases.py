"""What the tests of the fused ops share: an op beside the torch code that it stands for."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkernel.testing import assert_as_accurate

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = {"f32": F32, "bf16": BF16, "f16": F16}

# Activations as torch computes them.
THEIRS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}
# Where torch's formula loses the tail in float64 too.
EXACT = {
    "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / 2**0.5),
    "gelu_tanh": lambda x: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
}


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def normal(shape: Sequence[int], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def outputs_and_gradients(
    function: Callable, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What ``function`` returns, and the gradients of the floating inputs given these of it."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    out = [out] if isinstance(out, Tensor) else list(out)
    wanted = [t for t in leaves if t is not None]
    given = [g.to(o.dtype) for g, o in zip(gradients, out, strict=True)]
    return [o.detach() for o in out], list(torch.autograd.grad(out, wanted, given))


def assert_fused(
    ours: Callable, theirs: Callable, inputs: Sequence[Tensor | None], seed: int = 9
) -> None:
    """Outputs and gradients of ``ours`` are as accurate as those of ``theirs`` at these dtypes."""
    with torch.no_grad():
        shapes = theirs(*inputs)
    shapes = [shapes] if isinstance(shapes, Tensor) else shapes
    gradients = [normal(s.shape, s.dtype, seed + i).to(s.device) for i, s in enumerate(shapes)]
    wide = [None if t is None else t.double() for t in inputs]
    out, grads = outputs_and_gradients(ours, inputs, gradients)
    exact_out, exact_grads = outputs_and_gradients(theirs, wide, gradients)
    same_out, same_grads = outputs_and_gradients(theirs, inputs, gradients)
    for a, exact, same in zip(out, exact_out, same_out, strict=True):
        assert a.dtype == same.dtype
        assert_as_accurate(a, exact, same)
    given = [t for t in inputs if t is not None]
    for x, a, exact, same in zip(given, grads, exact_grads, same_grads, strict=True):
        assert a.dtype == x.dtype
        assert_as_accurate(a, exact, same)


def assert_fused_outputs(ours: Callable, theirs: Callable, inputs: Sequence[Tensor | None]) -> None:
    """The same of the outputs alone."""
    wide = [None if t is None else t.double() for t in inputs]
    results = [f(*given) for f, given in ((ours, inputs), (theirs, wide), (theirs, inputs))]
    lists = [[r] if isinstance(r, Tensor) else r for r in results]
    for a, exact, same in zip(*lists, strict=True):
        assert a.dtype == same.dtype
        assert_as_accurate(a, exact, same)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other strides."""
    wide = torch.zeros(*x.shape[:-1], 3 * x.shape[-1], dtype=x.dtype)
    part = wide[..., x.shape[-1] : 2 * x.shape[-1]]
    part.copy_(x)
    return {
        "part of wider rows": part,
        "transposed": x.transpose(0, -2).contiguous().transpose(0, -2),
        "last dimension strided": torch.stack((x, x), -1)[..., 0],
    }


def assert_strides_of_the_gradient_change_nothing(y: Tensor, leaf: Tensor) -> None:
    """The gradient of ``leaf`` has the same bits, however that of the float32 result ``y`` lies."""
    for gradient in (torch.ones(()).expand_as(y), *layouts(normal(y.shape, F32, 5)).values()):
        (a,) = torch.autograd.grad(y, leaf, gradient, retain_graph=True)
        (b,) = torch.autograd.grad(y, leaf, gradient.contiguous(), retain_graph=True)
        assert torch.equal(a, b)
