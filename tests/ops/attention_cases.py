"""Attention cases: how they are described, built and compared, for tests/ops/test_attention*.py.

The rule of comparison: at most twice the error of the same computation in PyTorch at that dtype,
both against float64, plus half an ulp of the largest result, as in `assert_as_accurate`. PyTorch's
error on one small case is often 0 or tiny by luck, so it is the largest of several: of two ways to
compute attention in PyTorch (`by_definition`, `by_lse`), on several `samples` of the inputs.
lse, which is kept in float32, is held to what PyTorch gives in float32.
"""

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import attention_ptx
import pytest
import torch
from torch import Tensor

import bigkernel
from bigkernel import _library, ops
from bigkernel.ops.attention.reference import (
    Params,
    Rule,
    attention_reference,
    dropout_keep,
    reference_scores,
)
from bigkernel.testing import ptx

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SEED = 0x1234_5678_9ABC_DEF0


@dataclass(frozen=True)
class Case:
    """One call of `ops.attention`. Every default is the plain choice."""

    dtype: str = "f32"
    dim: int = 16
    dim_v: int | None = None  # None: dim
    lengths: tuple[int, int] = (19, 37)
    heads: tuple[int, int] = (4, 2)  # of q, of k and v
    batch: int = 2
    causal: str = ""  # "", "top_left", "bottom_right"
    align: str = "top_left"  # of window and ALiBi when not causal
    window: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    alibi: str = ""  # "", "H", "BH": the shape of the slopes
    mask: str = ""  # "", or "bool:" / "float:" / "f32:" + its dimensions of B H Q K, 1: broadcast
    dropout: float = 0.0
    layout: str = "bhsd"  # how q, k, v are stored, see `stored`
    dlse: bool = False  # lse has a gradient too

    def __str__(self) -> str:
        """Every field that is not plain, for the test's id."""
        plain = Case()
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != getattr(plain, field.name):
                text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
                parts.append(f"{field.name}={text}".replace(":", "."))
        return "-".join(parts) or "plain"

    def with_mask_dims(self, dims: str) -> "Case":
        """The same with a mask of these dimensions, if there is one ("bool:" and the like)."""
        return replace(self, mask=self.mask + dims) if self.mask else self

    @property
    def rule(self) -> Rule:
        left, right = (-1 if side is None else side for side in self.window)
        return Rule(
            self.dim**-0.5,
            bool(self.causal),
            (self.causal or self.align) == "bottom_right",
            left,
            right,
            self.softcap,
            self.dropout,
        )

    def params(self, inputs: "Inputs") -> Params:
        tensors = (inputs.mask, inputs.slopes, inputs.seed)
        return Params(*tensors, None, None, *self.lengths, self.rule)

    @property
    def keywords(self) -> dict[str, Any]:
        return {
            "causal": bool(self.causal),
            "align": self.causal or self.align,
            "window": self.window,
            "softcap": self.softcap,
            "dropout_p": self.dropout,
            "return_lse": True,
        }


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    slopes: Tensor | None
    seed: Tensor
    dout: Tensor
    dlse: Tensor | None

    def leaves(self) -> list[Tensor]:
        found = [self.q, self.k, self.v]
        if self.mask is not None and self.mask.is_floating_point():
            found.append(self.mask)
        return found

    def map(self, convert: Callable[[Tensor], Tensor]) -> "Inputs":
        """Each tensor converted, and again a leaf where it was one that needs a gradient."""

        def one(x: Tensor | None) -> Tensor | None:
            return None if x is None else convert(x.detach()).requires_grad_(x.requires_grad)

        return Inputs(**{field.name: one(getattr(self, field.name)) for field in fields(self)})


def stored(x: Tensor, layout: str) -> Tensor:
    """x [B, H, S, D] with the same values in another memory layout.

    bhsd: as it is. bshd: heads next to rows, what a projection leaves. nan: every row, head and
    batch entry lies between NaN that must not be read (or not be used). gap: last dimension with
    stride 2, which has to be copied.
    """
    b, h, s, d = x.shape
    if layout == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "nan":
        room = x.new_full((b, s + 3, h + 1, d + 5), torch.nan)
        view = room[:, 2 : s + 2, :h, 3 : d + 3].transpose(1, 2)
        return view.copy_(x)
    if layout == "gap":
        return torch.stack((x, x.new_full((), torch.nan).expand_as(x)), -1).flatten(-2)[..., ::2]
    return x


def build_mask(case: Case, generator: torch.Generator) -> Tensor | None:
    if not case.mask:
        return None
    kind, dims = case.mask.split(":")
    sizes = dict(zip("BHQK", (case.batch, case.heads[0], *case.lengths), strict=True))
    shape = [sizes.get(dim, 1) for dim in dims]
    hidden = torch.rand(shape, generator=generator) < 0.3
    if "Q" in dims and case.lengths[0] > 2:
        hidden[..., 1, :] = True  # a row that sees no key
    if kind == "bool":
        return ~hidden
    values = torch.randn(shape, generator=generator).masked_fill(hidden, -torch.inf)
    return values.to(torch.float32 if kind == "f32" else DTYPES[case.dtype]).requires_grad_()


def build(case: Case, draw_number: int = 0) -> Inputs:
    """Random inputs of a case; the same values at each call and in each layout."""
    generator = torch.Generator().manual_seed(draw_number * 1000 + case.dim + sum(case.lengths))
    dtype = DTYPES[case.dtype]
    dim_v = case.dim if case.dim_v is None else case.dim_v

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    (heads, kv_heads), (rows, keys) = case.heads, case.lengths
    q = draw(case.batch, heads, rows, case.dim)
    k = draw(case.batch, kv_heads, keys, case.dim)
    v = draw(case.batch, kv_heads, keys, dim_v)
    slopes = None
    if case.alibi:
        shape = (case.batch, heads) if case.alibi == "BH" else (heads,)
        slopes = torch.rand(shape, generator=generator) * 0.5
    return Inputs(
        *(stored(x, case.layout).requires_grad_() for x in (q, k, v)),
        mask=build_mask(case, generator),
        slopes=slopes,
        seed=torch.tensor([SEED]),
        dout=stored(draw(case.batch, heads, rows, dim_v), case.layout),
        dlse=torch.randn(case.batch, heads, rows, generator=generator) if case.dlse else None,
    )


NAMES = ("out", "lse", "dq", "dk", "dv", "dmask")
Results = dict[str, Tensor]


def with_gradients(out: Tensor, lse: Tensor, inputs: Inputs) -> Results:
    outputs, gradients = [out], [inputs.dout]
    if inputs.dlse is not None:
        outputs.append(lse)
        gradients.append(inputs.dlse.to(lse.dtype))
    grads = torch.autograd.grad(outputs, inputs.leaves(), gradients)
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=False))


def by_definition(case: Case, inputs: Inputs) -> Results:
    """softmax(scores) v, differentiated by autograd, in the inputs' dtype."""
    out, lse = attention_reference(
        inputs.q,
        inputs.k,
        inputs.v,
        case.rule,
        mask=inputs.mask,
        alibi_slopes=inputs.slopes,
        seed=inputs.seed,
    )
    return with_gradients(out, lse, inputs)


def by_lse(case: Case, inputs: Inputs, given: Results) -> Results:
    """The same as a fused backward pass has to compute it: from out and a float32 lse alone."""
    rule = case.rule
    scores = reference_scores(inputs.q, inputs.k, rule, inputs.mask, inputs.slopes)
    lse = given["lse"].float()[..., None]
    p = torch.exp(scores.detach() - lse.masked_fill(lse == -torch.inf, 0.0)).to(scores.dtype)
    keep = torch.ones_like(p)
    if rule.dropout_p > 0:
        batch = torch.arange(inputs.q.shape[0])
        rows, cols = ((0, x.shape[2]) for x in (inputs.q, inputs.k))
        kept = dropout_keep(inputs.seed, batch, case.heads[0], rows, cols, rule.dropout_p)
        keep = kept.to(p.dtype) / (1 - rule.dropout_p)
    group = case.heads[0] // case.heads[1]
    v = inputs.v.detach().repeat_interleave(group, 1)
    dv = (p * keep).transpose(-1, -2) @ inputs.dout
    delta = (inputs.dout * given["out"]).sum(-1, keepdim=True)
    if inputs.dlse is not None:
        delta = delta - inputs.dlse[..., None].to(delta.dtype)
    ds = p * (inputs.dout @ v.transpose(-1, -2) * keep - delta)
    leaves = [leaf for leaf in inputs.leaves() if leaf is not inputs.v]
    dq, dk, *dmask = torch.autograd.grad(scores, leaves, ds)
    dv = dv.unflatten(1, (case.heads[1], group)).sum(2)
    return dict(zip(NAMES[2:], (dq, dk, dv, *dmask), strict=False))


def run(case: Case, inputs: Inputs) -> Results:
    """The case through the public function, on whatever backend is chosen."""
    out, lse = ops.attention(
        inputs.q,
        inputs.k,
        inputs.v,
        mask=inputs.mask,
        alibi_slopes=inputs.slopes,
        seed=inputs.seed,
        **case.keywords,
    )
    return with_gradients(out, lse, inputs)


def to_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return inputs.map(lambda x: x.to(dtype) if x.is_floating_point() else x)


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """The largest finite difference; infinities must stand in the same places."""
    actual, finite = actual.double(), exact.isfinite()
    assert torch.equal(actual[~finite], exact[~finite]), "infinite in other places"
    error = (actual[finite] - exact[finite]).abs()
    assert not error.isnan().any(), "NaN where the exact result is finite"
    return error.max().item() if error.numel() else 0.0


def samples(case: Case) -> list[Inputs]:
    """Inputs on which PyTorch's error is measured: those of the case, and more if it is small."""
    scores = case.batch * case.heads[0] * case.lengths[0] * case.lengths[1]
    if scores > 1 << 15:
        return [build(case)]
    if case.lengths[1] == 1:
        # With one key, PyTorch subtracts a number from itself: what else it gets needs two.
        return [build(case), build(replace(case, lengths=(case.lengths[0], 2)))]
    if case.mask and "B" not in case.mask:  # a batch would share one mask
        return [build(case, number) for number in range(16)]
    return [build(case), build(replace(case, batch=8 * case.batch), 1)]


@functools.lru_cache(maxsize=8192)
def expected(case: Case) -> tuple[Results, dict[str, float]]:
    """(float64 results, PyTorch's own errors), shared by all backends and layouts."""
    results: Results = {}
    errors = dict.fromkeys(NAMES, 0.0)
    for inputs in samples(case):
        exact = by_definition(case, to_dtype(inputs, torch.float64))
        results = results or exact
        given = by_definition(case, inputs)
        second = by_lse(case, inputs, given)
        if case.dtype != "f32":
            given["lse"] = by_definition(case, to_dtype(inputs, torch.float32))["lse"]
        for name in exact:
            errors[name] = max(
                errors[name],
                largest_error(given[name], exact[name]),
                largest_error(second[name], exact[name]) if name.startswith("d") else 0.0,
            )
    return results, errors


def compare(case: Case, device: str = "cpu") -> Results:
    """Run a case on the chosen backend and hold it to the rule; returns what it gave."""
    exact, errors = expected(replace(case, layout="bhsd"))
    inputs = build(case)
    if device != "cpu":
        inputs = inputs.map(lambda x: x.to(device))
    actual = {name: x.cpu() for name, x in run(case, inputs).items()}
    dtypes = [DTYPES[case.dtype], torch.float32, *(leaf.dtype for leaf in inputs.leaves())]
    for name, dtype in zip(actual, dtypes, strict=True):
        assert actual[name].dtype == dtype, name
        assert actual[name].shape == exact[name].shape, name
        try:
            error = largest_error(actual[name], exact[name])
        except AssertionError as wrong:
            raise AssertionError(f"{name} of {case}: {wrong}") from None
        finite = exact[name][exact[name].isfinite()].abs()
        half_ulp = 0.5 * torch.finfo(dtype).eps * (finite.max().item() if finite.numel() else 0.0)
        allowed = 2 * errors[name] + half_ulp
        assert error <= allowed, (
            f"{name} of {case}: error {error:.3e} exceeds {allowed:.3e}, "
            f"which is 2 * PyTorch's {errors[name]:.3e} + half an ulp, {half_ulp:.3e}"
        )
    return actual


def all_pairs(axes: dict[str, list[Any]], **fixed: Any) -> Iterator[Case]:
    """Cases in which every value of an axis meets every value of every other axis.

    The whole grid of attention's features has millions of points; a bug that needs more than two
    features at once is what `test_attention_cross` and hypothesis look for. Greedy: each case
    takes an uncovered pair, then fills the other axes with what covers most.
    """
    names = list(axes)
    dice = random.Random(0)
    uncovered = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(axes[a])), range(len(axes[b])))
    }
    order = {name: index for index, name in enumerate(names)}

    def pair(a: str, x: int, b: str, y: int) -> tuple[tuple[str, int], tuple[str, int]]:
        return ((a, x), (b, y)) if order[a] < order[b] else ((b, y), (a, x))

    while uncovered:
        (a, x), (b, y) = min(uncovered)
        chosen = {a: x, b: y}
        for name in dice.sample(names, len(names)):
            if name in chosen:
                continue
            gains = [
                sum(pair(name, i, other, j) in uncovered for other, j in chosen.items())
                for i in range(len(axes[name]))
            ]
            best = [i for i, gain in enumerate(gains) if gain == max(gains)]
            chosen[name] = dice.choice(best)
        for (c, i), (d, j) in itertools.combinations(chosen.items(), 2):
            uncovered.discard(pair(c, i, d, j))
        yield Case(**{name: axes[name][i] for name, i in chosen.items()}, **fixed)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with so many threads. Small cases use one: two cost more than they save, and far more on
    a busy machine. That the number changes no bit is a test of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def on_backend(name: str) -> Iterator[None]:
    """Use backend "torch", "torch-cuda", "cuda", "ptx", "ptx-all" or "cpu-<instruction set>".

    The native kernels are left to the automatic choice, which under BIGKERNEL_STRICT=1 raises where
    it would fall back: a test that passes here ran the kernel.
    """
    kind, _, detail = name.partition("-")
    if kind == "torch":
        with bigkernel.use_backend("torch"):
            yield
    elif kind == "cpu":
        if detail == "none":
            pytest.skip("the native library is not built")
        with bigkernel.use_cpu_isa(detail):
            yield
    elif kind == "ptx":  # "ptx" or "ptx-all"
        if ptx.nvcc() is None:
            pytest.skip("nvcc is not on the path")
        with attention_ptx.emulated():
            yield
    else:
        if not _library.kernels["attention_fwd", "cuda"]:
            pytest.skip("this build has no CUDA kernel of attention")
        yield


CPU_BACKENDS = ["torch", *(f"cpu-{isa}" for isa in bigkernel.cpu_isas())]
BACKENDS = [
    *(CPU_BACKENDS if bigkernel.cpu_isas() else ["torch", "cpu-none"]),
    pytest.param("torch-cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every backend, and the CPU kernels under every instruction set."""
    with on_backend(request.param), threads(1):
        yield request.param


@pytest.fixture(params=[*BACKENDS, "ptx", pytest.param("ptx-all", marks=pytest.mark.slow)])
def backend_or_ptx(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same, and the compiled CUDA kernels in the emulator.

    Which takes a tenth of a second and more for each call: "ptx" runs a part of the grid (see
    `part_of` and tests/ops/conftest.py), "ptx-all" all of it.
    """
    with on_backend(request.param), threads(1):
        yield request.param


def part_of(cases: Iterable[Any], backend: str, every: int) -> list[Any]:
    """The cases that a test loops over; for the emulator's quick run every n-th of them."""
    return list(cases)[:: every if backend == "ptx" else 1]


def device_of(backend: str) -> str:
    return "cuda" if "cuda" in backend else "cpu"
