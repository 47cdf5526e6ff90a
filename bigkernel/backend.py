"""Which backend runs an op: cuda, cpu (both native) or torch (plain PyTorch).

Chosen by the tensors' device and by what was built; overridden by ``use_backend`` or the
environment variable ``BIGKERNEL_BACKEND``. A call that the automatic choice cannot serve natively
goes to PyTorch with one warning that names the reason; ``BIGKERNEL_STRICT=1`` makes that an error.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from bigkernel import _library, _native, registry, tuning
from bigkernel.errors import FallbackWarning, level_of_caller

BACKENDS = ("cuda", "cpu", "torch")


def _valid(name: str | None, where: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"{where} must be one of {', '.join(BACKENDS)}, got {name!r}. "
            "Leave it out for the automatic choice."
        )
    return name


_forced: str | None = _valid(os.environ.get("BIGKERNEL_BACKEND") or None, "BIGKERNEL_BACKEND")
_warned: set[tuple[str, str]] = set()


def _force(name: str | None) -> None:
    global _forced
    _forced = name


def _until_exit(undo: Callable[[Any], None], previous: Any) -> AbstractContextManager[Any]:
    """Calls ``undo(previous)`` at the end of a ``with`` block, or never without one."""
    stack = ExitStack()
    stack.callback(undo, previous)
    return stack


def is_forced() -> bool:
    """Whether a backend was chosen by hand."""
    return _forced is not None


def use_backend(name: str | None) -> AbstractContextManager[Any]:
    """Use one backend for every op from now on, or inside a ``with`` block.

    ``name`` is "cuda", "cpu", "torch" or None for the automatic choice. A named native backend
    that cannot run a call raises RuntimeError instead of falling back. Holds for the process.
    """
    previous = _forced
    _force(_valid(name, "use_backend(name)"))
    return _until_exit(_force, previous)


def use_cpu_isa(name: str) -> AbstractContextManager[Any]:
    """Use one CPU instruction set from now on, or inside a ``with`` block; see ``cpu_isas``."""
    native = _library.native
    if native is None:
        raise RuntimeError(f"No instruction set to choose: {_library.native_error}.")
    previous = native.cpu_isa()
    _set_cpu_isa(name)
    return _until_exit(_set_cpu_isa, previous)


def _set_cpu_isa(name: str) -> None:
    assert _library.native is not None
    _library.native.set_cpu_isa(name)
    tuning.forget()  # what was measured is another set's


def cpu_isas() -> list[str]:
    """Instruction sets that this machine and this build can run; empty without native code."""
    return _library.native.cpu_isas() if _library.native is not None else []


def _why_no_kernel(op: str, device_type: str) -> str:
    absent = registry.find(op).absent.get(device_type)  # type: ignore[call-overload]
    if absent is not None:
        return f"{op} has no kernel for device type {device_type!r}: {absent}"
    if _library.native is None:
        return str(_library.native_error)
    if device_type == "cuda" and _library.cuda_error is not None:
        return _library.cuda_error
    if device_type == "cuda" and _library.native.build_info().cuda is None:
        return "this build has no CUDA kernels"
    if device_type in registry.LEVELS:  # the op has it: its source is newer than the module
        return (
            f"the native library was built without the {device_type} kernel of {op}; "
            "`make build` builds it anew"
        )
    return f"there is no native kernel of {op} for device type {device_type!r}"


def why_not_on(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on this one of the machine's GPUs; None if they can."""
    native = _library.native
    if not _library.gpus_differ or device.type != "cuda" or native is None:
        return None
    traits = torch.cuda.get_device_properties(device)
    info, capability = native.build_info(), 10 * traits.major + traits.minor
    if _native.runs_on(info.cuda_archs, capability):
        return None
    return _native.no_code_for(info, [capability])


def decide(op: str, device_type: str, reason: str | None = None) -> tuple[str, str | None]:
    """(backend, why no faster one) for a call of ``op``; raises if a forced backend cannot run."""
    why = (
        reason
        if _library.kernels.get((op, device_type), False)
        else _why_no_kernel(op, device_type)
    )
    if _forced == "torch":
        return "torch", "use_backend('torch') or BIGKERNEL_BACKEND=torch"
    if _forced is not None:
        if _forced != device_type:
            raise RuntimeError(
                f"bigkernel.{op}: backend {_forced!r} was asked for, but the tensors are on "
                f"{device_type!r}. Move them, or use_backend(None)."
            )
        if why is not None:
            raise RuntimeError(
                f"bigkernel.{op}: backend {_forced!r} was asked for and cannot run this call: "
                f"{why}. use_backend(None) lets PyTorch take it."
            )
    return (device_type, None) if why is None else ("torch", why)


def select(op: str, device: torch.device, reason: str | None = None) -> Any:
    """The op namespace that a call of ``op`` on ``device`` goes to.

    ``reason`` says why the native kernel cannot take this particular call, None if it can.
    """
    # What is true of nearly all calls, first.
    if (
        reason is None
        and _forced is None
        and not _library.gpus_differ
        and _library.kernels.get((op, device.type), False)
    ):
        return _library.OPS
    backend, why = decide(op, device.type, reason or why_not_on(device))
    if backend != "torch" or device.type == "meta":  # there, shapes are all that is asked for
        return _library.OPS
    if _forced is None and why is not None and not torch.compiler.is_compiling():
        _fall_back(op, why)
    return _library.TORCH_OPS


def _fall_back(op: str, why: str) -> None:
    message = f"bigkernel.{op} runs in plain PyTorch: {why}."
    if os.environ.get("BIGKERNEL_STRICT") == "1":
        raise RuntimeError(f"{message} BIGKERNEL_STRICT=1 makes this an error.")
    if (op, why) not in _warned and why not in _native.told:
        _warned.add((op, why))
        warnings.warn(message, FallbackWarning, stacklevel=level_of_caller())


def explain(op: str, *tensors: Tensor) -> str:
    """One sentence: which backend runs ``op`` on these tensors, and why not a faster one.

    ``op`` is a noun ("attention") or a name in ``torch.ops.bigkernel`` ("attention_fwd"); the
    tensors are those that decide, such as q, k and v. Without any the sentence is about the CPU.
    """
    try:
        found = registry.find(op)
    except ValueError as error:
        raise ValueError(f"explain: {error}") from None
    if not found.functions:
        return f"{op}: composed of torch's operators and other ops"
    device_type = tensors[0].device.type if tensors else "cpu"
    for tensor in tensors:
        if tensor.device.type != device_type:
            raise ValueError(
                f"explain: all tensors must be on one device, got {device_type} and "
                f"{tensor.device.type}."
            )
    name = op if op != found.noun else found.functions[0].name
    reason = found.why_not_native(tensors)
    if reason is None and tensors:
        reason = why_not_on(tensors[0].device)
    backend, why = decide(name, device_type, reason)
    detail = ""
    if backend == "cpu":
        assert _library.native is not None
        detail = f" ({_library.native.cpu_isa()}, {torch.get_num_threads()} threads)"
    known = "" if backend == "torch" or is_forced() else tuning.told(found, device_type, tensors)
    measured = f". {known}" if known else ""
    return f"{op}: {backend}{detail}" + (f", because {why}" if why else "") + measured
