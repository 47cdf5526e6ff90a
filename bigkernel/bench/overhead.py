"""What a call costs before its kernel works: tiny tensors on one thread, each beside its peer.

The kernels of such calls take two or three microseconds: what is timed is checks, the choice of a
kernel, the dispatcher, autograd. A GPU is given its work by the same code, and waits for it. Images
are whole ones, since torchvision is called with parameters and ours draws them.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import bigkernel
from bigkernel.bench import adam, augment
from bigkernel.bench.attention import APART, SDPA
from bigkernel.bench.case import OURS, Bar, Case, MemoryBar, Ready, TimeBar
from bigkernel.ops import attention, attention_varlen
from bigkernel.testing.tolerance import assert_as_accurate

FUNCTIONAL = "torchvision's functions"
FORWARD, RECORDED, BACKWARD = "forward", "forward with grad", "forward + backward"
# How often as long as SDPA a call may take.
BARS = {FORWARD: 3.0, RECORDED: 3.5, BACKWARD: 0.9}
LENGTH, HEADS, DIM, DOCUMENTS = 16, 2, 64, 4
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
_Bars = tuple[Bar | MemoryBar | TimeBar, ...]


def cases(small: bool = False) -> list[Case]:
    """The table; ``small`` has the same cases, with smaller images."""
    cu = torch.arange(0, LENGTH + 1, LENGTH // DOCUMENTS, dtype=torch.int32)
    packed = partial(_packed, cu)
    shape = f"B1 H{HEADS} S{LENGTH} D{DIM}"
    functions: list[tuple[str, str, Function, str, Function]] = [
        ("attention", shape, attention, SDPA, sdpa),
        ("drop-in", shape, bigkernel.scaled_dot_product_attention, SDPA, sdpa),
        ("varlen", f"{DOCUMENTS} documents of {LENGTH // DOCUMENTS}", packed, APART, _apart),
    ]
    table = [
        _case(
            f"{name}, {NAMES[dtype]} {mode}, {size}",
            partial(_attention, ours, peer, theirs, dtype, mode),
            peer,
            (TimeBar(BARS[mode] if peer == SDPA else 1.0, peer),),
        )
        for (name, size, ours, peer, theirs), dtype, mode in itertools.product(
            functions, NAMES, BARS
        )
    ]
    for clip in (False, True):
        words = "clip + step" if clip else "step"
        build = partial(_adam, clip)
        bars = (TimeBar(1.0, adam.FUSED),)
        table.append(_case(f"adam, {words} of 10 tensors of 16", build, adam.FUSED, bars))
    simple, full = "crop + flip + normalise", "crop + flip + rotate + jitter + normalise"
    for words, size, output in ((simple, 32, 32), (simple, 256, 224), (full, 256, 224)):
        given = (size // 2, size // 2) if small else (size, size)
        spec = augment.Spec(words, 1, given, output, full=words == full)
        name = f"augment, {words}, 1 of {size}x{size} to {output}"
        bars = (TimeBar(1.0, FUNCTIONAL),)
        table.append(_case(name, partial(_augment, spec), FUNCTIONAL, bars))
    return table


def _case(name: str, build: Callable[[], Ready], peer: str, bars: _Bars) -> Case:
    return Case("overhead", name, (OURS, peer), build, bars, threads=1)


def _packed(cu: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The documents of one sequence, which is given as [1, H, S, D]."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))  # the gradient of x[0] is a copy
    longest = LENGTH // DOCUMENTS
    out = attention_varlen(q, k, v, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest)
    return out.transpose(0, 1)[None]


def _apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = zip(*(x.split(LENGTH // DOCUMENTS, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([sdpa(*part) for part in parts], dim=2)


def _attention(ours: Function, peer: str, theirs: Function, dtype: torch.dtype, mode: str) -> Ready:
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:  # as models hand it over
        x = torch.randn(1, LENGTH, HEADS, DIM, generator=generator)
        return x.to(dtype).transpose(1, 2)

    inputs, gradient = [draw().requires_grad_(mode != FORWARD) for _ in range(3)], draw()

    def run(function: Function, inputs: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        out = function(*inputs)
        if mode != BACKWARD:
            return [out]
        return [out, *torch.autograd.grad(out, inputs, gradient)]

    def check(runs: dict[str, Any]) -> str:
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        exact = run(theirs, wide, gradient.double())
        results = {name: call() for name, call in runs.items()}
        for got, wanted, torchs in zip(results[OURS], exact, results[peer], strict=True):
            assert_as_accurate(got.detach(), wanted.detach(), torchs.detach())
        return "attention, to twice SDPA's error against float64"

    return Ready(
        runs={
            OURS: partial(run, ours, inputs, gradient),
            peer: partial(run, theirs, inputs, gradient),
        },
        check=check,
        op="attention",
        tensors=inputs,
    )


def _adam(clip: bool) -> Ready:
    ready = adam.build([(16,)] * 10, clip)
    runs = {name: ready.runs[name] for name in (OURS, adam.FUSED)}
    return replace(ready, runs=runs, limit=None, skipped={})


def _augment(spec: augment.Spec) -> Ready:
    """Ours draws, folds and augments; torchvision's functions have their parameters."""
    (image,) = augment.photographs(spec)
    chain = augment.our_chain(spec)
    ready = Ready({OURS: lambda: chain(image)}, lambda runs: "", "augment", (image,))
    try:
        peer = augment.Torchvision(spec)
    except ImportError as error:
        return replace(ready, skipped={FUNCTIONAL: str(error)}, check=lambda runs: "nothing")
    count = 16
    drawn = augment.drawn(replace(spec, count=count), count)
    turns = itertools.cycle(drawn)

    def functional(parameters: augment.Drawn) -> Tensor:
        x = peer.resample(image, parameters)
        x = peer.F.to_dtype(x, torch.float32, scale=True)
        normalized: Tensor = peer.F.normalize(x, augment.MEAN, augment.STD)
        return normalized

    def check(runs: dict[str, Any]) -> str:
        generator = torch.Generator().manual_seed(augment.SEED)
        ours: Tensor = chain([image] * count, generator, list(range(count)))
        distance = augment.apart(ours, torch.stack([functional(d) for d in drawn]))
        assert distance < 2, f"{distance:.2f} levels of 255 away on average"
        return f"{spec.name}: mean distance {distance:.2f} levels of 255"

    runs = {**ready.runs, FUNCTIONAL: lambda: functional(next(turns))}
    return replace(ready, runs=runs, check=check)
