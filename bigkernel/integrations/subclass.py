"""One module of a model made to run other code, by giving it a subclass of its own class.

Neither the class nor any other module is touched, and the module stays what it is: its parameters,
hooks and attributes, what `isinstance` says, its name when it is printed. What is on the class can
be copied with the module (`copy.copy`, `deepcopy`, DataParallel), which a function on the instance,
bound to the original, cannot; and gradient checkpointing, which wraps what a class defines, stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Called with the class and the arguments given to `give_subclass`; the body of the subclass.
Make = Callable[..., dict[str, Any]]


@dataclass
class Swapped:
    """A module that got a subclass, and the class it had."""

    module: nn.Module
    base: type[nn.Module]

    def give_back(self) -> None:
        """Put the class back; a module that has got yet another one since keeps that."""
        if is_swapped(self.module):
            self.module.__class__ = self.base


def is_swapped(module: nn.Module) -> bool:
    """Whether the class of a module is a subclass that was made for it."""
    return "_bigkernel_base" in vars(type(module))


def original_class(module: nn.Module) -> Any:
    """The class of a module, or the one it had before it got a subclass."""
    return getattr(type(module), "_bigkernel_base", type(module))


def give_subclass(module: nn.Module, make: Make, *arguments: Any) -> list[Swapped]:
    """Give ``module`` the subclass that ``make(class, *arguments)`` describes.

    Returns what undoes it; nothing for a module that has got one already. ``make`` and its
    arguments are what is pickled of the class: a function of a module, and hashable values.
    """
    if is_swapped(module):
        return []
    base: Any = type(module)  # a class, which mypy takes for unhashable
    module.__class__ = _subclass(base, make, *arguments)
    return [Swapped(module, base)]


def why_no_subclass(module: nn.Module) -> str | None:
    """Why the code of this module must not be replaced, or None."""
    if "forward" in vars(module):
        return "something else has replaced its forward (accelerate's hooks do so)"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by torch.jit"
    if hasattr(module, "parametrizations"):
        return "it is parametrized, which depends on its class"
    return None


@functools.cache
def _subclass(base: Any, make: Make, *arguments: Any) -> type[nn.Module]:
    body = {
        **make(base, *arguments),
        "_bigkernel_base": base,
        "_bigkernel_made": (base, make, *arguments),
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base)(base.__name__, (base,), body)


def _reduce(module: nn.Module, protocol: Any) -> Any:
    # The class has no name to be found by.
    made = object.__reduce_ex__(module, max(2, int(protocol)))
    if not is_swapped(module):  # a subclass of it that someone has made
        return made
    return (_new, type(module)._bigkernel_made, *made[2:])  # type: ignore[attr-defined]


def _new(base: Any, make: Make, *arguments: Any) -> Any:
    cls = _subclass(base, make, *arguments)
    return cls.__new__(cls)
