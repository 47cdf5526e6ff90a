"""What the extras of the package bring, `pip install 'bigkernel[train]'`, and what is said without.

bigkernel itself needs torch and NumPy. ``pyproject.toml`` has the versions.
"""

import contextlib
from collections.abc import Iterator

_TRAIN = (
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "safetensors",
    "accelerate",
    "torchmetrics",
    "yaml",
    "matplotlib",
)
# The modules of each extra that have a part of bigkernel to themselves.
MODULES: dict[str, tuple[str, ...]] = {
    "train": _TRAIN,
    "cli": (*_TRAIN, "typer", "rich"),
    "images": ("PIL", "sklearn"),
}


class MissingExtraError(ImportError):
    """A part of bigkernel was asked for, and what it needs is not installed."""


@contextlib.contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Inside, a missing module of ``extra`` gives one sentence with the command that installs it.

    Args:
        extra: one of ``MODULES``.
        what: the part of bigkernel that needs it.

    Raises:
        MissingExtraError: for a module of the extra; another missing module passes as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in MODULES[extra]:
            raise
        raise MissingExtraError(
            f"{what} needs {name}, which is not installed: pip install 'bigkernel[{extra}]'",
            name=name,
        ) from None
