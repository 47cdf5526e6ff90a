"""Attention of DTensors split over batch or heads: each rank computes what it holds.

Neither batch entries nor heads see each other, so nothing is communicated. What is one for all
(a single key head, a mask without batch) is held by every rank, and its gradient is the sum of
theirs.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from bigkernel.expect import Expect

_MAKE = "torch.distributed.tensor.distribute_tensor makes one"
_Side = Literal["batch", "heads"] | None  # what a dimension of the mesh splits

# Where batch and heads are, counted from the last dimension (packed tensors have no batch).
_PLACES: dict[str, dict[str, tuple[int | None, int | None]]] = {
    "attention": {
        "q": (-4, -3),
        "k": (-4, -3),
        "v": (-4, -3),
        "mask": (-4, -3),
        "alibi_slopes": (-2, -1),
    },
    "attention_varlen": {
        "q": (None, -2),
        "k": (None, -2),
        "v": (None, -2),
        "mask": (None, -3),
        "alibi_slopes": (None, -1),
        "cu_seqlens_q": (None, None),
        "cu_seqlens_k": (None, None),
    },
    "scaled_dot_product_attention": {
        "query": (-4, -3),
        "key": (-4, -3),
        "value": (-4, -3),
        "attn_mask": (-4, -3),
    },
}


def on_shards(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call ``function`` on the ranks' parts, and make DTensors of its results."""
    expect, places = Expect(function.__name__), _PLACES[function.__name__]
    first = next(iter(places))
    q = arguments[first]
    if not isinstance(q, DTensor):
        expected, got = "a DTensor where another argument is one", type(q).__name__
        raise expect.error(first, expected, got, _MAKE, TypeError)
    batch, heads = places[first]
    rank = 3 if batch is None else 4
    assert heads is not None
    expect(q.dim() == rank, first, f"{rank}-dimensional as a DTensor", f"{q.dim()} dimensions")
    dropout_p = arguments.get("dropout_p")
    expected = "0 with DTensors, whose ranks would all drop the same weights"
    fix = "Call it on .to_local() with a seed for each rank"
    expect(not dropout_p, "dropout_p", expected, dropout_p, fix)
    allowed: dict[Placement, _Side] = {Replicate(): None, Shard(rank + heads): "heads"}
    if batch is not None:
        allowed[Shard(0)] = "batch"
    if any(placement not in allowed for placement in q.placements):
        expected = "replicated, or split over " + ("heads" if batch is None else "batch or heads")
        fix = f"Redistribute it: {first}.redistribute(placements=[Shard({rank + heads})])"
        raise expect.error(first, expected, f"placed {q.placements}", fix)
    sides = [allowed[placement] for placement in q.placements]
    local = {
        name: _local(expect, name, x, places[name], q, sides) if name in places else x
        for name, x in arguments.items()
    }
    results = function(**local)
    out, *rest = results if isinstance(results, tuple) else (results,)
    wrapped = [_global(out, q, (*q.shape[:-1], out.shape[-1]), list(q.placements))]
    for lse in rest:  # [B, H, S], or [H, T] for q [T, H, D]
        packed = batch is None
        shape = (q.shape[1], q.shape[0]) if packed else tuple(q.shape[:-1])
        split: list[Placement] = [Replicate() if side is None else Shard(0) for side in sides]
        wrapped.append(_global(lse, q, shape, split if packed else list(q.placements)))
    return tuple(wrapped) if isinstance(results, tuple) else wrapped[0]


def _local(
    expect: Expect,
    name: str,
    x: Any,
    places: tuple[int | None, int | None],
    q: DTensor,
    sides: list[_Side],
) -> Any:
    """This rank's part of an argument; an error unless it lies as q does."""
    if x is None:
        return None
    if not isinstance(x, DTensor) and places == (None, None):
        return x  # lengths, the same on every rank
    if not isinstance(x, DTensor) or x.device_mesh != q.device_mesh:
        got = f"one on {x.device_mesh}" if isinstance(x, DTensor) else type(x).__name__
        raise expect.error(name, "a DTensor on the same mesh as the others", got, _MAKE, TypeError)
    expected: list[Placement] = []
    gradient: list[Placement] = []
    pieces = 1
    for i, side in enumerate(sides):
        place = None if side is None else places[0 if side == "batch" else 1]
        at = -1 if place is None else x.dim() + place
        if side is None:
            expected.append(Replicate())
            gradient.append(Replicate())
        elif at < 0 or (x.shape[at] == 1 and x is not q):
            expected.append(Replicate())
            gradient.append(Partial())
        else:
            expected.append(Shard(at))
            gradient.append(Shard(at))
            if side == "heads":
                pieces *= q.device_mesh.size(i)
                whole = f"a multiple of the {pieces} parts that heads are split into"
                fits = x.shape[at] % pieces == 0
                expect(fits, f"{name}'s number of heads", whole, x.shape[at])
    placed, wanted = tuple(x.placements), f"placed {tuple(expected)}, to fit the first argument"
    fix = f"Redistribute it: {name}.redistribute(placements=...)"
    expect(placed == tuple(expected), name, wanted, placed, fix)
    return x.to_local(grad_placements=gradient)


def _global(x: Tensor, q: DTensor, shape: tuple[int, ...], placements: list[Placement]) -> DTensor:
    """The DTensor whose parts these are, with their order of dimensions in memory."""
    strides = [1] * len(shape)
    step = 1
    for d in sorted(range(len(shape)), key=lambda d: (x.stride(d), -d)):
        strides[d] = step
        step *= shape[d]
    return DTensor.from_local(
        x,
        q.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(strides),
    )
