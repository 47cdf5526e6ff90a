"""The torch.library handles, and the native module that adds kernels to them.

Each operator is defined twice with one schema: ``torch.ops.bigkernel.<name>``, to which the
native module adds its CPU and CUDA kernels, and ``torch.ops.bigkernel_torch.<name>``, which is
always plain PyTorch. Choosing a backend is choosing a namespace (see ``backend.py``), so a forced
PyTorch run goes through the same schema, checks and autograd formula as a native one.
"""

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

NAMESPACES = ("bigkernel", "bigkernel_torch")
_libraries = {name: torch.library.Library(name, "DEF") for name in NAMESPACES}
# (function, device type) -> whether the native module has a kernel. Filled at definition, so that
# torch.compile traces a look-up and not a call into the dispatcher.
kernels: dict[tuple[str, str], bool] = {}

_plain: dict[str, Callable[..., Any]] = {}  # function -> its PyTorch implementation
# (namespace, function) -> what `run` calls in eager code.
_eager: dict[tuple[str, str], Callable[..., Any]] = {}


def run(namespace: Any, name: str, *arguments: Any) -> Any:
    """Call an operator of a namespace, in eager code without most of what a call costs in Python.

    torch.library runs a formula of autograd through a dispatcher entry in Python, which takes
    longer than the kernel of a small model's norm; here an autograd.Function of the same formula
    is above the operator. Under a transform of torch.func or forward-mode differentiation, which
    know neither, the operator's plain PyTorch is what they transform.
    """
    if torch.compiler.is_compiling():
        return getattr(namespace, name)(*arguments)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _plain[name](*arguments)
    return _eager[namespace.name, name](*arguments)


def _make_eager(operator: Any, autograd: tuple[Any, Any] | None) -> Callable[..., Any]:
    def below(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    if autograd is None:
        return below
    formula, setup_context = autograd

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = below(*arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return formula(ctx, *grads)

    apply: Callable[..., Any] = Eager.apply  # type: ignore[assignment]

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            for x in arguments:
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    return apply(*arguments)
        return below(*arguments)

    return call


def define(
    name: str,
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[[Any], tuple[Callable[..., Any], Callable[..., Any]]] | None = None,
) -> None:
    """Define the operator ``name`` with its PyTorch implementation, fake and autograd formula.

    ``autograd(namespace)`` returns ``(backward, setup_context)``; the namespace lets the formula
    call the backward op of the same backend.
    """
    _plain[name] = impl
    for namespace, library in _libraries.items():
        library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        library.impl(name, impl, "CompositeExplicitAutograd")
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, fake, lib=library)
        ops = getattr(torch.ops, namespace)
        formula = None if autograd is None else autograd(ops)
        if formula is not None:
            torch.library.register_autograd(
                qualified, formula[0], setup_context=formula[1], lib=library
            )
        _eager[namespace, name] = _make_eager(getattr(ops, name).default, formula)
    for device_type in ("cpu", "cuda"):
        kernels[name, device_type] = (
            native is not None
            and torch._C._dispatch_has_kernel_for_dispatch_key(
                f"bigkernel::{name}", device_type.upper()
            )
        )


def derive(
    name: str, kernel: Callable[[Any], Callable[..., Any]], vmap: Callable[..., Any]
) -> None:
    """Handle derivatives of op ``name`` by a function instead of an autograd formula.

    ``kernel(op)`` returns what autograd calls in the op's place, with its arguments after the
    dispatch keys; ``vmap`` is what torch.vmap calls (see ``torch.library.register_vmap``).
    """
    for namespace, library in _libraries.items():
        op = getattr(getattr(torch.ops, namespace), name).default
        library.impl(name, kernel(op), "Autograd", with_keyset=True)
        torch.library.register_vmap(f"{namespace}::{name}", vmap, lib=library)


def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("BIGKERNEL_NATIVE") == "0":
        return None, "BIGKERNEL_NATIVE=0"
    try:
        return importlib.import_module("bigkernel._C"), None
    except ModuleNotFoundError as error:
        if error.name != "bigkernel._C":
            raise
        return None, "the native module was not built (pip install without BIGKERNEL_NATIVE=0)"
    except ImportError as error:
        if "BIGKERNEL_CPU_ISA" in str(error):
            raise ValueError(str(error)) from None
        return None, f"the native module did not load: {error}"


native, native_error = _load()
