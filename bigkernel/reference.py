"""What is right, op by op, in plain PyTorch: ``bigkernel.reference.<noun>``.

Each lies in its op's folder, ``bigkernel/ops/<noun>/reference.py``; it is also the `torch` backend.
"""

import importlib
from types import ModuleType

import bigkernel.ops  # noqa: F401 - registers the ops
from bigkernel import registry


def __getattr__(name: str) -> ModuleType:
    if name in __dir__():
        return importlib.import_module(f"bigkernel.ops.{name}.reference")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [op.noun for op in registry.every()]
