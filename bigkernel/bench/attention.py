"""Attention against torch's scaled_dot_product_attention, and against the matrix-product rate.

Floating-point operations are 4 S^2 D a head forward, 14 S^2 D forward and backward (the backward
pass has five products, one of which repeats the scores), times the share of the scores that the
mask leaves. q, k, v are [B, S, H, D] transposed, as models hand them over.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import bigkernel
from bigkernel.bench.case import LIMIT, OURS, REFERENCE, Bar, Case, Ready, on_torch
from bigkernel.bench.limits import SIDE, matrix_product
from bigkernel.ops import attention, attention_varlen
from bigkernel.testing.tolerance import assert_as_accurate

SDPA = "torch SDPA"
APART = "torch SDPA, one document at a time"
SMALL_SIDE = 128  # of the matrices of the yardstick in a test


@dataclass(frozen=True)
class Spec:
    """The shape of one case; heads of keys and values as heads unless given.

    window: keys that a query sees, its own included. padding: of each sequence's keys, the last
    ones are padding, sequence b of B keeps the first (B - b) / B. documents: lengths of packed
    documents, in place of batch and length. queries: how many there are, where not as many as keys;
    each sees every key, as in decoding. device: where the tensors are.
    """

    batch: int
    heads: int
    length: int
    dim: int
    kv_heads: int = 0
    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    backward: bool = False
    window: int = 0
    padding: bool = False
    documents: tuple[int, ...] = ()
    queries: int = 0
    dropout: float = 0.0
    device: str = "cpu"

    @property
    def name(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}[self.dtype]
        heads = f"H{self.heads}" + (f":{self.kv_heads}" if self.kv_heads else "")
        length = f"Sq{self.queries} Sk{self.length}" if self.queries else f"S{self.length}"
        shape = f"B{self.batch} {heads} {length} D{self.dim}"
        if self.documents:
            low, high = min(self.documents), max(self.documents)
            shape = f"{len(self.documents)} documents of {low}..{high} {heads} D{self.dim}"
        words = [dtype, "forward + backward" if self.backward else "forward"]
        words += ["causal"] if self.causal else []
        words += [f"window {self.window}"] if self.window else []
        words += ["key padding"] if self.padding else []
        words += [f"dropout {self.dropout:g}"] if self.dropout else []
        return " ".join([*words, shape])

    @property
    def kept(self) -> list[int]:
        """Of each sequence, the keys that are no padding."""
        b = self.batch
        return [self.length * (b - i) // b if self.padding else self.length for i in range(b)]

    def scores(self) -> int:
        """How many (query, key) pairs of one head, over the batch, the mask leaves."""
        if self.documents:
            return sum(_pairs(s, self.causal, 0) for s in self.documents)
        if self.padding:
            return sum(self.length * kept for kept in self.kept)
        if self.queries:
            return self.batch * self.queries * self.length
        return self.batch * _pairs(self.length, self.causal, self.window)

    def flops(self) -> float:
        """With causal scores counted as half of all, as is usual."""
        scores = float(self.scores())
        if self.causal and not self.window and not self.documents:
            scores = self.batch * self.length**2 / 2
        return (14 if self.backward else 4) * scores * self.heads * self.dim


def _pairs(length: int, causal: bool, window: int) -> int:
    if window:
        window = min(window, length)
        return window * (window + 1) // 2 + (length - window) * window
    return length * (length + 1) // 2 if causal else length**2


def cases(small: bool = False, device: str = "cpu") -> list[Case]:
    """The table; ``small`` has the same cases at sizes for a test."""
    bf16, fp32 = torch.bfloat16, torch.float32
    base = Spec(1, 8, 2048, 64)
    table: list[tuple[Spec, tuple[float, float]]] = [
        # ((spec), (times SDPA, share of the limit)); 0 is no bar
        (dataclasses.replace(base, causal=True), (2.5, 0.70)),
        (base, (2.0, 0.78)),
        (dataclasses.replace(base, causal=True, backward=True), (1.7, 0.60)),
        (dataclasses.replace(base, backward=True), (1.3, 0.60)),
        (dataclasses.replace(base, dtype=fp32, causal=True), (1.3, 0.85)),
        (dataclasses.replace(base, dtype=fp32), (1.08, 0.85)),
        (dataclasses.replace(base, dtype=fp32, causal=True, backward=True), (1.25, 0.75)),
        (dataclasses.replace(base, dtype=fp32, backward=True), (1.0, 0.75)),
    ]
    for shape, dtype, backward, causal in itertools.product(
        (Spec(1, 8, 1024, 128), Spec(4, 12, 512, 64)),
        (bf16, fp32),
        (False, True),
        (True, False),
    ):
        spec = dataclasses.replace(shape, dtype=dtype, backward=backward, causal=causal)
        table.append((spec, (1.0, 0)))
    rest = [
        Spec(1, 32, 1024, 64, kv_heads=8, causal=True),
        Spec(1, 8, 4096, 64, causal=True, window=256),
        Spec(4, 8, 512, 64, padding=True),
        *(Spec(32, 16, length, 64) for length in (16, 32, 64, 128)),
    ]
    for shape, backward in itertools.product(rest, (False, True)):
        table.append((dataclasses.replace(shape, backward=backward), (1.2, 0)))
    lengths = tuple(range(64, 1025, 64))
    for backward in (False, True):
        packed = Spec(1, 8, 0, 64, causal=True, documents=lengths, backward=backward)
        table.append((packed, (3.0, 0)))
    if small:
        table = [(_small(spec), bars) for spec, bars in table]
    table = [(dataclasses.replace(spec, device=device), bars) for spec, bars in table]
    return [_case(spec, *bars, side=SMALL_SIDE if small else SIDE) for spec, bars in table]


def _small(spec: Spec) -> Spec:
    return dataclasses.replace(
        spec,
        length=min(spec.length, 48),
        window=min(spec.window, 16),
        documents=tuple(s // 16 for s in spec.documents),
    )


def _case(spec: Spec, over_sdpa: float, share: float, side: int = SIDE) -> Case:
    bars = [Bar(over_sdpa, SDPA)]
    if share:
        bars.append(Bar(share, LIMIT))
    if spec.documents:
        bars.append(Bar(1.3, APART))
    names = (OURS, REFERENCE, SDPA, *([APART] if spec.documents else []))
    return Case("attention", spec.name, names, partial(build, spec, side), tuple(bars))


def build(spec: Spec, side: int = SIDE) -> Ready:
    """Tensors and runs of one case; ``side`` is that of the matrices of the yardstick."""
    generator = torch.Generator().manual_seed(0)
    batch, length = (1, sum(spec.documents)) if spec.documents else (spec.batch, spec.length)

    def draw(heads: int) -> Tensor:
        shape = (batch, length, heads, spec.dim)
        x = torch.randn(shape, generator=generator).to(spec.device, spec.dtype).transpose(1, 2)
        return x.requires_grad_(spec.backward)

    q, k, v = draw(spec.heads), *(draw(spec.kv_heads or spec.heads) for _ in range(2))
    dout = torch.randn(q.shape, generator=generator).to(q)
    functions = {OURS: ours(spec), SDPA: through_sdpa(spec)}
    functions[REFERENCE] = on_torch(functions[OURS])
    if spec.documents:
        functions[APART] = partial(one_by_one, spec)

    def run(name: str) -> list[Tensor]:
        out = functions[name](q, k, v)
        if not spec.backward:
            return [out]
        return [out, *torch.autograd.grad(out, (q, k, v), dout)]

    names = [OURS, REFERENCE, SDPA, *([APART] if spec.documents else [])]
    limit, limit_flops, limit_name = matrix_product(spec.dtype, side)
    return Ready(
        runs={name: partial(run, name) for name in names},
        check=lambda runs: check(
            spec, {name: call() for name, call in runs.items()}, q, k, v, dout
        ),
        op="attention",
        tensors=(q, k, v),
        limit=limit,
        work=spec.flops(),
        limit_work=limit_flops,
        limit_name=limit_name,
    )


def ours(spec: Spec) -> Callable[..., Tensor]:
    """Our call on q, k, v."""
    if spec.documents:
        offsets = [0, *itertools.accumulate(spec.documents)]
        cu = torch.tensor(offsets, dtype=torch.int32, device=spec.device)
        longest = max(spec.documents)

        def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            out = attention_varlen(
                q, k, v, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=spec.causal
            )
            return out.transpose(0, 1)[None]

        return packed
    if spec.window:
        return lambda q, k, v: attention(q, k, v, window=(spec.window - 1, 0))
    options: dict[str, Any] = {"is_causal": spec.causal, "enable_gqa": spec.kv_heads > 0}
    options["dropout_p"] = spec.dropout
    if spec.padding:
        options["attn_mask"] = _mask(spec)
    return lambda q, k, v: bigkernel.scaled_dot_product_attention(q, k, v, **options)


def through_sdpa(spec: Spec) -> Callable[..., Tensor]:
    """torch's call, with a mask for what it has no flag for."""
    mask = _mask(spec)
    options: dict[str, Any] = {"is_causal": spec.causal and mask is None, "attn_mask": mask}
    options |= {"enable_gqa": spec.kv_heads > 0, "dropout_p": spec.dropout}
    return lambda q, k, v: sdpa(q, k, v, **options)


def _mask(spec: Spec) -> Tensor | None:
    """The boolean mask that SDPA needs, broadcastable to [B, H, S, S]; None if a flag says it."""
    mask = None
    if spec.documents:
        owner = torch.repeat_interleave(torch.tensor(spec.documents))
        same = owner[:, None] == owner[None, :]
        mask = (same.tril() if spec.causal else same)[None, None]
    elif spec.window:
        ones = torch.ones(spec.length, spec.length, dtype=torch.bool)
        mask = (ones.tril() & ones.triu(1 - spec.window))[None, None]
    elif spec.padding:
        mask = (torch.arange(spec.length) < torch.tensor(spec.kept)[:, None])[:, None, None]
    return None if mask is None else mask.to(spec.device)


def one_by_one(spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's call for each document."""
    parts = zip(*(x.split(spec.documents, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([sdpa(a, b, c, is_causal=spec.causal) for a, b, c in parts], dim=2)


def check(
    spec: Spec,
    results: dict[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
) -> str:
    """Every result, as far as it was made from the last sequence's or document's first key heads.

    Heads do not see each other, so float64 needs to be paid only for some of them. The largest
    error of a head is one row's luck: as many are compared as 2^23 scores make, or one.
    """
    kv_heads = spec.kv_heads or spec.heads
    group = spec.heads // kv_heads
    tokens = slice(sum(spec.documents[:-1]), None)
    length = q[..., tokens, :].shape[-2]
    heads = min(kv_heads, max(1, 2**23 // (group * length**2)))

    def part(x: Tensor) -> Tensor:
        return x[-1:, : heads * x.shape[1] // kv_heads, tokens]

    def per_query_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, dim=1)

    wide = [part(x).detach().double().requires_grad_(spec.backward) for x in (q, k, v)]
    mask = None if spec.documents else _mask(spec)
    mask = mask[-1:] if mask is not None else None
    scores = wide[0] @ per_query_head(wide[1]).transpose(-1, -2) / math.sqrt(spec.dim)
    if mask is None and spec.causal:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    exact = [scores.softmax(-1) @ per_query_head(wide[2])]
    if spec.backward:
        exact += torch.autograd.grad(exact[0], wide, part(dout).double())
    for name in results:
        for got, want, torchs in zip(results[name], exact, results[SDPA], strict=True):
            assert_as_accurate(part(got).detach(), want.detach(), part(torchs).detach())
    where = "last document" if spec.documents else "last sequence"
    what = "output and gradients" if spec.backward else "output"
    what += f" of the {where}, {heads} of {kv_heads} key heads"
    return f"{what}, to twice torch SDPA's error against float64"
