"""Functions that a compiled caller calls as they are."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def eager(function: F) -> F:
    """``torch.compiler.disable``, without importing the compiler, which takes seconds.

    Where nothing has imported it, nothing is being compiled.
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **keywords)
            disabled = torch.compiler.disable(function)
        return disabled(*args, **keywords)

    # What torch.compiler.disable puts on a function: tracing stops before it.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
