"""From data to a trained model, in one call: what the command line calls and bench measures.

:func:`train_text` and :func:`train_images` read the data, build the tokenizer and the model, train,
measure on the part held back and leave a run folder: model, checkpoints, figures, pictures and a
model card. :func:`load` opens such a folder again.

One run is one process, on a machine with several GPUs on one of them, or all the processes that
torchrun has started.
"""

import importlib
from typing import TYPE_CHECKING, Any

from bigkernel.extras import needs

if TYPE_CHECKING:
    from bigkernel.recipes.errors import Failure, UsageError
    from bigkernel.recipes.images import ImageRun
    from bigkernel.recipes.run import load, train_images, train_text
    from bigkernel.recipes.settings import ImageSettings, TextSettings
    from bigkernel.recipes.text import TextRun

__all__ = [
    "Failure",
    "ImageRun",
    "ImageSettings",
    "TextRun",
    "TextSettings",
    "UsageError",
    "load",
    "train_images",
    "train_text",
]

# By the module that has them. Imported at first use: the command line looks settings up for its
# help, and transformers takes seconds.
_LAZY = {
    "Failure": "errors",
    "ImageRun": "images",
    "ImageSettings": "settings",
    "TextRun": "text",
    "TextSettings": "settings",
    "UsageError": "errors",
    "load": "run",
    "train_images": "run",
    "train_text": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'bigkernel.recipes' has no attribute {name!r}")
    with needs("train", "bigkernel.recipes"):
        return getattr(importlib.import_module(f"bigkernel.recipes.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
