"""Everything a training run is told: defaults, presets, a config file and options, in that order.

``config.yaml`` in a run folder is the outcome, and as ``config`` it repeats the run.
"""

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bigkernel.files import MAX_PIXELS, is_regular
from bigkernel.recipes import presets
from bigkernel.recipes.errors import UsageError, option

OPTIMIZERS = ("adamw", "adam", "sgd", "muon")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PARALLEL = ("ddp", "fsdp2")
# What a config file may hold besides settings: which command it is for, and facts about the run.
COMMAND, RECORD = "command", "record"
Model = str | dict[str, Any]
Augment = str | list[Any]


@dataclass
class Settings:
    """What both kinds of training share. None means: decided from the data or the device.

    Attributes:
        preset: a recipe of ``bigkernel.recipes.presets``, which the settings below change.
        data: a file or folder; None is the data that every install has.
        model: a model preset, a ``config.json`` or YAML file, or its content.
        init_from: a trained model to start from, a folder or a hub name.
        out: the run folder.
        epochs: passes over the training part.
        max_steps: optimizer steps; counts where both are given.
        optim: ``"adamw"``, ``"adam"``, ``"sgd"`` or ``"muon"`` (which takes AdamW's lr).
        lr: the highest learning rate; a cosine falls from it.
        warmup: the share of the steps in which it rises.
        min_lr: where the cosine ends, as a share of ``lr``.
        weight_decay: decoupled, as AdamW's.
        beta2: of Adam and AdamW.
        max_grad_norm: 0 does not clip.
        batch_size: sequences or images in a batch, of all processes together.
        accumulate: batches whose gradients make a step.
        validation: the share of the data that is held back.
        seed: of weights, order, dropout and augmentation.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        parallel: how several processes (torchrun) train a model: ``"ddp"``, each with all of it, or
            ``"fsdp2"``, each with a part of weights, gradients and optimizer.
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        threads: CPU threads of the process; None leaves them.
        save_steps: steps between checkpoints.
        log_steps: steps between logged losses.
    """

    preset: str = "demo"
    data: str | None = None
    model: Model | None = None
    init_from: str | None = None
    out: str | None = None
    epochs: float | None = None
    max_steps: int | None = None
    optim: str = "adamw"
    lr: float = 1e-3
    warmup: float = 0.05
    min_lr: float = 0.0
    weight_decay: float = 0.1
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    validation: float = 0.1
    seed: int = 0
    device: str = "auto"
    parallel: str = "ddp"
    dtype: str = "auto"
    threads: int | None = None
    save_steps: int | None = None
    log_steps: int | None = None

    def check(self) -> None:
        """UsageError for the first value out of range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            small = not isinstance(value, int) or field.name == "seed" or value < 2**31
            self._range(field.name, small, "below 2**31")
        self._range("lr", 0 < self.lr < math.inf, "above 0")
        self._range("warmup", 0 <= self.warmup < 1, "a share of the steps in [0, 1)")
        self._range("min_lr", 0 <= self.min_lr <= 1, f"a share of {option('lr')} in [0, 1]")
        self._range("weight_decay", self.weight_decay >= 0, "0 or more")
        self._range("beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        self._range("max_grad_norm", self.max_grad_norm >= 0, "0 or more (0 does not clip)")
        self._range("batch_size", self.batch_size >= 1, "1 or more")
        self._range("accumulate", self.accumulate >= 1, "1 or more")
        self._range("validation", 0 < self.validation < 1, "a share of the data in (0, 1)")
        self._range("seed", 0 <= self.seed < 2**32, "in [0, 2**32)")
        for name in ("epochs", "max_steps", "threads", "save_steps", "log_steps"):
            value = getattr(self, name)
            self._range(name, value is None or 0 < value < math.inf, "above 0")
        self._range("optim", self.optim in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        self._range("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self._range("parallel", self.parallel in PARALLEL, f"one of {', '.join(PARALLEL)}")
        if self.model is not None and self.init_from is not None:
            raise UsageError(
                f"{option('model')} builds a new model and {option('init_from')} loads one: give "
                "one of the two."
            )

    def _range(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise UsageError(f"{option(name)} must be {expected}, got {getattr(self, name)!r}.")


@dataclass
class TextSettings(Settings):
    """Settings of a language model.

    Attributes:
        tokenizer: ``"bytes"``, ``"bpe"``, ``"wordpiece"``, or a folder or hub name.
        vocab_size: the most tokens that bpe or wordpiece may make.
        max_length: tokens in a sequence.
        prompt: what the sample at the end begins with.
    """

    tokenizer: str | None = None
    vocab_size: int | None = None
    max_length: int = 512
    prompt: str | None = None

    def check(self) -> None:
        super().check()
        self._range("max_length", self.max_length >= 2, "2 tokens or more")
        self._range("vocab_size", self.vocab_size is None or self.vocab_size > 0, "above 0")


@dataclass
class ImageSettings(Settings):
    """Settings of an image classifier.

    Attributes:
        augment: an augmentation recipe's name, a YAML file with one, or its steps.
        image_size: pixels a side into the model.
        max_pixels: images of more are left out, undecoded.
    """

    validation: float = 0.2
    augment: Augment | None = None
    image_size: int | None = None
    max_pixels: int = MAX_PIXELS

    def check(self) -> None:
        super().check()
        self._range("max_pixels", self.max_pixels > 0, "above 0")
        self._range("image_size", self.image_size is None or self.image_size > 0, "above 0")


COMMANDS: dict[str, type[Settings]] = {"train text": TextSettings, "train images": ImageSettings}


def user_path(given: str | os.PathLike[str]) -> Path:
    """A path as typed, with ~ for the home folder (which a shell leaves in ``--out=~/x``)."""
    try:
        return Path(given).expanduser()
    except RuntimeError:  # there is no such user
        raise UsageError(f"{given}: there is no home folder of that name.") from None


def gather(
    command: str,
    options: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    sample: str | None = None,
) -> Settings:
    """Settings from defaults, preset, config file and options; each later one wins.

    Raises:
        UsageError: a setting that there is not, or of a type or value that it cannot have.
    """
    kind = COMMANDS[command]
    config = dict(config or {})
    given = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in options.items()
        if value is not None
    }
    given = _checked(given, command, "", option)
    recipes = presets.TEXT_RECIPES if kind is TextSettings else presets.IMAGE_RECIPES
    fine_tunes = (given.get("init_from") or config.get("init_from")) is not None
    usual = "finetune" if fine_tunes else "demo"
    name = given.get("preset", config.get("preset", usual))
    try:
        recipe = presets.pick("preset", recipes, str(name))
        extra = presets.pick("sample", presets.TEXT_SAMPLES, sample) if sample else {}
    except ValueError as error:
        raise UsageError(str(error)) from None
    if sample and "data" in given:
        raise UsageError(
            f"{option('sample')} and {option('data')} both name the corpus: give one of the two."
        )
    # A preset or sample named on the command line is stronger than the file, as every option is.
    named = {**(recipe if "preset" in given else {}), **extra}
    below = recipe if "preset" not in given else {}
    merged: dict[str, Any] = {"preset": str(name)}
    for layer in (below, config, named, given):
        merged = _over(merged, layer)
    settings = kind(**merged)
    settings.check()
    return settings


def _over(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """``high`` over ``low``, where naming one of two alternatives takes the other one back."""
    merged = {**low, **high}
    for one, other in (("epochs", "max_steps"), ("init_from", "model")):
        for name, rival in ((one, other), (other, one)):
            if high.get(name) is not None and high.get(rival) is None:
                merged[rival] = None
    return merged


def read_config(path: Path, command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, record) of a YAML config file for ``command``, names and types checked."""
    content = _read_mapping(path)
    record = content.pop(RECORD, None) or {}
    if not isinstance(record, dict):
        raise UsageError(f"{path}: {RECORD} must hold facts as `name: value`, got {record!r}.")
    meant_for = content.pop(COMMAND, command)
    if meant_for != command:
        raise UsageError(f"{path} is for `bigkernel {meant_for}`, not for `bigkernel {command}`.")
    return _checked(content, command, str(path), str), record


def _checked(
    given: Mapping[str, Any], command: str, where: str, called: Callable[[str], str]
) -> dict[str, Any]:
    """Settings as given for ``command``, if there are such and each has a type that it may have."""
    hints = typing.get_type_hints(COMMANDS[command])
    checked = {}
    for name, value in given.items():
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(hints)}."
            has = f"{where} has an" if where else "there is an"
            raise UsageError(f"{has} unknown setting {name!r}.{hint}")
        place = f"{where}: {called(name)}" if where else called(name)
        checked[name] = _typed(place, value, hints[name])
    return checked


def command_of(run: Path) -> str:
    """Which command made the run folder ``run``; UsageError if none did."""
    path = run / "config.yaml"
    if not run.is_dir():
        raise UsageError(f"{run} is not a run folder: there is no such folder.")
    if not path.is_file():
        raise UsageError(
            f"{run} is not a run folder: it has no config.yaml. "
            "Name the folder that `bigkernel train ... --out` wrote."
        )
    command = _read_mapping(path).get(COMMAND)
    if command not in COMMANDS:
        raise UsageError(f"{path} does not say which command it is for (command: train text).")
    return str(command)


# No settings are so long; what is, or unfolds to more, was made to fill the memory.
_MOST_BYTES, _MOST_VALUES, _DEEPEST = 1 << 20, 100_000, 64


def read_document(path: Path) -> Any:
    """What a YAML or JSON file holds; UsageError naming the file where it cannot be read.

    Only regular files of 1 MiB at most, and 100,000 values with each alias written out, 64 deep.
    """
    try:
        if not is_regular(path) and not path.is_dir():
            raise UsageError(f"{path} is no regular file; write the settings into one.")
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} has {path.stat().st_size:,} bytes: too long for settings.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such config file.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a YAML file: it is not UTF-8 text.") from None
    form = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        if form == "JSON":
            return json.loads(text)
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            # Before anything is built of it: merged mappings are copied while they are built.
            if _unfolded(node, {}) > _MOST_VALUES:
                raise UsageError(
                    f"{path}: its aliases unfold to more than {_MOST_VALUES:,} values."
                )
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except UsageError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UsageError(f"{path}{where} is not valid YAML: {problem}.") from None
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply for settings.") from None
    except (ValueError, OverflowError) as error:  # a date that is none, a number too long
        raise UsageError(f"{path} is not valid {form}: {str(error).split(';')[0]}.") from None


def _unfolded(node: yaml.Node, known: dict[int, int], depth: int = 0) -> int:
    """How many values a node stands for with each alias in it written out."""
    if depth > _DEEPEST:
        raise RecursionError
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = _MOST_VALUES + 1  # what it counts for inside itself, where it has no end
    below: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        below = node.value
    elif isinstance(node, yaml.MappingNode):
        below = [one for pair in node.value for one in pair]
    known[id(node)] = 1 + sum(_unfolded(one, known, depth + 1) for one in below)
    return known[id(node)]


def _read_mapping(path: Path) -> dict[str, Any]:
    content = read_document(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(
            f"{path} must hold settings as `name: value`, got a {type(content).__name__}."
        )
    return content


def _typed(place: str, value: Any, hint: Any) -> Any:
    """``value`` if it has one of the types of ``hint``; an int will do where a float is meant."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    allowed = [typing.get_origin(t) or t for t in (typing.get_args(hint) if union else (hint,))]
    if float in allowed and not isinstance(value, bool) and isinstance(value, (int, str)):
        try:  # YAML 1.1 reads 3e-3 as a string
            return float(value)
        except ValueError:
            pass
    if type(value) in allowed:
        return value
    names = ["nothing" if t is type(None) else t.__name__ for t in allowed]
    shown = value if isinstance(value, (str, int, float, bool)) else type(value).__name__
    raise UsageError(f"{place} must be {' or '.join(names)}, got {str(shown)[:80]!r}.")


def dump(settings: Settings, command: str, record: Mapping[str, Any]) -> str:
    """``config.yaml``: the settings that repeat a run, and what is worth knowing about it."""
    content = {
        COMMAND: command,
        **{f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)},
        RECORD: dict(record),
    }
    head = f"# Repeat this run: bigkernel {command} --config THIS_FILE --out ANOTHER_FOLDER\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
