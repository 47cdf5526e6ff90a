"""Augmentation recipes, named or from a YAML file, as chains of bigkernel.transforms."""

import inspect
from collections.abc import Sequence
from typing import Any

from bigkernel import transforms
from bigkernel.recipes import presets
from bigkernel.recipes.errors import UsageError, option
from bigkernel.recipes.settings import read_document, user_path
from bigkernel.transforms import Compose, InterpolationMode, Transform

Recipe = list[dict[str, dict[str, Any]]]


def read_recipe(spec: str | Sequence[Any]) -> Recipe:
    """The steps of a named recipe, of a YAML file or of a list from a config file."""
    if not isinstance(spec, str):
        return _checked(spec, "augment")
    if spec in presets.AUGMENTATIONS:
        named: Recipe = presets.pick("augmentation", presets.AUGMENTATIONS, spec)
        return named
    path = user_path(spec)
    if not path.is_file():
        raise UsageError(
            f"{option('augment', spec)}: neither a recipe nor a file. "
            f"Recipes: {', '.join(presets.AUGMENTATIONS)}."
        )
    return _checked(read_document(path), str(path))


def _checked(content: Any, where: str) -> Recipe:
    example = "- RandomRotation: {degrees: 10}"
    if not isinstance(content, list):
        raise UsageError(f"{where} must be a list of transforms, such as `{example}`.")
    steps: Recipe = []
    for number, step in enumerate(content, 1):
        if isinstance(step, str):
            step = {step: {}}
        if not isinstance(step, dict) or len(step) != 1:
            raise UsageError(f"{where}, step {number} must be one transform, such as `{example}`.")
        ((name, arguments),) = step.items()
        arguments = arguments or {}
        if not isinstance(arguments, dict):
            raise UsageError(f"{where}, step {number} ({name}): arguments must be `name: value`.")
        steps.append({str(name): arguments})
    return steps


def build(recipe: Recipe, image_size: int, where: str = "augment") -> list[Transform]:
    """The transforms of a recipe; the argument "size" stands for the model's image size."""
    chain: list[Transform] = []
    for number, step in enumerate(recipe, 1):
        ((name, arguments),) = step.items()
        place = f"{where}, step {number} ({name})"
        cls = getattr(transforms, name, None)
        if not (inspect.isclass(cls) and issubclass(cls, Transform)) or cls in (Transform, Compose):
            raise UsageError(f"{place}: bigkernel.transforms has no such transform.")
        known = inspect.signature(cls).parameters
        unknown = [argument for argument in arguments if argument not in known]
        if unknown:
            raise UsageError(
                f"{place} has no argument {unknown[0]!r}. It takes: {', '.join(known)}."
            )
        try:
            values = {key: _value(key, value, image_size) for key, value in arguments.items()}
            chain.append(cls(**values))
        except (TypeError, ValueError) as error:
            raise UsageError(f"{place}: {error}") from None
    return chain


def _value(name: str, value: Any, image_size: int) -> Any:
    if name == "size" and value == "size":
        return image_size
    if name == "interpolation":
        return InterpolationMode(value)
    return value


def pipelines(
    recipe: Recipe, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[Compose, Compose]:
    """(training, evaluation): both end in normalised floats [N, C, image_size, image_size].

    The shorter side is brought to size and the middle kept, as is usual for photographs; for
    images that have the size already this does nothing.
    """

    def finish() -> list[Transform]:
        return [
            transforms.Resize(image_size),
            transforms.CenterCrop(image_size),
            transforms.Normalize(mean=list(mean), std=list(std)),
        ]

    chains = Compose([*build(recipe, image_size), *finish()]), Compose(finish())
    for chain in chains:
        # Said, not guessed: an image 3 pixels high or wide could be read either way.
        chain.layout = "channels_first"
    return chains
