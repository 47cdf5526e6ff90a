"""From data to a trained model: what is asked for, checked, trained, and opened again later."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from bigkernel.recipes import augmentation, device, images, models, presets, ranks, run_folder, text
from bigkernel.recipes.errors import UsageError, option, quietly
from bigkernel.recipes.progress import TrainingProgress
from bigkernel.recipes.settings import (
    COMMANDS,
    ImageSettings,
    Settings,
    TextSettings,
    command_of,
    gather,
    read_config,
    user_path,
)
from bigkernel.recipes.training import train

# What may differ when a run goes on: nothing that changes a step, only where it runs and ends.
FREE_ON_RESUME = {
    "out", "preset", "device", "parallel", "threads", "epochs", "max_steps", "save_steps",
}  # fmt: skip
PathLike = str | os.PathLike[str]


def train_text(
    *,
    out: PathLike | None = None,
    config: PathLike | None = None,
    sample: str | None = None,
    resume: PathLike | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
    progress: type[TrainingProgress] = TrainingProgress,
    **settings: Any,
) -> text.TextRun:
    """Train a language model and leave it in a run folder.

    Without settings it is a LLaMA of 0.8M parameters over the bytes of Python's own help texts,
    which takes a minute on two cores and needs no network.

    Args:
        out: the run folder; None is a new one under ``runs/``.
        config: a YAML file of settings, such as the ``config.yaml`` of a run. Settings given here
            are stronger than the file, and the file is stronger than a preset.
        sample: a text that ships with the package, in place of ``data``: ``"zh"``.
        resume: ``"auto"``, or a run or checkpoint folder, to continue; a run that has not begun
            starts. On the CPU, with as many threads, its losses are those of an uninterrupted run.
        force: replace the run that ``out`` holds.
        trust_remote_code: run Python code that a model or tokenizer folder brings.
        quiet: say nothing of how the run goes on.
        progress: the class that follows the training and says how it goes.
        **settings: the fields of :class:`TextSettings`.

    Returns:
        the run, with its model in evaluation mode and its figures on the part held back.

    Raises:
        UsageError: a setting or a file that cannot be used; nothing has been written.
        DataError: data that cannot be used; nothing has been trained.
        RunLockedError: another process writes to the folder.
        TrainingInterrupted: a signal; what was reached is saved.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    options: dict[str, Any] = {"out": out, "config": config, "sample": sample, "resume": resume}
    flags: dict[str, Any] = {"force": force, "trust_remote_code": trust_remote_code}
    with quietly() if quiet or not ranks.is_first() else contextlib.nullcontext():
        return cast(text.TextRun, _start(text.COMMAND, settings, progress, **options, **flags))


def train_images(
    *,
    out: PathLike | None = None,
    config: PathLike | None = None,
    resume: PathLike | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
    progress: type[TrainingProgress] = TrainingProgress,
    **settings: Any,
) -> images.ImageRun:
    """Train an image classifier and leave it in a run folder.

    Without settings it is a vision transformer of 0.14M parameters on scikit-learn's digits.

    Args:
        out: as :func:`train_text`'s, and so are the others.
        config: as there.
        resume: as there.
        force: as there.
        trust_remote_code: as there.
        quiet: as there.
        progress: as there.
        **settings: the fields of :class:`ImageSettings`.

    Returns:
        the run, with its model in evaluation mode and its figures on the part held back.

    Raises:
        UsageError: as :func:`train_text`, and the other exceptions too.
    """
    options: dict[str, Any] = {"out": out, "config": config, "resume": resume}
    flags: dict[str, Any] = {"force": force, "trust_remote_code": trust_remote_code}
    with quietly() if quiet or not ranks.is_first() else contextlib.nullcontext():
        return cast(images.ImageRun, _start(images.COMMAND, settings, progress, **options, **flags))


def load(
    run: PathLike,
    *,
    device: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> text.TextRun | images.ImageRun:
    """Open a run folder: its model with bigkernel's attention, in evaluation mode, on a device.

    Args:
        run: what :func:`train_text`, :func:`train_images` or the command line left.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        threads: CPU threads of the process; None takes as many as the run was told to.
        trust_remote_code: run Python code that the folder brings.

    Raises:
        UsageError: it is no run folder.
        Failure: it holds no finished model, or one that cannot be loaded.
    """
    folder = user_path(os.fspath(run))
    command = command_of(folder)
    values, recorded = read_config(folder / run_folder.CONFIG, command)
    _use(threads if threads is not None else values.get("threads"))
    where = _pick(device)
    chosen: Any = COMMANDS[command](**values)
    kind: Any = text if command == text.COMMAND else images
    with models.quiet_transformers():
        opened: text.TextRun | images.ImageRun = kind.load_run(
            folder, chosen, recorded, trust_remote_code
        )
        models.place(opened.model, where)
    return opened


# `load` has arguments of these names.
_use, _pick = device.use_threads, device.pick_device


def _start(
    command: str,
    options: Mapping[str, Any],
    progress: type[TrainingProgress],
    *,
    out: PathLike | None,
    config: PathLike | None,
    resume: PathLike | None,
    force: bool,
    trust_remote_code: bool,
    sample: str | None = None,
) -> text.TextRun | images.ImageRun:
    """Work out the settings, prepare the task, and train."""
    if force and resume is not None:
        raise UsageError(
            f"{option('force', True)} replaces a run and {option('resume')} continues it: give "
            "one of the two."
        )
    _check_text({**options, "out": out, "config": config, "resume": resume, "sample": sample})
    folder = None if out is None else user_path(out)
    resume = None if resume is None else str(user_path(resume))
    stored: dict[str, Any] = {}
    recorded: dict[str, Any] = {}
    going_on = False
    if resume is not None:
        folder = run_folder.run_of(resume, folder)
        going_on = run_folder.is_run(folder)
        if going_on:
            stored, recorded = read_config(folder / run_folder.CONFIG, command)
        elif folder.exists():
            run_folder.check_new(folder, force=False)
    # A file's code stays unrun: `trust_remote_code` is no setting.
    given = read_config(user_path(config), command)[0] if config is not None else stored
    # Where a file's run went to is not where its repetition goes.
    given = {name: value for name, value in given.items() if name != "out"}
    settings = _inline(gather(command, options, given, sample))
    if going_on:
        _check_same(settings, stored, cast(Path, folder))

    def allowed(run: Path) -> None:
        if not going_on:
            run_folder.check_new(run, force)
        elif not run_folder.is_run(run):
            raise UsageError(f"{run} is no longer a run: another process has removed its files.")

    _check_processes(settings, command)
    ranks.join(device.pick_device(settings.device))
    with (
        ranks.taken(command.split()[1], folder, allowed) as run,
        models.quiet_transformers(),
    ):
        settings.out = str(run)
        # Sums of matrix products depend on the thread count, so a resumed run keeps its own.
        same = recorded.get("threads") if settings.threads is None else None
        device.use_threads(settings.threads if same is None else int(same))
        device.pick_dtype(settings.dtype, device.pick_device(settings.device))
        if isinstance(settings, TextSettings):
            task = text.prepare(settings, run, recorded, trust_remote_code)
        else:
            task = images.prepare(cast(ImageSettings, settings), run, recorded, trust_remote_code)
        model, figures, record = train(task, resume if going_on else None, progress)
        if model is None:  # in pieces, and the first process has put them together
            kind: Any = text if isinstance(settings, TextSettings) else images
            model = kind.load_run(run, settings, record, trust_remote_code).model
        opened: text.TextRun | images.ImageRun = task.opened(model, record, figures)
    return opened


def _check_processes(settings: Settings, command: str) -> None:
    ranks.share(settings.batch_size, settings.accumulate)
    if settings.parallel == "fsdp2" and ranks.count() == 1:
        one = option("parallel", "ddp")
        raise UsageError(
            f"{option('parallel', 'fsdp2')} shares a model among processes, and this is the only "
            f"one: torchrun --nproc-per-node N -m bigkernel {command} starts N of them, and {one} "
            "goes on in one."
        )


def _check_text(options: Mapping[str, Any]) -> None:
    """UsageError for what a shell makes of an unset variable or of bytes that are no text."""
    for name, value in options.items():
        if value == "" and name != "prompt":  # as a path it would be this very folder
            raise UsageError(f"{option(name)} is empty: leave it out, or say what to use.")
        try:
            str(value).encode()
        except UnicodeEncodeError:  # neither config.yaml nor the card could hold it
            raise UsageError(f"{option(name)} is not UTF-8 text: {value!r}.") from None


def _inline(settings: Settings) -> Settings:
    """Settings that hold wherever they are read: files by content, folders by absolute path."""
    kind = presets.TEXT if isinstance(settings, TextSettings) else presets.IMAGES
    changes: dict[str, Any] = {}
    if settings.model is not None:
        changes["model"] = models.inline(kind, settings.model)
    if isinstance(settings, ImageSettings) and settings.augment is not None:
        named = settings.augment in presets.AUGMENTATIONS if _is_name(settings.augment) else False
        if not named:
            changes["augment"] = augmentation.read_recipe(settings.augment)
    for name in ("data", "init_from", "tokenizer"):
        value = getattr(settings, name, None)
        if value == "":  # of a config file
            raise UsageError(f"{option(name)} is empty: leave it out, or say what to use.")
        if value is not None and user_path(value).exists():
            changes[name] = str(user_path(value).resolve())
    return dataclasses.replace(settings, **changes)


def _is_name(augment: Any) -> bool:
    return isinstance(augment, str)


def _check_same(settings: Settings, stored: Mapping[str, Any], run: Path) -> None:
    """UsageError if a resumed run would not be the run that was begun."""
    before = type(settings)(**stored)
    for field in dataclasses.fields(settings):
        was, now = getattr(before, field.name), getattr(settings, field.name)
        if field.name not in FREE_ON_RESUME and was != now:
            name = option(field.name)
            raise UsageError(
                f"{run} was begun with {name} {was}, and {now} would make it another run. "
                f"Leave {name} out to continue, or start a new run with {option('init_from')}."
            )
