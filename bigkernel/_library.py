"""The torch.library handles, and the native library that adds kernels to them.

Each operator is defined twice with one schema: ``torch.ops.bigkernel.<name>``, to which the
native library adds its CPU and CUDA kernels, and ``torch.ops.bigkernel_torch.<name>``, which is
always plain PyTorch. Choosing a backend is choosing a namespace (see ``backend.py``), so a forced
PyTorch run goes through the same schema, checks and autograd formula as a native one. The
namespaces have the name of the package, which is not "bigkernel" everywhere (``bigkernel.hub``).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._functorch import (
    TransformType,
    is_gradtrackingtensor,
    maybe_current_level,
    peek_interpreter_stack,
)
from torch.autograd import forward_ad

from bigkernel import _native
from bigkernel._eager import eager
from bigkernel.errors import has_tangent

NAMESPACE = _native.NAMESPACE
NAMESPACES = (NAMESPACE, f"{NAMESPACE}_torch")
OPS, TORCH_OPS = (getattr(torch.ops, name) for name in NAMESPACES)
_libraries = {name: torch.library.Library(name, "DEF") for name in NAMESPACES}
# (function, device type) -> whether the native library has a kernel. Filled at definition, so that
# torch.compile traces a look-up and not a call into the dispatcher.
kernels: dict[tuple[str, str], bool] = {}

# Dispatch keys included and excluded outside of any operator.
_USUAL_KEYS = (
    torch._C._dispatch_tls_local_include_set(),
    torch._C._dispatch_tls_local_exclude_set(),
)
# Where an operator looks whether its inputs have tangents: below autograd, above its kernels.
_LOOK_KEY = "ADInplaceOrView"
_LOOK = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_plain: dict[str, Callable[..., Any]] = {}  # function -> its PyTorch implementation
# (namespace, function) -> what `call` runs in eager code, and what that runs without derivatives.
_eager: dict[tuple[str, str], Callable[..., Any]] = {}
_below: dict[tuple[str, str], Callable[..., Any]] = {}


def run(namespace: Any, name: str, *arguments: Any) -> Any:
    """As `call`, for an operator whose plain PyTorch can be differentiated forward.

    That is what runs inside a transform of torch.func or a level of forward mode, which know
    nothing of a formula.
    """
    if is_followed():
        return _plain[name](*arguments)
    return call(namespace, name, *arguments)


def is_usual() -> bool:
    """Whether an eager call is followed by nothing but reverse mode.

    Such a call may look at its tensors, and leave to them alone what is to be done.
    """
    return not (torch.compiler.is_compiling() or _is_followed() or _is_traced())


def call(namespace: Any, name: str, *arguments: Any) -> Any:
    """Call an operator of a namespace, in eager code without most of what a call costs in Python.

    torch.library runs a formula of autograd through a dispatcher entry in Python, which takes
    longer than the kernel of a small model's norm; here an autograd.Function of the same formula
    is above the operator.
    """
    if is_usual():
        return call_usual(namespace, name, *arguments)
    return getattr(namespace, name)(*arguments)


def call_usual(namespace: Any, name: str, *arguments: Any) -> Any:
    """`call`, for who has asked `is_usual`."""
    quick = _eager.get((namespace.name, name))
    return getattr(namespace, name)(*arguments) if quick is None else quick(*arguments)


def call_below(namespace: Any, name: str, *arguments: Any) -> Any:
    """`call_usual` below autograd, for who sees to the derivatives."""
    return _below[namespace.name, name](*arguments)


def is_followed() -> bool:
    """Whether `run` runs plain PyTorch."""
    return not torch.compiler.is_compiling() and _is_followed()


def _is_followed() -> bool:
    """Whether forward mode or a transform of torch.func is on."""
    return forward_ad._current_level >= 0 or maybe_current_level() is not None


def _is_traced() -> bool:
    """Whether torch.jit.trace is at work, which knows operators and no autograd.Function."""
    return torch._C._get_tracing_state() is not None


def _unlooked(operator: Any) -> Callable[..., Any]:
    def unlooked(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_LOOK):
            return operator(*arguments)

    return unlooked


def _below_autograd(operator: Any) -> Callable[..., Any]:
    # A native kernel is called past the look for tangents: nothing is followed. In plain PyTorch
    # that key stays, since it also counts the versions of what is changed in place.
    guard: Any = torch._C._AutoDispatchBelowAutograd
    if operator.namespace == NAMESPACE:
        guard = torch._C._AutoDispatchBelowADInplaceOrView
    run = operator._op  # what calling it calls

    def below(*arguments: Any) -> Any:
        with guard():
            return run(*arguments)

    return below


def _make_eager(operator: Any, autograd: tuple[Any, Any] | None) -> Callable[..., Any]:
    if autograd is None:
        return _unlooked(operator) if operator.namespace == NAMESPACE else operator
    formula, setup_context = autograd
    below = _below_autograd(operator)

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

    def with_formula(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return apply(*arguments)
        return below(*arguments)

    return with_formula


def _without_tangents(operator: Any) -> Callable[..., Any]:
    """The operator below autograd, which refuses what forward mode follows and drops nothing.

    Here, and not only where a public function looks at its arguments: code that was compiled for
    tensors without a tangent is run again for those with one.
    """

    @eager
    def kernel(keyset: Any, *arguments: Any) -> Any:
        if _is_followed() and _any_tangent(arguments):
            raise NotImplementedError(
                f"bigkernel: inputs of {operator._opname} must be without tangents here, got a "
                "dual tensor. Use reverse mode (torch.autograd.grad), or call it outside of "
                "torch.compile, where some ops have a forward mode."
            )
        return operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return kernel


def _any_tangent(arguments: Iterable[Any]) -> bool:
    for x in arguments:
        if isinstance(x, list):
            if _any_tangent(x):
                return True
        elif isinstance(x, torch.Tensor):
            if is_gradtrackingtensor(x):
                top = peek_interpreter_stack()
                if top is not None and top.key() == TransformType.Jvp:
                    return True
            else:
                with torch._C._ForceDispatchKeyGuard(*_USUAL_KEYS):  # with autograd, which knows
                    if has_tangent(x):
                        return True
    return False


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
        operator = getattr(ops, name).default
        library.impl(name, _without_tangents(operator), _LOOK_KEY, with_keyset=True)
        _below[namespace, name] = _below_autograd(operator)
        _eager[namespace, name] = _make_eager(operator, formula)
    for device_type in ("cpu", "cuda"):
        kernels[name, device_type] = (
            native is not None
            and (device_type != "cuda" or cuda_error is None)
            and torch._C._dispatch_has_kernel_for_dispatch_key(
                f"{NAMESPACE}::{name}", device_type.upper()
            )
        )


def derive(
    name: str, kernel: Callable[[Any], Callable[..., Any]], vmap: Callable[..., Any]
) -> None:
    """Handle derivatives of op ``name`` by a function instead of an autograd formula.

    ``kernel(op)`` returns what autograd calls in the op's place, with its arguments after the
    dispatch keys; ``vmap`` is what torch.vmap calls (see ``torch.library.register_vmap``).
    `call` runs the op below that: it is for who has seen that no derivative is asked for.
    """
    for namespace, library in _libraries.items():
        op = getattr(getattr(torch.ops, namespace), name).default
        _eager[namespace, name] = _below_autograd(op)
        library.impl(name, eager(kernel(op)), "Autograd", with_keyset=True)
        torch.library.register_vmap(f"{namespace}::{name}", vmap, lib=library)


native, native_error = _native.load()
# Why no GPU runs the CUDA kernels, and whether some may not (`backend.why_not_on`).
cuda_error, gpus_differ = (None, False) if native is None else _native.check_cuda(native)
