"""What the machine gives: the yardsticks that a case is held against, measured beside it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bigkernel import _library, precision

SIDE = 2048


def matrix_product(dtype: torch.dtype, side: int = SIDE) -> tuple[Callable[[], object], float, str]:
    """torch's fastest product of two square matrices of ``dtype``.

    Also its floating-point operations, and what it is in words.
    """
    fastest = precision.fastest(torch.device("cpu"), dtype)
    a, b = torch.randn(side, side).to(fastest), torch.randn(side, side).to(fastest)
    out = torch.empty_like(a)
    name = f"torch's product of two {side:,} x {side:,} matrices in {fastest}"
    if fastest != dtype:
        name += f", which is faster here than in {dtype}"
    return (lambda: torch.mm(a, b, out=out)), 2.0 * side**3, name.replace("torch.", "")


def adam_stream(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    norm: bool,
) -> Callable[[], object]:
    """A loop over the very arrays of a step: reads four, writes three, leaves all as they are.

    With ``norm`` it reads the gradients once more before. float32, contiguous.
    """
    assert _library.native is not None
    pointers = [
        [t.data_ptr() for t in tensors] for tensors in (params, grads, exp_avgs, exp_avg_sqs)
    ]
    sizes = [t.numel() for t in params]
    return lambda: torch.ops.bigkernel_native.stream_adam(*pointers, sizes, norm)


def copy(num_bytes: int) -> Callable[[], object]:
    """A copy that reads and writes ``num_bytes`` in all, half and half."""
    source = torch.zeros(num_bytes // 8, dtype=torch.float32)
    result = torch.empty_like(source)
    return lambda: result.copy_(source)
