"""What a linear layer computes where 16-bit tensors are widened, in plain PyTorch.

    y = input weight^T + bias
    dinput = dy weight      dweight = dy^T input      dbias = sum(dy)

float32 within (float64 for float64 inputs), sums over rows too, rounded once at the end. To widen a
matrix takes time and memory in proportion to its elements, and a product that times the rows of the
other one: so the weight is widened once a call, and the rows in chunks, each in the memory of the
one before. A weight too large to stand in memory a second time is widened in blocks of its rows.
"""

import math
import threading

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements that are widened: of a block of a weight, and of a chunk of rows, both sides of its
# product together.
BLOCK, CHUNK = 1 << 23, 1 << 22
FEWEST_ROWS, MOST_ROWS = 128, 512  # of a chunk
# Fewer rows torch multiplies by a 16-bit weight about as fast as that can be read.
FEW = 8


def linear_fwd(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[.., M]; input [.., K], weight [M, K] and bias [M] of its dtype or wider."""
    x = _rows(input)
    if 0 < len(x) < FEW and weight.dtype == x.dtype:
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    else:
        y = _times(x, weight, bias)
    return y.view(*input.shape[:-1], len(weight))


def linear_bwd(
    dy: Tensor, input: Tensor | None, weight: Tensor, needs_dinput: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dinput, dweight, dbias); empty [0] if not needed, dweight where input is None.

    dweight has weight's dtype and layout, dbias is as wide as it was summed.
    """
    g, dinput = _rows(dy), dy.new_empty(0)
    if needs_dinput:
        dinput = _times(g, weight.T).view(*dy.shape[:-1], weight.shape[1])
    dweight = dy.new_empty(0) if input is None else _sum_of_products(g, _rows(input), weight)
    return dinput, dweight, _sum(g) if needs_dbias else dy.new_empty(0, dtype=wide(dy.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.promote_types(dtype, torch.float32)


def _times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, of x's dtype."""
    y = x.new_empty(len(x), len(weight))
    for block in _blocks(weight):
        w = weight[block]
        height = _height(x, len(w))
        room = _room(x, w.shape, (height, x.shape[1]), (height, len(w)))
        w = _widened(w, room[0])
        b = None if bias is None else bias[block].to(w.dtype)
        for rows in _chunks(x, height):
            part = _widened(x[rows], room[1])
            product = room[2][: len(part)]
            if b is None:
                torch.mm(part, w.T, out=product)
            else:
                torch.addmm(b, part, w.T, out=product)
            y[rows, block] = product
    return y


def _sum_of_products(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """g^T x, of weight's dtype and layout."""
    result = torch.empty_like(weight) if len(x) else torch.zeros_like(weight)
    for block in _blocks(weight) if len(x) else []:
        part = result[block]
        height = _height(x, len(part))
        room = _room(x, part.shape, (height, len(part)), (height, x.shape[1]))
        total = part if part.dtype == room[0].dtype else _in_layout_of(part, room[0])
        for rows in _chunks(x, height):
            a, b = _widened(g[rows, block], room[1]), _widened(x[rows], room[2])
            torch.addmm(total, a.T, b, beta=float(rows.start > 0), out=total)
        if total is not part:
            part.copy_(total)
    return result


def _sum(g: Tensor) -> Tensor:
    """That of the rows, which is exact to more digits in parts."""
    total = g.new_zeros(g.shape[1], dtype=wide(g.dtype))
    height = _height(g, 0)
    (room,) = _room(g, (height, g.shape[1]))
    for rows in _chunks(g, height):
        total += _widened(g[rows], room).sum(0)
    return total


def _rows(x: Tensor) -> Tensor:
    """[.., D] as [N, D], where N or D may be 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _blocks(weight: Tensor) -> list[slice]:
    count = max(BLOCK // max(weight.shape[1], 1), 1)
    return [slice(first, first + count) for first in range(0, len(weight), count)]


def _height(x: Tensor, more: int) -> int:
    """How many rows of x a chunk has, each of which stands beside so many elements more."""
    most = min(max(CHUNK // max(x.shape[1] + more, 1), FEWEST_ROWS), MOST_ROWS)
    return -(-len(x) // max(-(-len(x) // most), 1))  # chunks of much the same size


def _chunks(x: Tensor, height: int) -> list[slice]:
    return [slice(first, min(first + height, len(x))) for first in range(0, len(x), max(height, 1))]


def _widened(x: Tensor, room: Tensor) -> Tensor:
    """x, or its values in the memory of ``room``."""
    return x if x.dtype == room.dtype else _in_layout_of(x, room[: len(x)]).copy_(x)


def _in_layout_of(x: Tensor, room: Tensor) -> Tensor:
    """``room``, of x's shape and no gaps, with its columns one after the other if x has them so."""
    return room.view(x.shape[::-1]).T if x.stride(0) == 1 else room


class _Kept(threading.local):
    memory: Tensor | None = None


# New memory comes from the system page by page, each page zeroed, which takes as long as a third of
# a product of small matrices: what a call has used waits for the next one, as much as one block
# and one chunk take (48 MB).
_kept = _Kept()


def _room(x: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Uninitialised tensors of these shapes, wide, on x's device, until the next call of this."""
    dtype = wide(x.dtype)
    # Each begins at a line of the cache.
    sizes = [-(-math.prod(shape) // 16) * 16 for shape in shapes]
    memory, count = _kept.memory, sum(sizes)
    if (
        memory is None
        or memory.numel() < count
        or memory.dtype != dtype
        or memory.device != x.device
    ):
        with torch.inference_mode(False):  # or it could not be written to in other calls
            memory = torch.empty(count, dtype=dtype, device=x.device)
        if count <= BLOCK + CHUNK:
            _kept.memory = memory
    parts = memory[:count].split(sizes)
    return [p[: math.prod(s)].view(s) for p, s in zip(parts, shapes, strict=True)]
