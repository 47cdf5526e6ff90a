"""Adam in plain PyTorch: the definition of what is right, and the ``torch`` backend.

With g the gradient (unscaled, clipped, negated to maximise), x the master copy of the parameter
where there is one and otherwise the parameter, and t the step count after this step:

    g    <- g + weight_decay * x                        (L2 decay, Adam)
    m    <- m + (1 - beta1) * (g - m)
    v    <- v - (1 - beta2) * v + (1 - beta2) * g^2
    vmax <- max(vmax, v)                                (amsgrad; else vmax is v)
    r    =  sqrt(1 - beta2^t)
    x    <- x - lr * weight_decay * x                   (decoupled decay, AdamW)
              - lr * r / (1 - beta1^t) * m / (sqrt(vmax) + eps * r)

This is Kingma and Ba (arXiv:1412.6980), Loshchilov and Hutter (arXiv:1711.05101) and Reddi et al.
(arXiv:1904.09237), with the two bias corrections gathered into one scalar each. Arithmetic is in
fp32 (fp64 for fp64 parameters), scalars in fp64. Nothing is read back to the host.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigkernel.random import philox4x32

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
# A parameter of these may have a master copy.
NARROW = (torch.bfloat16, torch.float16, *FLOAT8)
AMSGRAD = 1
MAXIMIZE = 2
DECOUPLED = 4


class StepArguments(NamedTuple):
    """Of the op `adam_step_`, in the schema's order; they are explained in ``op.py``."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    masters: list[Tensor]
    steps: list[Tensor]
    group_sizes: list[int]
    flags: list[int]
    lrs: list[float]
    lr_tensors: list[Tensor]
    beta1s: list[float]
    beta2s: list[float]
    epss: list[float]
    weight_decays: list[float]
    max_norm: float | None
    total_norm: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    seed: Tensor | None


def norm_dtype(grads: list[Tensor]) -> torch.dtype:
    """The norm's dtype: float32, or float64 where a gradient has it."""
    wide = any(g.dtype == torch.float64 for g in grads)
    return torch.float64 if wide else torch.float32


def adam_norm(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
    """2-norm of all gradients taken as one vector, divided by ``grad_scale``; a 0-d tensor.

    Squares are summed in fp64, as ``clip_grad_norm_`` would in exact arithmetic.
    """
    wide = [g.float() if g.dtype in FLOAT8 else g for g in grads]  # torch has no norm of those
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in wide]
    total = torch.stack(squares).sum().sqrt()
    if grad_scale is not None:
        total = total / grad_scale.double()
    return total.to(norm_dtype(grads))


def stochastic_noise(seed: Tensor, like: Tensor, tensor_index: int, step: Tensor) -> Tensor:
    """Sixteen random bits for each element of ``like``, as int32, in ``like``'s layout.

    Element e (counted in memory order) takes the (e mod 8)-th 16-bit half of the four words of
    Philox4x32-10 with key ``seed`` and counter (e // 8 low, e // 8 high, tensor_index, step).
    """
    n = like.numel()
    block = torch.arange((n + 7) // 8, device=like.device)
    words = philox4x32(seed, block, block >> 32, tensor_index, step.to(torch.int64))
    stacked = torch.stack(words, dim=-1)
    halves = torch.stack((stacked & 0xFFFF, stacked >> 16), dim=-1).reshape(-1)[:n]
    strides = torch.empty_like(like).stride()  # like's own, unless it has gaps
    return halves.to(torch.int32).as_strided(like.size(), strides)


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 to bf16, up or down with the probability that keeps the mean: adds ``noise``, cuts."""
    cut = ((x.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), cut, x).to(torch.bfloat16)


def adam_step_(*given: Any, **named: Any) -> Tensor:
    """One step for the whole list; the arguments, `StepArguments`, are explained in ``op.py``."""
    call = StepArguments(*given, **named)
    params, grad_scale, max_norm = call.params, call.grad_scale, call.max_norm
    factor: Tensor | None = None
    apply: Tensor | None = None
    norm = torch.empty(0, dtype=norm_dtype(call.grads), device=params[0].device)
    if grad_scale is not None:
        factor = grad_scale.double().reshape(()).reciprocal()
    if call.found_inf is not None:
        apply = call.found_inf.reshape(()) == 0
    if max_norm is not None:
        if call.total_norm is None:
            norm = adam_norm(call.grads, grad_scale)
        else:
            norm = call.total_norm.to(norm.dtype).reshape(()).clone()
        clip = (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)
        factor = clip if factor is None else clip * factor
        apply = norm.isfinite() if apply is None else apply & norm.isfinite()

    def write(target: Tensor, value: Tensor) -> None:
        value = value.to(target.dtype)
        target.copy_(value if apply is None else torch.where(apply, value, target))

    maxima, master_copies = iter(call.max_exp_avg_sqs), iter(call.masters)
    first = 0
    for i, size in enumerate(call.group_sizes):
        lr: float | Tensor = call.lrs[i]
        if call.lr_tensors:
            lr = call.lr_tensors[i].double().reshape(())
        beta1, beta2, eps = call.beta1s[i], call.beta2s[i], call.epss[i]
        decay, flags = call.weight_decays[i], call.flags[i]
        for j in range(first, first + size):
            param, step = params[j], call.steps[j]
            compute = torch.float64 if param.dtype == torch.float64 else torch.float32
            narrow = param.dtype in NARROW
            master = next(master_copies) if call.masters and narrow else None
            x = (param if master is None else master).to(compute)
            g = call.grads[j].to(compute)
            if factor is not None:
                g = g * factor.to(compute)
            if flags & MAXIMIZE:
                g = -g
            if decay and not flags & DECOUPLED:
                g = g + decay * x
            m, v = call.exp_avgs[j].to(compute), call.exp_avg_sqs[j].to(compute)
            m = m + (1 - beta1) * (g - m)
            # v - (1 - beta2) v keeps more of 1 - beta2 than beta2 * v; not for an infinite v.
            v = torch.where(v.isinf(), v, v - (1 - beta2) * v) + (1 - beta2) * g * g
            write(call.exp_avgs[j], m)
            write(call.exp_avg_sqs[j], v)
            if flags & AMSGRAD:
                largest = next(maxima)
                v = torch.maximum(largest.to(compute), v)
                write(largest, v)
            new_step = step + 1
            t = new_step.double().reshape(())
            root = (1 - torch.pow(beta2, t)).sqrt()
            step_size = (lr * root / (1 - torch.pow(beta1, t))).to(compute)
            update = step_size * m / (v.sqrt() + (eps * root).to(compute))
            if decay and flags & DECOUPLED:
                rate = lr * decay
                rate = rate.to(compute) if isinstance(rate, Tensor) else rate
                # An infinite x decays to itself, not to inf - inf.
                update = torch.where(x.isinf(), update, update + rate * x)
            x = x - update
            if master is not None:
                write(master, x)
            elif call.seed is not None and param.dtype == torch.bfloat16:
                x = round_stochastically(x, stochastic_noise(call.seed, param, j, t))
            write(param, x)
            write(step, new_step)
        first += size
    return norm
