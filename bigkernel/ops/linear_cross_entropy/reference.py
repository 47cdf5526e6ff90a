"""What linear_cross_entropy computes, in plain PyTorch: also the ``torch`` backend.

    total = sum(cross_entropy(input @ linear_weight^T + linear_bias, target)) / divisor

with the losses of ``bigkernel/ops/cross_entropy/reference.py``, in chunks of rows: the logits of
one chunk exist at a time. Where their gradients are asked for, those of total come from the same
chunk: with dz that of the logits, dinput = dz linear_weight, dlinear_weight = sum(dz^T input) and
dlinear_bias = sum(dz). The two sums are float32 (float64 for float64 inputs) whatever the inputs
are. Rows whose label is ignore_index are as if they were not there.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkernel.ops.cross_entropy import reference as loss

SHARE = 16  # a chunk's logits take this part of those of all rows,
SMALL_CHUNK = 2 << 20  # or these many bytes,
FEWEST_ROWS = 64  # and no fewer rows


def linear_cross_entropy_fwd(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    divisor: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    """(losses [N], total [], stats [2, N], dinput, dlinear_weight, dlinear_bias)."""
    options = (ignore_index, smoothing, z_loss, softcap)
    work = _Products(input, linear_weight, linear_bias, target, ignore_index, wanted)
    losses, stats = [], []
    scale = input.new_ones((), dtype=wide(input.dtype))
    scale = scale if divisor is None else scale / divisor
    for rows in work.chunks():
        z, y = work.logits(rows), target[rows]
        some, _, known = loss.cross_entropy_fwd(z, y, weight, *options)
        losses.append(some)
        stats.append(known)
        if any(wanted):
            each = scale.expand(z.shape[0])
            work.add(rows, loss.cross_entropy_bwd(each, z, y, weight, known, *options))
    every = torch.cat(losses)
    total = every.sum(dtype=torch.float64).to(every.dtype)
    total = total if divisor is None else total / divisor
    return every, total, torch.cat(stats, 1), *work.gradients()


def linear_cross_entropy_bwd(
    scale: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    """(dinput, dlinear_weight, dlinear_bias), given the gradient of each row's loss."""
    options = (ignore_index, smoothing, z_loss, softcap)
    work = _Products(input, linear_weight, linear_bias, target, ignore_index, wanted)
    for rows in work.chunks():
        z, y, known = work.logits(rows), target[rows], stats[:, rows]
        work.add(rows, loss.cross_entropy_bwd(scale[rows], z, y, weight, known, *options))
    return work.gradients()


def wide(dtype: torch.dtype) -> torch.dtype:
    """That of losses and of sums over rows."""
    return torch.promote_types(dtype, torch.float32)


def dtype_of_dinput(dtype: torch.dtype) -> torch.dtype:
    """fp16 keeps too few of the small ones for a scale that comes later."""
    return torch.float32 if dtype == torch.float16 else dtype


class _Products:
    """The matrix products of the chunks, and the gradients that are wanted of them."""

    def __init__(
        self,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        wanted: tuple[bool, ...],
    ) -> None:
        self.dtype = dtype_of_dinput(input.dtype)
        self.wanted = wanted
        weight = linear_weight.to(input.dtype)  # as autocast has it
        self.weight = weight.to(self.dtype)
        self.bias = None if linear_bias is None else linear_bias.to(input.dtype).to(self.dtype)
        if target.dim() == 1:  # whatever stands in rows that do not count
            input = input.masked_fill((target == ignore_index).unsqueeze(1), 0.0)
        self.input = input.to(self.dtype)
        self.dinput: list[Tensor] = []
        sums, dtype = (linear_weight.shape, linear_weight.shape[:1]), wide(input.dtype)
        self.sums = [
            input.new_zeros(shape if want else (0,), dtype=dtype)
            for shape, want in zip(sums, wanted[1:], strict=True)
        ]

    def chunks(self) -> list[slice]:
        """Of much the same size: none is left with few rows, whose products are less exact."""
        n, classes = self.input.shape[0], self.weight.shape[0]
        row = classes * self.weight.element_size()
        rows = max(n // SHARE, SMALL_CHUNK // row, FEWEST_ROWS)
        count = max(-(-n // rows), 1)
        return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]

    def logits(self, rows: slice) -> Tensor:
        return F.linear(self.input[rows], self.weight, self.bias)

    def add(self, rows: slice, dz: Tensor) -> None:
        if self.wanted[0]:
            self.dinput.append(dz @ self.weight)
        if self.wanted[1]:
            self.sums[0] += dz.T @ self.input[rows]
        if self.wanted[2]:
            self.sums[1] += dz.sum(0, dtype=self.sums[1].dtype)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        empty = self.input.new_empty(0)
        return torch.cat(self.dinput) if self.wanted[0] else empty, self.sums[0], self.sums[1]
