"""Dropout of attention is one function of (seed, batch, head, row, column), the same everywhere."""

import attention_cases
import pytest
import torch
from attention_cases import SEED, device_of

from bigkernel import ops
from bigkernel.ops.attention.reference import dropout_keep
from bigkernel.random import philox4x32

backend = attention_cases.backend_or_ptx


def kept(batch, heads, rows, cols, p, seed=SEED):
    return dropout_keep(torch.tensor([seed]), torch.arange(batch), heads, (0, rows), (0, cols), p)


def test_attention_dropout_is_the_documented_function():
    """Element by element, from the words of Philox with Python integers as counters."""
    p = 0.37
    keep = kept(3, 4, 6, 11, p)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 3, 4), (2, 3, 5, 10), (0, 1, 2, 7), (2, 0, 5, 3)]:
        word = int(philox4x32(SEED, j // 4, i, h, b)[j % 4])
        assert bool(keep[b, h, i, j]) == (word >= int(p * 2**32))


def test_attention_dropout_does_not_depend_on_blocks():
    whole = kept(2, 3, 9, 21, 0.5)
    seed, batch = torch.tensor([SEED]), torch.tensor([1])
    for rows, cols in [((0, 9), (0, 21)), ((4, 7), (3, 14)), ((8, 9), (20, 21)), ((1, 2), (8, 8))]:
        part = dropout_keep(seed, batch, 3, rows, cols, 0.5)
        assert torch.equal(part[0], whole[1, :, rows[0] : rows[1], cols[0] : cols[1]])


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.999])
def test_attention_dropout_rate(p):
    keep = kept(4, 8, 128, 128, p)
    spread = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(1 - keep.double().mean().item() - p) < 5 * spread


@pytest.mark.parametrize("seed", [SEED, 0, -1, -(2**63), 2**63 - 1])
def test_attention_dropout_is_the_same_on_every_backend(backend, seed):
    """Uniform weights and v = 1 show which elements were kept, one by one."""
    device = device_of(backend)
    batch, heads, rows, cols, p = 3, 2, 37, 70, 0.4
    q, k = torch.zeros(batch, heads, rows, 8), torch.zeros(batch, 1, cols, 8)
    v = torch.eye(cols).expand(batch, 1, cols, cols)
    out = ops.attention(*(x.to(device) for x in (q, k, v)), dropout_p=p, seed=seed).cpu()
    expected = kept(batch, heads, rows, cols, p, seed)
    assert torch.equal(out != 0, expected)
    torch.testing.assert_close(out, expected / (cols * (1 - p)))


def test_attention_dropout_of_everything(backend):
    """p = 1 leaves 0, and a gradient of 0; lse does not know of dropout."""
    device = device_of(backend)
    q, k, v = (torch.randn(2, 2, 9, 8, device=device, requires_grad=True) for _ in range(3))
    out, lse = ops.attention(q, k, v, dropout_p=1.0, return_lse=True)
    out.sum().backward()
    assert (out == 0).all()
    assert all((x.grad == 0).all() for x in (q, k, v))
    assert torch.equal(lse, ops.attention(q, k, v, return_lse=True)[1])


def test_attention_dropout_of_nothing(backend):
    device = device_of(backend)
    q, k, v = (torch.randn(1, 2, 9, 8, device=device) for _ in range(3))
    assert torch.equal(ops.attention(q, k, v, dropout_p=0.0, seed=1), ops.attention(q, k, v))


def test_attention_dropout_does_not_depend_on_the_rest_of_the_batch(backend):
    device = device_of(backend)
    q, k, v = (torch.randn(3, 4, 20, 8, device=device) for _ in range(3))
    whole = ops.attention(q, k, v, dropout_p=0.5, seed=9)
    part = ops.attention(q[:2], k[:2], v[:2], dropout_p=0.5, seed=9)
    torch.testing.assert_close(whole[:2], part, rtol=1e-6, atol=1e-6)
    assert torch.equal(whole[:2] == 0, part == 0)


def test_attention_dropout_seed_comes_from_the_default_generator(backend):
    device = device_of(backend)
    q, k, v = (torch.randn(1, 2, 16, 8, device=device) for _ in range(3))
    torch.manual_seed(5)
    first, second = (ops.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, ops.attention(q, k, v, dropout_p=0.5))
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    ops.attention(q, k, v, dropout_p=0.5, seed=1)
    ops.attention(q, k, v, dropout_p=0.0)
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn that is not needed


def test_attention_dropout_seed_as_int_or_tensor(backend):
    device = device_of(backend)
    q, k, v = (torch.randn(1, 2, 16, 8, device=device) for _ in range(3))
    results = [
        ops.attention(q, k, v, dropout_p=0.5, seed=seed)
        for seed in (SEED, torch.tensor(SEED, device=device), torch.tensor([SEED], device=device))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
