"""From data to a trained model, in one call: what the command line calls and bench measures.

:func:`train_text` and :func:`train_images` read the data, build the tokenizer and the model, train,
measure on the part held back and leave a run folder: model, checkpoints, figures, pictures and a
model card. :func:`load` opens such a folder again.

One run is one process. On a machine with several GPUs it takes one of them.
"""

from bigkernel.extras import needs

with needs("train", "bigkernel.recipes"):
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
