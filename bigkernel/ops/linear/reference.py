"""What a linear layer computes where 16-bit tensors are widened, in plain PyTorch.

    y = input weight^T + bias
    dinput = dy weight      dweight = dy^T input      dbias = sum(dy)

float32 within (float64 for float64 inputs), sums over rows too, rounded once at the end. To widen a
matrix takes time and memory in proportion to its elements, and a product that times the rows of the
other one: so the weight is widened once a call, and the rows in chunks, each in the memory of the
one before. A weight too large to stand in memory a second time is widened in blocks of its rows.
"""

import threading
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements that are widened: of a block of a weight, and of a chunk of rows, both sides of its
# product together.
BLOCK, CHUNK = 1 << 23, 1 << 22
FEWEST_ROWS, MOST_ROWS = 128, 512  # of a chunk
# Fewer rows torch multiplies by a 16-bit weight about as fast as that can be read.
FEW = 16


def linear_fwd(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[.., M]; input [.., K], weight [M, K] and bias [M] of its dtype or wider."""
    x = _rows(input)
    if 0 < x.shape[0] < FEW and weight.dtype == x.dtype:
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    else:
        y = _times(x, weight, bias)
    return y.view(*input.shape[:-1], weight.shape[0])


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
    count, width = x.shape
    y = x.new_empty(count, weight.shape[0])
    for block in _blocks(weight):
        w = weight[block]
        outputs = w.shape[0]
        height = _height(count, width + outputs)
        room, *parts = _room(x, w, (height, width), (height, outputs))
        w = w if w.dtype == room.dtype else room.copy_(w)
        b = None if bias is None else bias[block].to(room.dtype)
        for rows in _chunks(count, height):
            part, product = (p[: rows.stop - rows.start] for p in parts)
            part.copy_(x[rows])
            if b is None:
                torch.mm(part, w.T, out=product)
            else:
                torch.addmm(b, part, w.T, out=product)
            y[rows, block] = product
    return y


def _sum_of_products(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """g^T x, of weight's dtype and layout."""
    count, width = x.shape
    if count == 0:
        return torch.zeros_like(weight)
    result = torch.empty_like(weight)
    for block in _blocks(weight):
        part = result[block]
        height = _height(count, width + part.shape[0])
        room, *parts = _room(x, part, (height, part.shape[0]), (height, width))
        total = part if part.dtype == room.dtype else room
        for rows in _chunks(count, height):
            a, b = (p[: rows.stop - rows.start] for p in parts)
            a.copy_(g[rows, block])
            b.copy_(x[rows])
            torch.addmm(total, a.T, b, beta=float(rows.start > 0), out=total)
        if total is room:
            part.copy_(total)
    return result


def _sum(g: Tensor) -> Tensor:
    """That of the rows, in parts: its error does not grow with their number."""
    total = g.new_zeros(g.shape[1], dtype=wide(g.dtype))
    height = _height(g.shape[0], g.shape[1])
    (room,) = _room(g, None, (height, g.shape[1]))
    for rows in _chunks(g.shape[0], height):
        total += room[: rows.stop - rows.start].copy_(g[rows]).sum(0)
    return total


def _rows(x: Tensor) -> Tensor:
    """[.., D] as [N, D], where N or D may be 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _blocks(weight: Tensor) -> list[slice]:
    outputs, width = weight.shape
    count = max(BLOCK // max(width, 1), 1)
    return [slice(first, min(first + count, outputs)) for first in range(0, outputs, count)]


def _height(count: int, width: int) -> int:
    """How many of ``count`` rows a chunk has; they take so many elements each."""
    most = min(max(CHUNK // max(width, 1), FEWEST_ROWS), MOST_ROWS)
    return -(-count // max(-(-count // most), 1))  # chunks of much the same size


def _chunks(count: int, height: int) -> list[slice]:
    return [slice(first, min(first + height, count)) for first in range(0, count, max(height, 1))]


class _Kept(threading.local):
    memory: Tensor | None = None


# New memory comes from the system page by page, each page zeroed, which takes as long as a third of
# a product of small matrices: what a call has used waits for the next one of its thread, as much as
# one block and one chunk take (48 MB).
_kept = _Kept()


def _room(x: Tensor, matrix: Tensor | None, *chunks: tuple[int, int]) -> list[Tensor]:
    """Uninitialised wide tensors on x's device, which last until the next call of this.

    One of matrix's shape and order of dimensions, where there is one, and one of each other shape.
    """
    dtype, shapes = wide(x.dtype), list(chunks)
    if matrix is not None:
        shapes.insert(0, (matrix.shape[0], matrix.shape[1]))
    # Each begins at a line of the cache.
    ends = list(accumulate(-(-rows * columns // 16) * 16 for rows, columns in shapes))
    memory, count = _kept.memory, ends[-1]
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
    rooms = [
        memory.as_strided(shape, (shape[1], 1), start)
        for shape, start in zip(shapes, [0, *ends], strict=False)
    ]
    if matrix is not None and matrix.stride(0) == 1:
        rooms[0] = memory.as_strided(shapes[0], (1, shapes[0][0]), 0)
    return rooms
