"""Attention on a GPU, against each backend of SDPA, and flash-attn."""

import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bigkernel import ops
from bigkernel.bench import attention
from bigkernel.bench.attention import APART, Spec
from bigkernel.bench.case import LIMIT, OURS, REFERENCE, Bar, on_torch, strict
from bigkernel.bench.gpu import MATH, Cases, Clock, Row, installed, measure
from bigkernel.testing.tolerance import assert_as_accurate

BACKENDS = {
    "SDPA flash": "FLASH_ATTENTION",
    "SDPA efficient": "EFFICIENT_ATTENTION",
    "SDPA cuDNN": "CUDNN_ATTENTION",
    MATH: "MATH",
}
FLASH, EFFICIENT = list(BACKENDS)[:2]
FLASH_ATTN = "flash-attn"
BF16, FP32 = torch.bfloat16, torch.float32
SEED = 5  # of dropout, where numbers are compared


def specs() -> list[Spec]:
    """What attention is timed at, the most telling first: a run may have no time for all."""
    plain = [
        Spec(batch, heads, length, dim, dtype=dtype, causal=causal, backward=backward)
        for (batch, heads, length, dim), dtypes in (
            ((1, 24, 4608, 128), (BF16,)),
            ((8, 16, 1024, 64), (BF16, FP32)),
            ((2, 16, 4096, 128), (BF16,)),
            ((2, 16, 4096, 64), (BF16, FP32)),
        )
        for dtype in dtypes
        for causal, backward in itertools.product((True, False), (False, True))
    ]
    packed = tuple(range(64, 1025, 64))
    rest = [
        Spec(1, 32, 2048, 128, kv_heads=8, causal=True),
        Spec(4, 14, 1024, 64, kv_heads=2, causal=True),
        Spec(1, 16, 0, 64, documents=packed, causal=True),
        Spec(1, 16, 8192, 128, window=1024, causal=True),
        Spec(4, 16, 2048, 64, dropout=0.1, causal=True),
        Spec(2, 8, 2048, 256, causal=True),
    ]
    decode = [
        Spec(batch, 32, 8192, 128, kv_heads=8, queries=queries)
        for batch, queries in ((1, 1), (16, 1), (1, 16))
    ]
    first = plain[:4]
    others = [replace(spec, backward=backward) for spec in rest for backward in (False, True)]
    return [*first, *decode, *others, *plain[4:]]


def small_specs() -> list[Spec]:
    """One of each kind, for tests."""
    base = Spec(1, 2, 40, 16, causal=True)
    return [
        *(replace(base, causal=c, backward=b) for c, b in ((True, False), (False, True))),
        replace(base, dtype=FP32),
        replace(base, heads=4, kv_heads=2, backward=True),
        replace(base, length=0, documents=(5, 12), backward=True),
        replace(base, window=8),
        replace(base, dropout=0.1),
        replace(base, causal=False, queries=1),
    ]


def bars(spec: Spec) -> Sequence[Bar]:
    """What ours has to reach. Set before any GPU was seen: what they find out may move them."""
    if spec.documents:
        return Bar(2.0, EFFICIENT), Bar(1.0, APART)
    if spec.window:
        return (Bar(2.0, EFFICIENT),)
    if spec.dtype == FP32:
        return (Bar(1.0, EFFICIENT),)
    if spec.queries:
        return (Bar(1.0, FLASH),)
    return (Bar(0.9, FLASH),)


def matrix_product(device: str, dtype: torch.dtype, side: int) -> Callable[[], object]:
    """A call that multiplies two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def cases(device: str, clock: Clock, small: bool = False) -> Cases:
    """The limit is a large matrix product."""
    side = 64 if small else 8192

    def row(spec: Spec) -> Row:
        product = matrix_product(device, spec.dtype, side)
        with strict():
            problem = Attention(replace(spec, device=device))
            problem.check()
            runs, skipped = problem.runs()
            work = ("FLOP", spec.flops(), 2.0 * side**3)
            return measure(spec.name, {**runs, LIMIT: product}, skipped, clock, work, bars(spec))

    for spec in small_specs() if small else specs():
        yield spec.name, partial(row, spec)


class Attention:
    """The tensors of a case, drawn where they are used, and what is run on them."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        generator = torch.Generator(spec.device).manual_seed(0)
        batch, length = spec.batch, spec.length
        if spec.documents:
            batch, length = 1, sum(spec.documents)

        def draw(length: int, heads: int) -> Tensor:
            shape = (batch, length, heads, spec.dim)
            x = torch.randn(shape, generator=generator, device=spec.device).to(spec.dtype)
            return x.transpose(1, 2).requires_grad_(spec.backward)

        queries, kv_heads = spec.queries or length, spec.kv_heads or spec.heads
        self.inputs = draw(queries, spec.heads), draw(length, kv_heads), draw(length, kv_heads)
        self.dout = draw(queries, spec.heads).detach()
        self.function = attention.ours(spec)
        self.theirs = attention.through_sdpa(spec)

    def whole(self, function: Callable[..., Tensor]) -> list[Tensor]:
        """The output, and with ``backward`` the gradients."""
        out = function(*self.inputs)
        grads = torch.autograd.grad(out, self.inputs, self.dout) if self.spec.backward else ()
        return [out, *grads]

    def ours(self) -> list[Tensor]:
        return self.whole(self.function)

    def check(self) -> None:
        """Ours against float64, to twice the error of torch's in the same dtype."""
        if self.spec.dropout:
            return self.check_dropout()
        results = {OURS: self.ours(), attention.SDPA: self.whole(self.theirs)}
        for result in results[OURS]:
            assert result.isfinite().all(), f"{self.spec.name}: a result is not finite"
        attention.check(self.spec, results, *self.inputs, self.dout)

    def check_dropout(self) -> None:
        """The same against our own PyTorch, which drops the same scores. The last sequence alone.

        Scores are dropped by the number of their sequence, which is its first and only one then.
        """
        q, k, v = (x[-1:].detach() for x in self.inputs)
        causal, dropout = self.spec.causal, self.spec.dropout

        def run(dtype: torch.dtype) -> list[Tensor]:
            leaves = [x.to(dtype).requires_grad_(self.spec.backward) for x in (q, k, v)]
            out = ops.attention(*leaves, causal=causal, dropout_p=dropout, seed=SEED)
            if not self.spec.backward:
                return [out]
            return [out, *torch.autograd.grad(out, leaves, self.dout[-1:].to(dtype))]

        mine, reference = run(self.spec.dtype), on_torch(run)
        exact, same = reference(torch.float64), reference(self.spec.dtype)
        for got, wanted, torchs in zip(mine, exact, same, strict=True):
            assert_as_accurate(got.detach(), wanted.detach(), torchs.detach())

    def runs(self) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
        skipped = dict[str, str]()
        runs: dict[str, Callable[[], object]] = {REFERENCE: on_torch(self.ours), OURS: self.ours}
        kinds = importlib.import_module("torch.nn.attention")

        def through(backend: str) -> list[Tensor]:
            with kinds.sdpa_kernel(getattr(kinds.SDPBackend, backend)):
                return self.whole(self.theirs)

        for name, backend in BACKENDS.items():
            runs[name] = partial(through, backend)
        if self.spec.documents:
            runs[APART] = partial(self.whole, partial(attention.one_by_one, self.spec))
        flash = installed("flash_attn", skipped, FLASH_ATTN)
        if flash is not None and not self.spec.documents:
            window = (self.spec.window - 1, 0) if self.spec.window else (-1, -1)
            options = {"causal": self.spec.causal, "window_size": window}

            def flash_attn(*inputs: Tensor) -> Tensor:
                rows = (x.transpose(1, 2) for x in inputs)
                out: Tensor = flash.flash_attn_func(*rows, dropout_p=self.spec.dropout, **options)
                return out.transpose(1, 2)

            runs[FLASH_ATTN] = lambda: self.whole(flash_attn)
        return runs, skipped


def repeated(device: str) -> Callable[[], list[Tensor]]:
    """What has to give the same bits each time."""
    return Attention(Spec(2, 4, 300, 64, causal=True, backward=True, device=device)).ours
