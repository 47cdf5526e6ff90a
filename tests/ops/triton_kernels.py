"""The yardstick of `make cuda-report`: plain Triton kernels for the same ops.

Attention forward and backward (dK and dV by blocks of keys, dQ by blocks of queries, as ours), with
the tiles that need no mask in a loop of their own; Adam without options. Compiled for sm_80 by the
installed Triton, with no GPU; run in the emulator.
"""

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bigkernel.testing import ptx

LOG2E = 1.4426950408889634
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Compiled:
    """A Triton kernel for pointers, integers and floats as given, and compile-time constants."""

    def __init__(self, kernel, arrays, scalars, constants, warps=4, stages=2):
        self.arrays, self.scalars = arrays, scalars
        types = {name: f"*{NAMES[array.dtype]}" for name, array in arrays.items()}
        # What Triton itself assumes of aligned tensors and of sizes that are multiples of 16.
        values = [16] * len(arrays) + [*scalars.values()]
        whole = [k for k, x in enumerate(values) if isinstance(x, int) and x % 16 == 0]
        aligned = {(k,): [["tt.divisibility", 16]] for k in whole}
        types |= {n: "i32" if isinstance(x, int) else "fp32" for n, x in scalars.items()}
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
        options = {"num_warps": warps, "num_stages": stages}
        built = triton.compile(source, GPUTarget("cuda", 80, 32), options)
        self.name, self.shared, self.threads = kernel.__name__, built.metadata.shared, 32 * warps
        self.cubin, self.ptx = built.asm["cubin"], built.asm["ptx"]

    def launch(self, grid):
        """Runs in the emulator, on the arrays given; returns the counters."""
        memory = ptx.Memory()
        given = [memory.register(x, name.lower()) for name, x in self.arrays.items()]
        given += [*self.scalars.values(), 0, 0]  # two scratch buffers that these kernels do not use
        kernel = ptx.load(self.ptx)[self.name]
        return kernel.launch(grid, (self.threads,), given, memory, shared=self.shared)


@triton.jit
def forward_tiles(acc, total, m, q, K, V, base, rows, begin, end, S, scale, D: tl.constexpr,
                  BN: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    dims = tl.arange(0, D)
    for n in range(begin, end, BN):
        keys = n + tl.arange(0, BN)
        k_at = K + base + keys[None, :] * D + dims[:, None]
        v_at = V + base + keys[:, None] * D + dims[None, :]
        if MASKED:
            s = tl.dot(q, tl.load(k_at, mask=keys[None, :] < S, other=0.0))
            seen = keys[None, :] < S
            if CAUSAL:
                seen = seen & (rows[:, None] >= keys[None, :])
            s = tl.where(seen, s, -float("inf"))
            v = tl.load(v_at, mask=keys[:, None] < S, other=0.0)
        else:
            s = tl.dot(q, tl.load(k_at))
            v = tl.load(v_at)
        top = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - top[:, None])
        shrink = tl.exp2(m - top)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        m = top
    return acc, total, m


@triton.jit
def forward_kernel(Q, K, V, OUT, LSE, S, scale, D: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    base, first = tl.program_id(1) * S * D, tl.program_id(0) * BM
    rows, dims = first + tl.arange(0, BM), tl.arange(0, D)
    at, inside = base + rows[:, None] * D + dims[None, :], rows[:, None] < S
    q = tl.load(Q + at, mask=inside, other=0.0)
    m = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    whole = (tl.minimum(first, S) if CAUSAL else S) // BN * BN
    end = tl.minimum(first + BM, S) if CAUSAL else S
    acc, total, m = forward_tiles(acc, total, m, q, K, V, base, rows, 0, whole, S, scale,
                                  D, BN, False, CAUSAL)  # fmt: skip
    acc, total, m = forward_tiles(acc, total, m, q, K, V, base, rows, whole, end, S, scale,
                                  D, BN, True, CAUSAL)  # fmt: skip
    tl.store(OUT + at, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=inside)
    tl.store(LSE + tl.program_id(1) * S + rows, m + tl.log2(total), mask=rows < S)


@triton.jit
def dkdv_tiles(dk, dv, k, v, Q, DO, LSE, DELTA, base, row, keys, begin, end, S, scale,
               D: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr,
               CAUSAL: tl.constexpr):  # fmt: skip
    dims = tl.arange(0, D)
    for m in range(begin, end, BM):
        rows = m + tl.arange(0, BM)
        q_at = Q + base + rows[None, :] * D + dims[:, None]
        do_at = DO + base + rows[:, None] * D + dims[None, :]
        if MASKED:
            q = tl.load(q_at, mask=rows[None, :] < S, other=0.0)
            lse = tl.load(LSE + row + rows, mask=rows < S, other=0.0)
            do = tl.load(do_at, mask=rows[:, None] < S, other=0.0)
            delta = tl.load(DELTA + row + rows, mask=rows < S, other=0.0)
        else:
            q, lse = tl.load(q_at), tl.load(LSE + row + rows)
            do, delta = tl.load(do_at), tl.load(DELTA + row + rows)
        p = tl.exp2(tl.dot(k, q) * scale - lse[None, :])  # keys by queries
        if MASKED:
            seen = (rows[None, :] < S) & (keys[:, None] < S)
            if CAUSAL:
                seen = seen & (rows[None, :] >= keys[:, None])
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv)
        ds = (p * (tl.dot(v, tl.trans(do)) - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, tl.trans(q), dk)
    return dk, dv


@triton.jit
def dkdv_kernel(Q, K, V, DO, LSE, DELTA, DK, DV, S, scale, natural, D: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    base, row, first = tl.program_id(1) * S * D, tl.program_id(1) * S, tl.program_id(0) * BN
    keys, dims = first + tl.arange(0, BN), tl.arange(0, D)
    at, inside = base + keys[:, None] * D + dims[None, :], keys[:, None] < S
    k, v = tl.load(K + at, mask=inside, other=0.0), tl.load(V + at, mask=inside, other=0.0)
    dk, dv = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
    begin = first if CAUSAL else 0
    edge = tl.minimum(first + BN, S) if CAUSAL else 0
    last = tl.maximum(S // BM * BM, edge)
    dk, dv = dkdv_tiles(dk, dv, k, v, Q, DO, LSE, DELTA, base, row, keys, begin, edge, S, scale,
                        D, BM, True, CAUSAL)  # fmt: skip
    dk, dv = dkdv_tiles(dk, dv, k, v, Q, DO, LSE, DELTA, base, row, keys, edge, last, S, scale,
                        D, BM, False, CAUSAL)  # fmt: skip
    dk, dv = dkdv_tiles(dk, dv, k, v, Q, DO, LSE, DELTA, base, row, keys, last, S, S, scale,
                        D, BM, True, CAUSAL)  # fmt: skip
    tl.store(DK + at, (dk * natural).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=inside)


@triton.jit
def dq_tiles(dq, q, do, lse, delta, K, V, base, rows, begin, end, S, scale, D: tl.constexpr,
             BN: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    dims = tl.arange(0, D)
    for n in range(begin, end, BN):
        keys = n + tl.arange(0, BN)
        at = base + keys[None, :] * D + dims[:, None]
        if MASKED:
            k = tl.load(K + at, mask=keys[None, :] < S, other=0.0)
            v = tl.load(V + at, mask=keys[None, :] < S, other=0.0)
        else:
            k, v = tl.load(K + at), tl.load(V + at)
        p = tl.exp2(tl.dot(q, k) * scale - lse[:, None])
        if MASKED:
            seen = keys[None, :] < S
            if CAUSAL:
                seen = seen & (rows[:, None] >= keys[None, :])
            p = tl.where(seen, p, 0.0)
        ds = (p * (tl.dot(do, v) - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, tl.trans(k), dq)
    return dq


@triton.jit
def dq_kernel(Q, K, V, DO, LSE, DELTA, DQ, S, scale, natural, D: tl.constexpr, BM: tl.constexpr,
              BN: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    base, row, first = tl.program_id(1) * S * D, tl.program_id(1) * S, tl.program_id(0) * BM
    rows, dims = first + tl.arange(0, BM), tl.arange(0, D)
    at, inside = base + rows[:, None] * D + dims[None, :], rows[:, None] < S
    q, do = tl.load(Q + at, mask=inside, other=0.0), tl.load(DO + at, mask=inside, other=0.0)
    lse = tl.load(LSE + row + rows, mask=rows < S, other=0.0)
    delta = tl.load(DELTA + row + rows, mask=rows < S, other=0.0)
    dq = tl.zeros([BM, D], tl.float32)
    whole = (tl.minimum(first, S) if CAUSAL else S) // BN * BN
    end = tl.minimum(first + BM, S) if CAUSAL else S
    dq = dq_tiles(dq, q, do, lse, delta, K, V, base, rows, 0, whole, S, scale,
                  D, BN, False, CAUSAL)  # fmt: skip
    dq = dq_tiles(dq, q, do, lse, delta, K, V, base, rows, whole, end, S, scale,
                  D, BN, True, CAUSAL)  # fmt: skip
    tl.store(DQ + at, (dq * natural).to(DQ.dtype.element_ty), mask=inside)


@triton.jit
def adam_kernel(PARAM, GRAD, M, V, n, step_size, weight1, weight2, eps, decay,
                BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    x = tl.load(PARAM + at, mask=inside).to(tl.float32)
    g = tl.load(GRAD + at, mask=inside).to(tl.float32)
    m = tl.load(M + at, mask=inside).to(tl.float32)
    v = tl.load(V + at, mask=inside).to(tl.float32)
    m += weight1 * (g - m)
    v += weight2 * (g * g - v)
    x -= decay * x + step_size * m / (tl.sqrt(v) + eps)
    tl.store(PARAM + at, x.to(PARAM.dtype.element_ty), mask=inside)
    tl.store(M + at, m.to(M.dtype.element_ty), mask=inside)
    tl.store(V + at, v.to(V.dtype.element_ty), mask=inside)


# Blocks as FlashAttention's Triton descendants choose them, but none that spills in its main loop:
# 8 warps then, and of dK and dV at dim 128 only 16 rows at a time.
def forward(q, k, v, out, lse, causal):
    """Tensors [heads, length, dim], lse [heads, length] in base 2; (kernel, grid)."""
    heads, length, dim = q.shape
    arrays = {"Q": q, "K": k, "V": v, "OUT": out, "LSE": lse}
    scalars = {"S": length, "scale": float(dim**-0.5 * LOG2E)}
    constants = {"D": dim, "BM": 128, "BN": 64, "CAUSAL": causal}
    kernel = Compiled(forward_kernel, arrays, scalars, constants, 4 if dim <= 64 else 8, stages=3)
    return kernel, (-(-length // 128), heads)


def backward(q, k, v, do, lse, delta, dq, dk, dv, causal):
    """[(kernel, grid)] for dK and dV, then dQ."""
    heads, length, dim = q.shape
    arrays = {"Q": q, "K": k, "V": v, "DO": do, "LSE": lse, "DELTA": delta}
    scalars = {"S": length, "scale": float(dim**-0.5 * LOG2E), "natural": float(dim**-0.5)}
    constants = {"D": dim, "CAUSAL": causal}
    grid = (-(-length // 128), heads)
    keys = Compiled(dkdv_kernel, arrays | {"DK": dk, "DV": dv}, scalars,
                    constants | {"BM": 64 if dim <= 64 else 16, "BN": 128}, 8)  # fmt: skip
    queries = Compiled(dq_kernel, arrays | {"DQ": dq}, scalars,
                       constants | {"BM": 128, "BN": 32}, 4 if dim <= 64 else 8)  # fmt: skip
    return [(keys, grid), (queries, grid)]


def adam(param, grad, m, v, step_size, beta1, beta2, eps, decay):
    """One step of AdamW in place; (kernel, grid)."""
    arrays = {"PARAM": param, "GRAD": grad, "M": m, "V": v}
    scalars = {"n": param.numel(), "step_size": step_size, "weight1": 1 - beta1,
               "weight2": 1 - beta2, "eps": eps, "decay": decay}  # fmt: skip
    block = 1024
    kernel = Compiled(adam_kernel, arrays, scalars, {"BLOCK": block})
    return kernel, (-(-param.numel() // block),)
