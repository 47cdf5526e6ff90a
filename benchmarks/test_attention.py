"""Attention: the native kernel, bigkernel's torch backend and torch's own, on the same tensors.

    make bench PYTEST_ARGS=benchmarks/test_attention.py

Compare rows of one run only; benchmarks/README.md says how we measure.
"""

import pytest
import torch

import bigkernel

SHAPES = {  # batch, heads of q, heads of k and v, length, head dim
    "short": (16, 8, 8, 128, 64),
    "train": (4, 8, 8, 512, 64),
    "gqa": (4, 8, 2, 512, 64),
    "long": (1, 4, 4, 2048, 64),
}


def native(q, k, v):
    return bigkernel.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def torch_backend(q, k, v):
    with bigkernel.use_backend("torch"):
        return native(q, k, v)


def torch_sdpa(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )


@pytest.mark.bench
@pytest.mark.parametrize("function", [native, torch_backend, torch_sdpa])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_speed(benchmark, shape, dtype, direction, function):
    batch, heads, kv_heads, length, dim = SHAPES[shape]
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, h, dim, dtype=dtype).transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    dout = torch.randn_like(q)
    benchmark.group = f"attention {shape} {dtype} {direction}"

    def run():
        out = function(q, k, v)
        if direction == "forward_backward":
            torch.autograd.grad(out, (q, k, v), dout)

    run()
    benchmark(run)
