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

NAMESPACES = ("bigkernel", "bigkernel_torch")
_libraries = {name: torch.library.Library(name, "DEF") for name in NAMESPACES}
# (function, device type) -> whether the native module has a kernel. Filled at definition, so that
# torch.compile traces a look-up and not a call into the dispatcher.
kernels: dict[tuple[str, str], bool] = {}


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
    for namespace, library in _libraries.items():
        library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        library.impl(name, impl, "CompositeExplicitAutograd")
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, fake, lib=library)
        if autograd is not None:
            backward, setup_context = autograd(getattr(torch.ops, namespace))
            torch.library.register_autograd(
                qualified, backward, setup_context=setup_context, lib=library
            )
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
