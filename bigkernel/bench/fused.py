"""Cases of ops that memory bounds: against the torch code that they stand for, and a copy.

A call's work is the bytes that it cannot do without: each input read once, each result written
once, forward and backward. The limit is a copy of as many bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigkernel import registry
from bigkernel.bench.case import OURS, REFERENCE, Bar, Case, Ready, on_torch
from bigkernel.bench.limits import copy
from bigkernel.testing.tolerance import assert_as_accurate

NAMES = registry.SHORT
# Tensors of a call, all leaves; what reads or makes them, in bytes, is told by their sizes.
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def case(
    op: str,
    name: str,
    ours: Function,
    peers: Mapping[str, Function],
    make: Callable[[torch.Generator], Sequence[Tensor]],
    backward: bool,
    saved: int = 0,
    bars: Sequence[Bar] = (),
) -> Case:
    """A case whose functions take what ``make`` draws; the first peer is what accuracy is held to.

    make: draws from a generator of the CPU's, and may put on another device what it has drawn.
    saved: how many of the inputs (the first ones) the backward pass reads again.
    """
    words = f"{name}, forward{' + backward' if backward else ''}"
    build = partial(_build, op, ours, dict(peers), make, backward, saved)
    return Case(op, words, (OURS, REFERENCE, *peers), build, tuple(bars))


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers, rounded to ``dtype``."""
    return torch.randn(shape, generator=generator).to(dtype)


def _tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _build(
    op: str,
    ours: Function,
    peers: dict[str, Function],
    make: Callable[[torch.Generator], Sequence[Tensor]],
    backward: bool,
    saved: int,
) -> Ready:
    generator = torch.Generator().manual_seed(0)
    inputs = [t.requires_grad_(backward and t.is_floating_point()) for t in make(generator)]
    functions: dict[str, Function] = {OURS: ours, REFERENCE: on_torch(ours), **peers}
    first = functions[next(iter(peers))]
    with torch.no_grad():
        out = _tuple(first(*inputs))
    gradients = [torch.randn(t.shape, generator=generator).to(t) for t in out]

    def run(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
        results = _tuple(function(*inputs))
        if not backward:
            return list(results)
        leaves = [t for t in inputs if t.requires_grad]
        given = [g.to(t.dtype) for g, t in zip(gradients, results, strict=True)]
        return [*results, *torch.autograd.grad(results, leaves, given)]

    def check(runs: dict[str, Any]) -> str:
        wide = [
            t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for t in inputs
        ]
        exact, same = run(first, wide), run(first, inputs)
        for name, call in runs.items():
            for got, wanted, torchs in zip(call(), exact, same, strict=True):
                try:
                    assert_as_accurate(got.detach(), wanted.detach(), torchs.detach())
                except AssertionError as error:
                    raise AssertionError(f"{name}: {error}") from None
        return f"{len(same)} results, to twice torch's error against float64"

    moved = _bytes(inputs) + _bytes(out)
    if backward:
        moved += _bytes(out) + _bytes(inputs[:saved]) + _bytes(t for t in inputs if t.requires_grad)
    return Ready(
        runs={name: partial(run, f, inputs) for name, f in functions.items()},
        check=check,
        op=op,
        tensors=[t for t in inputs if t.is_floating_point()],
        limit=copy(moved),
        work=moved,
        limit_work=moved,
    )


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
