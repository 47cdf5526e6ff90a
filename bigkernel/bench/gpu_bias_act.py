"""A bias with the activation after it on a GPU, against torch."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bigkernel.bench import bias_act as table
from bigkernel.bench.case import LIMIT, OURS, REFERENCE, Bar, on_torch, strict
from bigkernel.bench.gpu import Cases, Clock, Row, copy_of, measure
from bigkernel.ops.bias_act.contest import apart


def cases(device: str, clock: Clock, small: bool = False) -> Cases:
    """The middle of a GPT-2's MLP, forward and backward; the limit is a copy of as many bytes."""
    rows, width = (16, 64) if small else (8192, 3072)

    def run(function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> None:
        torch.autograd.grad(function(*inputs), inputs, dy)

    def row(name: str, activation: str) -> Row:
        generator = torch.Generator().manual_seed(0)
        made = table.make(rows, width, torch.bfloat16, generator, device)
        inputs = [t.requires_grad_() for t in made]
        dy = torch.ones_like(inputs[0])
        ours = partial(table.ours, activation)
        runs: dict[str, Callable[[], object]] = {
            REFERENCE: partial(run, on_torch(ours), inputs, dy),
            OURS: partial(run, ours, inputs, dy),
            table.APART: partial(run, partial(apart, activation), inputs, dy),
        }
        work = 5 * dy.numel() * dy.element_size()  # x, y; x, dy, dx
        runs[LIMIT], moved = copy_of(work, device)
        with strict():
            bars = (Bar(1.2, table.APART), Bar(0.7, LIMIT))
            return measure(name, runs, {}, clock, ("B", work, moved), bars)

    for activation in ("gelu", "gelu_tanh"):
        name = f"bf16 {activation}, {rows} x {width}"
        yield name, partial(row, name, activation)


def repeated(device: str) -> Callable[[], list[Tensor]]:
    """What has to give the same bits each time."""

    def called() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        made = table.make(500, 200, torch.bfloat16, generator, device)
        leaves = [t.requires_grad_() for t in made]
        y = table.ours("gelu", *leaves)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    return called
