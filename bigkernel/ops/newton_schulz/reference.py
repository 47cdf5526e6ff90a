"""The Newton-Schulz iteration in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Matrices of one shape are multiplied together up to so many elements. On the CPU batches that
# leave the caches gain nothing.
_MOST_ELEMENTS, _MOST_ON_CPU = 1 << 25, 1 << 18


def newton_schulz(
    xs: Sequence[Tensor], a: float, b: float, c: float, steps: int, eps: float, narrow: bool
) -> list[Tensor]:
    """x / max(|x|, eps), then ``steps`` times x <- a x + (b x x^T + c (x x^T)^2) x, of each matrix.

    |x| is the 2-norm of all elements. Of a tall matrix x^T x is taken, on the other side: the
    products are then of the shorter side.
    """
    dtype = torch.bfloat16 if narrow else torch.float32
    results: list[Tensor | None] = [None] * len(xs)
    for places in _batches(xs):
        parts = [xs[i].reshape(-1, *xs[i].shape[-2:]).to(dtype) for i in places]
        stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
        done = iterate(stacked, a, b, c, steps, eps).split([len(part) for part in parts])
        for i, piece in zip(places, done, strict=True):
            results[i] = piece.reshape(xs[i].shape).contiguous()
    return [result for result in results if result is not None]


def _batches(xs: Sequence[Tensor]) -> list[list[int]]:
    """Indices of matrices of one shape; one alone, or several that are small enough together."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, x in enumerate(xs):
        alike.setdefault(tuple(x.shape[-2:]), []).append(i)
    batches: list[list[int]] = []
    for places in alike.values():
        room = 0
        for i in places:
            if xs[i].numel() > room:
                batches.append([])
                room = _MOST_ON_CPU if xs[i].device.type == "cpu" else _MOST_ELEMENTS
            batches[-1].append(i)
            room -= xs[i].numel()
    return batches


def iterate(x: Tensor, a: float, b: float, c: float, steps: int, eps: float) -> Tensor:
    """The iteration of matrices [n, rows, columns], in their dtype."""
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norm.clamp(min=eps)
    single = len(x) == 1  # torch has faster products of two matrices
    if single:
        x = x[0]
    add_product = torch.addmm if single else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, polynomial, x, beta=a)
    if single:
        x = x.unsqueeze(0)
    return x.mT if tall else x
