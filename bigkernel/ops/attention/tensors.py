"""What is no plain tensor at the public attention functions: understood, or a clear error.

A subclass may mean something else than its data says, so that reading the data would give wrong
numbers without a word. Those with a `__torch_function__` of their own are refused, except
`torch.nn.attention.bias.CausalBias`, which `scaled_dot_product_attention` takes; those with
`__torch_dispatch__` alone (FakeTensor, wrappers) see the op themselves. Proxies of
`torch.fx.symbolic_trace` record the call. DTensors run on what each rank holds.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from bigkernel.expect import Expect

F = TypeVar("F", bound=Callable[..., Any])

# By far the most arguments are of these, and need no look.
_USUAL = frozenset((Tensor, Parameter, type(None), bool, int, float, str, tuple))


def understands_tensors(function: F) -> F:
    """Decorates a public attention function with the above."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        if _USUAL.issuperset(map(type, args)) and (
            not keywords or _USUAL.issuperset(map(type, keywords.values()))
        ):
            return function(*args, **keywords)
        if len(args) > len(names):
            return function(*args, **keywords)  # Python says what is wrong
        return _unusual(call, function, {**dict(zip(names, args, strict=False)), **keywords})

    def refuse_script() -> None:
        raise NotImplementedError(
            f"bigkernel.{function.__name__}: torch.jit.script does not compile it. Use "
            "torch.jit.trace, torch.export or torch.compile."
        )

    call.__prepare_scriptable__ = refuse_script  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _unusual(call: Any, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    distributed = False
    for name, x in arguments.items():
        kind = type(x)
        if kind in _USUAL:
            continue
        if not isinstance(x, Tensor):
            if not torch.compiler.is_compiling() and hasattr(kind, "__torch_function__"):
                return torch.overrides.handle_torch_function(
                    call, tuple(arguments.values()), **arguments
                )
            continue
        if _is_dtensor(kind):
            distributed = True
            continue
        if x.is_nested or (is_causal_bias(kind) and name == "attn_mask"):
            continue  # which the function itself refuses, or knows
        fix = "Pass causal=True and align in place of a causal mask"
        Expect(function.__name__).meaning(name, x, fix if is_causal_bias(kind) else "")
    if distributed:
        from bigkernel.ops.attention.dtensor import on_shards

        return on_shards(function, arguments)
    return function(**arguments)


def is_causal_bias(kind: type) -> bool:
    """By name: importing the class would import torch's compiler, which takes seconds."""
    return kind.__name__ == "CausalBias" and kind.__module__ == "torch.nn.attention.bias"


def _is_dtensor(kind: type) -> bool:
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed.tensor")
