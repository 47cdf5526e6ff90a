"""Every op inside torch.compile with inductor, forward and backward: what users get by default.

The ops' own tests trace them with aot_eager, which needs no C++ compiler; here the graph around
them is compiled as well, so its layouts and in-place updates meet the kernels.
"""

import pytest
import torch
from torch import Tensor

import bigkernel
from bigkernel import ops
from bigkernel.ops.adam import adam_step_
from bigkernel.ops.augment import augment


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGKERNEL_STRICT", "1")
    torch._dynamo.reset()


def compare(function, *inputs: Tensor) -> None:
    """The compiled function and its gradients are those of the plain one."""
    compiled = torch.compile(function, fullgraph=True)
    leaves = [x for x in inputs if x.requires_grad]
    actual, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(actual, expected)
    weight = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    for a, e in zip(
        torch.autograd.grad((actual * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.slow
def test_attention() -> None:
    """Transposed projections in, a permuted result out, a mask with a gradient."""
    generator = torch.Generator().manual_seed(0)
    x, w, mask = (torch.randn(*s, generator=generator) for s in ((2, 9, 24), (24, 72), (9, 9)))

    def block(x: Tensor, w: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (x @ w).view(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)
        out = ops.attention(q, k, v, mask=mask.sin(), causal=True, softcap=4.0)
        return out.transpose(1, 2).reshape(2, 9, 24).relu()

    compare(block, *(t.requires_grad_() for t in (x, w, mask)))


def test_scaled_dot_product_attention() -> None:
    q, k, v = (torch.randn(2, 3, 7, 16, requires_grad=True) for _ in range(3))
    compare(
        lambda q, k, v: bigkernel.scaled_dot_product_attention(q.exp(), k, v, is_causal=True) * 2,
        q, k, v,
    )  # fmt: skip


def test_attention_varlen() -> None:
    q, k, v = (torch.randn(11, 3, 8, requires_grad=True) for _ in range(3))
    offsets = torch.tensor([0, 4, 4, 11], dtype=torch.int32)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention_varlen(q + 1, k, v, offsets, offsets, causal=True).relu()

    compare(packed, q, k, v)


def test_adam() -> None:
    """The in-place update in the graph that made the gradient."""

    def step(p: Tensor, x: Tensor, m: Tensor, v: Tensor, t: Tensor) -> Tensor:
        gradient = x.T @ (x @ p) / 8
        adam_step_(
            [p], [gradient], [m], [v], steps=[t], lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8,
            weight_decay=0.1, decoupled=True, max_norm=0.3,
        )  # fmt: skip
        return p.square().sum()

    def state() -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        p, x = (torch.randn(*s, generator=generator) for s in ((6, 4), (8, 6)))
        return [p, x, torch.zeros(6, 4), torch.zeros(6, 4), torch.zeros(())]

    plain, compiled = state(), state()
    run = torch.compile(step, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(run(*compiled), step(*plain))
    for a, e in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, e)


def test_augment() -> None:
    """The images have no gradient; the convolution after them has."""
    images = torch.randint(0, 256, (2, 3, 12, 14), dtype=torch.uint8)
    row = [0.8, 0.1, 1.0, -0.1, 0.7, 2.0, 0, 0, 14, 12, 0, 0, 9, 10, 0, 0]
    geometry = torch.tensor([row, row], dtype=torch.float64)
    kernel = torch.randn(4, 3, 3, 3, requires_grad=True)

    def features(images: Tensor, geometry: Tensor, kernel: Tensor) -> Tensor:
        batch = augment(images, geometry, size=(10, 9), mean=0.5, std=0.2, dtype=torch.float32)
        return torch.nn.functional.conv2d(batch, kernel).relu()

    compare(features, images, geometry, kernel)
