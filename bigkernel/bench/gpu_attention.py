"""Attention on a GPU, against each backend of SDPA, and flash-attn."""

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import bigkernel
from bigkernel.bench.attention import Spec
from bigkernel.bench.case import OURS, REFERENCE, on_torch, strict
from bigkernel.bench.gpu import LIMIT, Cases, Clock, Row, installed, measure
from bigkernel.testing.tolerance import assert_as_accurate


def specs(small: bool = False) -> list[Spec]:
    """The shapes, dtypes and directions that attention is timed at; ``small`` ones for tests."""
    shapes = [(1, 24, 4608, 128), (8, 16, 1024, 64), (2, 16, 4096, 64), (2, 16, 4096, 128)]
    if small:
        shapes = [(1, 2, 40, 16)]
    return [
        Spec(*shape, dtype=dtype, causal=causal, backward=backward)
        for shape in shapes
        for dtype in (torch.bfloat16, *([torch.float32] if shape[3] == 64 else []))
        for causal in (False, True)
        for backward in (False, True)
    ]


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
            problem = Attention(spec, device)
            problem.check()
            runs, skipped = problem.runs()
            work = ("FLOP", spec.flops(), 2.0 * side**3)
            return measure(spec.name, {**runs, LIMIT: product}, skipped, clock, work)

    for spec in specs(small):
        yield spec.name, partial(row, spec)


class Attention:
    """The tensors of a case, and what is run on them."""

    def __init__(self, spec: Spec, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shape, self.spec = (spec.batch, spec.length, spec.heads, spec.dim), spec

        def draw() -> Tensor:
            x = torch.randn(shape, generator=generator).to(device, spec.dtype)
            return x.transpose(1, 2).requires_grad_(spec.backward)

        self.inputs = (draw(), draw(), draw())
        self.dout = draw().detach()

    def whole(
        self,
        function: Callable[..., Tensor],
        inputs: tuple[Tensor, ...] | None = None,
        dout: Tensor | None = None,
    ) -> list[Tensor]:
        """The output, and with ``backward`` the gradients."""
        inputs, dout = inputs or self.inputs, self.dout if dout is None else dout
        out = function(*inputs)
        return [out, *(torch.autograd.grad(out, inputs, dout) if self.spec.backward else ())]

    def ours(self) -> list[Tensor]:
        causal = self.spec.causal
        return self.whole(
            lambda q, k, v: bigkernel.scaled_dot_product_attention(q, k, v, is_causal=causal)
        )

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * self.spec.dim**-0.5
        if self.spec.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(-1) @ v

    def check(self) -> None:
        """Ours against float64 on the last head, to twice the error of the plain computation."""
        heads = tuple(x[-1:, -1:].detach() for x in self.inputs)
        results = []
        for dtype in (torch.float64, self.spec.dtype):
            leaves = tuple(x.to(dtype).requires_grad_(self.spec.backward) for x in heads)
            results.append(self.whole(self.plain, leaves, self.dout[-1:, -1:].to(dtype)))
        for mine, exact, plain in zip(self.ours(), *results, strict=True):
            assert mine.isfinite().all(), f"{self.spec.name}: a result is not finite"
            assert_as_accurate(mine[-1:, -1:].detach(), exact.detach(), plain.detach())

    def runs(self) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
        causal, skipped = self.spec.causal, dict[str, str]()
        runs: dict[str, Callable[[], object]] = {REFERENCE: on_torch(self.ours), OURS: self.ours}
        kinds = importlib.import_module("torch.nn.attention")

        def through(backend: str) -> list[Tensor]:
            with kinds.sdpa_kernel(getattr(kinds.SDPBackend, backend)):
                return self.whole(lambda q, k, v: sdpa(q, k, v, is_causal=causal))

        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
            runs[f"SDPA {backend.split('_')[0].lower()}"] = partial(through, backend)
        flash = installed("flash_attn", skipped, "flash-attn")
        if flash is not None:

            def flash_attn(*inputs: Tensor) -> Tensor:
                rows = (x.transpose(1, 2) for x in inputs)
                out: Tensor = flash.flash_attn_func(*rows, causal=causal)
                return out.transpose(1, 2)

            runs["flash-attn"] = lambda: self.whole(flash_attn)
        return runs, skipped


def repeated(device: str) -> Callable[[], list[Tensor]]:
    """What has to give the same bits each time."""
    return Attention(Spec(2, 4, 300, 64, causal=True, backward=True), device).ours
