"""When a replaced module uses the op, and when what was there before."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules

from bigkernel import (
    _library,
    backend,
    ops,  # noqa: F401  which fill the registry
    registry,
    tuning,
)

# By public function, as its op's registration says (`registry.InModels`).
_FUNCTIONS = {name: op.functions[0].name for op in registry.every() for name in op.in_models}
_CHOICES = {name: registry.find(function).in_models[name] for name, function in _FUNCTIONS.items()}
SMALLEST = {name: choice.smallest for name, choice in _CHOICES.items()}
CONTESTED = {name: choice.contested for name, choice in _CHOICES.items()}
COMPILED = frozenset(name for name, choice in _CHOICES.items() if choice.compiled)
_PLAIN = (Tensor, nn.Parameter)


def takes(
    op: str,
    *tensors: Tensor | None,
    size: int | None = None,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether ``op`` is to be used on these tensors: natively, and where that is faster.

    size: how large the call is, where it is not the number of the first tensor's elements; dtype:
    what it computes in, where it is not that of the first tensor. A backend that was chosen by
    hand (`use_backend`) is obeyed. What was measured (`tuning`) counts in eager code: compiled,
    what was there before is made into other code than was timed.
    """
    first = tensors[0]
    assert first is not None
    device = first.device
    for x in tensors:
        if x is not None and (
            type(x) not in _PLAIN or x.dtype not in registry.NATIVE_DTYPES or x.device != device
        ):
            return False
    if backend._forced is not None:
        return True
    compiling = torch.compiler.is_compiling()
    if compiling and op not in COMPILED:
        return False
    size = first.numel() if size is None else size
    if size < SMALLEST[op] or not _library.kernels.get((_FUNCTIONS[op], device.type), False):
        return False
    if _library.gpus_differ and backend.why_not_on(device) is not None:
        return False
    if compiling or not tuning.contested(op, device.type) or size > CONTESTED[op]:
        return True
    return not tuning.takes_torch(
        op, device.type, tuning.size_class(dtype or first.dtype, size, tensors)
    )


def why_not(op: str, module: nn.Module) -> str | None:
    """Why ``op`` cannot run natively on what this module holds, or None."""
    held = next((p for p in module.parameters() if p.is_floating_point()), None)
    if held is None:
        return None
    function = _FUNCTIONS[op]
    reason = registry.find(function).why_not_dtype(held.dtype) or backend.why_not_on(held.device)
    try:
        return backend.decide(function, held.device.type, reason)[1]
    except RuntimeError as error:
        return str(error)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody would notice that ``module`` is not called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _modules._has_any_global_hook()
    )
