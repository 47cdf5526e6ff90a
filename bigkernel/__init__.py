"""bigkernel: fused kernels that make training Transformers faster.

Ops, optimizers and transforms need torch and NumPy alone. What needs more (bigkernel/extras.py) is
imported at first use, so that `import bigkernel` stays quick and works without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from bigkernel import (
    _command,  # noqa: F401  first: see there
    ops,
    optim,
    transforms,
)
from bigkernel.backend import cpu_isas, explain, use_backend, use_cpu_isa
from bigkernel.ops.attention.sdpa import scaled_dot_product_attention

if TYPE_CHECKING:
    from bigkernel import data, recipes
    from bigkernel.integrations import accelerate, patch, restore, unpatch
    from bigkernel.trainer import (
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        Trainer,
        TrainingArguments,
    )

__version__ = "0.1.0"

__all__ = [
    "Seq2SeqTrainer",
    "Seq2SeqTrainingArguments",
    "Trainer",
    "TrainingArguments",
    "__version__",
    "accelerate",
    "cpu_isas",
    "data",
    "explain",
    "ops",
    "optim",
    "patch",
    "recipes",
    "restore",
    "scaled_dot_product_attention",
    "transforms",
    "unpatch",
    "use_backend",
    "use_cpu_isa",
]

_LAZY = {
    "Seq2SeqTrainer": "bigkernel.trainer",
    "Seq2SeqTrainingArguments": "bigkernel.trainer",
    "Trainer": "bigkernel.trainer",
    "TrainingArguments": "bigkernel.trainer",
    "accelerate": "bigkernel.integrations",
    "patch": "bigkernel.integrations",
    "restore": "bigkernel.integrations",
    "unpatch": "bigkernel.integrations",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("data", "recipes"):
        return importlib.import_module(f"bigkernel.{name}")
    raise AttributeError(f"module 'bigkernel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
