"""Kernels that Triton compiled: layouts and instructions chosen by a compiler that is not ours.

Triton compiles to PTX with no GPU. Softmax, a matrix product, attention forward and backward.
"""

import math
import time

import numpy as np
import pytest
import torch

from bigkernel.testing import ptx
from bigkernel.testing.tolerance import assert_as_accurate

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

LOG2E = 1.4426950408889634
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@triton.jit
def softmax_kernel(X, Y, stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + cols, mask=cols < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(Y + row * stride + cols, e / tl.sum(e, 0), mask=cols < n)


@triton.jit
def matmul_kernel(A, B, C, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        inside = k + rk < K
        a_mask = (rm[:, None] < M) & inside[None, :]
        b_mask = inside[:, None] & (rn[None, :] < N)
        a = tl.load(A + rm[:, None] * K + (k + rk)[None, :], mask=a_mask, other=0.0)
        b = tl.load(B + (k + rk)[:, None] * N + rn[None, :], mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc)
    c_mask = (rm[:, None] < M) & (rn[None, :] < N)
    tl.store(C + rm[:, None] * N + rn[None, :], acc.to(C.dtype.element_ty), mask=c_mask)


@triton.jit
def forward_kernel(Q, K, V, OUT, L, S, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   CAUSAL: tl.constexpr):  # fmt: skip
    base = tl.program_id(1) * S * D
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rd, rn = tl.arange(0, D), tl.arange(0, BN)
    q = tl.load(Q + base + rm[:, None] * D + rd[None, :], mask=rm[:, None] < S, other=0.0)
    m = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    end = (tl.program_id(0) + 1) * BM if CAUSAL else S
    for n in range(0, end, BN):
        cols = n + rn
        k = tl.load(K + base + cols[None, :] * D + rd[:, None], mask=cols[None, :] < S, other=0.0)
        s = tl.dot(q, k) * scale
        seen = cols[None, :] < S
        if CAUSAL:
            seen = seen & (rm[:, None] >= cols[None, :])
        s = tl.where(seen, s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - top[:, None])
        shrink = tl.exp2(m - top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(V + base + cols[:, None] * D + rd[None, :], mask=cols[:, None] < S, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        m = top
    acc = acc / total[:, None]
    out = acc.to(OUT.dtype.element_ty)
    tl.store(OUT + base + rm[:, None] * D + rd[None, :], out, mask=rm[:, None] < S)
    tl.store(L + tl.program_id(1) * S + rm, m + tl.log2(total), mask=rm < S)


@triton.jit
def backward_kernel(Q, K, V, DO, L, DELTA, DQ, DK, DV, S, scale, qscale, D: tl.constexpr,
                    B: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    """dK, dV of a block of keys; dQ is summed in float32 by atomics."""
    base = tl.program_id(1) * S * D
    rn = tl.program_id(0) * B + tl.arange(0, B)
    rd, rb = tl.arange(0, D), tl.arange(0, B)
    inside = rn[:, None] < S
    k = tl.load(K + base + rn[:, None] * D + rd[None, :], mask=inside, other=0.0)
    v = tl.load(V + base + rn[:, None] * D + rd[None, :], mask=inside, other=0.0)
    dk = tl.zeros([B, D], tl.float32)
    dv = tl.zeros([B, D], tl.float32)
    start = tl.program_id(0) * B if CAUSAL else 0
    for m in range(start, S, B):
        rm = m + rb
        here = rm[:, None] < S
        q = tl.load(Q + base + rm[:, None] * D + rd[None, :], mask=here, other=0.0)
        do = tl.load(DO + base + rm[:, None] * D + rd[None, :], mask=here, other=0.0)
        lse = tl.load(L + tl.program_id(1) * S + rm, mask=rm < S, other=0.0)
        delta = tl.load(DELTA + tl.program_id(1) * S + rm, mask=rm < S, other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        seen = here & (rn[None, :] < S)
        if CAUSAL:
            seen = seen & (rm[:, None] >= rn[None, :])
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv)
        ds = (p * (tl.dot(do, tl.trans(v)) - delta[:, None]) * qscale).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk)
        dq = tl.dot(ds, k)
        tl.atomic_add(DQ + base + rm[:, None] * D + rd[None, :], dq, mask=here)
    tl.store(DK + base + rn[:, None] * D + rd[None, :], dk.to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + base + rn[:, None] * D + rd[None, :], dv.to(DV.dtype.element_ty), mask=inside)


class Compiled:
    """A Triton kernel compiled for sm_80, launched in the emulator."""

    def __init__(self, kernel, types, constants, warps=4, stages=2):
        pointers = [(k,) for k, t in enumerate(types.values()) if t[0] == "*"]
        source = ASTSource(
            kernel,
            types | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
            attrs={p: [["tt.divisibility", 16]] for p in pointers},
        )
        target = GPUTarget("cuda", 80, 32)
        built = triton.compile(source, target, {"num_warps": warps, "num_stages": stages})
        self.name, self.shared, self.block = kernel.__name__, built.metadata.shared, 32 * warps
        self.module = ptx.load(built.asm["ptx"])

    def __call__(self, grid, *args):
        memory = ptx.Memory()
        given = [memory.register(a, f"arg{k}") if isinstance(a, torch.Tensor) else a
                 for k, a in enumerate(args)]  # fmt: skip
        given += [0, 0]  # scratch memory that these kernels do not use
        kernel = self.module[self.name]
        return kernel.launch(grid, (self.block,), given, memory, shared=self.shared)


@pytest.mark.parametrize(("rows", "n"), [(5, 100), (3, 1000), (2, 37)])
def test_softmax(rows, n):
    x = torch.randn(rows, n)
    y = torch.zeros_like(x)
    types = {"X": "*fp32", "Y": "*fp32", "stride": "i32", "n": "i32"}
    run = Compiled(softmax_kernel, types, {"BLOCK": triton.next_power_of_2(n)})
    run((rows,), x, y, n, n)
    assert_as_accurate(y, x.double().softmax(1), x.softmax(1))


@pytest.mark.parametrize(
    ("dtype", "m", "n", "k"),
    [(torch.float16, 128, 128, 64), (torch.bfloat16, 100, 72, 80), (torch.float32, 64, 64, 48)],
    ids=["fp16", "bf16-odd", "tf32"],
)
def test_matmul(dtype, m, n, k):
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    c = torch.zeros(m, n, dtype=dtype)
    t = f"*{DTYPES[dtype]}"
    types = {"A": t, "B": t, "C": t, "M": "i32", "N": "i32", "K": "i32"}
    run = Compiled(matmul_kernel, types, {"BM": 64, "BN": 64, "BK": 32}, stages=3)
    counters = run((-(-m // 64), -(-n // 64)), a, b, c, m, n, k)
    exact = a.double() @ b.double()
    if dtype == torch.float32:  # tf32 drops 13 bits of each factor
        error = (c - exact).abs().max()
        assert error <= 2**-10 * (a.double().abs() @ b.double().abs()).max()
    else:
        assert_as_accurate(c, exact, a @ b)
    assert counters.mma > 0


def attention_types(names, dtype):
    """Parameter types: L and DELTA float32, DQ float32, the rest of the data's type."""
    return {n: "*fp32" if n in ("L", "DELTA", "DQ") else f"*{DTYPES[dtype]}" for n in names} | {
        "S": "i32", "scale": "fp32"
    }  # fmt: skip


def attention(q, k, v, causal):
    """(output, gradients of q, k, v for an output gradient of ones) in the inputs' dtype."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    s = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones_like(s).triu(1).bool(), -math.inf)
    out = s.softmax(-1) @ v
    return out, q, k, v


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [128, 77])
def test_attention_forward_and_backward(dtype, causal, length):
    torch.manual_seed(0)
    heads, dim, block = 2, 32, 32
    q, k, v, grad = (torch.randn(heads, length, dim).to(dtype) for _ in range(4))
    out, lse = torch.zeros_like(q), torch.zeros(heads, length)
    types = attention_types(["Q", "K", "V", "OUT", "L"], dtype)
    constants = {"D": dim, "BM": 64, "BN": 32, "CAUSAL": causal}
    scale = dim**-0.5
    run = Compiled(forward_kernel, types, constants)
    run((-(-length // 64), heads), q, k, v, out, lse, length, float(scale * LOG2E))
    exact, *leaves64 = attention(q.double(), k.double(), v.double(), causal)
    same, *leaves = attention(q, k, v, causal)
    assert_as_accurate(out, exact.detach(), same.detach())

    exact.backward(grad.double())
    same.backward(grad)
    delta = (grad.float() * out.float()).sum(-1).contiguous()
    dq, dk, dv = torch.zeros(q.shape), torch.zeros_like(k), torch.zeros_like(v)
    types = attention_types(["Q", "K", "V", "DO", "L", "DELTA", "DQ", "DK", "DV"], dtype)
    constants = {"D": dim, "B": block, "CAUSAL": causal}
    run = Compiled(backward_kernel, types | {"qscale": "fp32"}, constants)
    args = (q, k, v, grad, lse, delta, dq, dk, dv, length, float(scale * LOG2E), float(scale))
    run((-(-length // block), heads), *args)
    for mine, exact_leaf, same_leaf in zip((dq.to(dtype), dk, dv), leaves64, leaves, strict=True):
        assert_as_accurate(mine, exact_leaf.grad, same_leaf.grad)


def test_attention_speed_and_counts():
    """B 1, H 2, S 256, D 64 in bf16: at most 2 s on one core, each tile read once, no conflicts."""
    heads, length, dim = 2, 256, 64
    q, k, v = (torch.randn(heads, length, dim).bfloat16() for _ in range(3))
    out, lse = torch.zeros_like(q), torch.zeros(heads, length)
    constants = {"D": dim, "BM": 128, "BN": 64, "CAUSAL": False}
    run = Compiled(
        forward_kernel,
        attention_types(["Q", "K", "V", "OUT", "L"], torch.bfloat16),
        constants,
        stages=3,
    )
    grid = (2, heads)
    start = time.process_time()
    counters = run(grid, q, k, v, out, lse, length, float(dim**-0.5 * LOG2E))
    spent = time.process_time() - start
    assert spent < 2.0, f"took {spent:.2f} s of processor time"
    assert counters.mma == 2 * 2 * heads * 4 * (length // 16 // 8) * length // 8 * dim // 16
    tile = length * dim * 2 // 32 * heads  # sectors of one of Q, K, V, O
    loads = [counters.loads[f"arg{k}"].sectors for k in range(3)]
    assert loads == [tile, 2 * tile, 2 * tile]  # two blocks of queries each read all keys
    assert counters.stores["arg3"].sectors == tile
    assert counters.bank_conflict_ratio == 1.0
    assert np.isfinite(out.float().numpy()).all()
