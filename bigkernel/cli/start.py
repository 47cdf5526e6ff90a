"""From the options of a training command to a run under way."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from bigkernel import presets
from bigkernel.cli import augmentation, device, images, models, run_folder, text
from bigkernel.cli.errors import UsageError, one_process
from bigkernel.cli.settings import (
    ImageSettings,
    Settings,
    TextSettings,
    gather,
    option,
    read_config,
    user_path,
)
from bigkernel.cli.train_loop import train

# What may differ when a run goes on: nothing that changes a step, only where it runs and ends.
FREE_ON_RESUME = {"out", "preset", "device", "threads", "epochs", "max_steps", "save_steps"}


def start(command: str, options: dict[str, Any]) -> None:
    """Work out the settings, prepare the task, and train."""
    one_process(command)
    force, resume = options.pop("force"), options.pop("resume")
    config, sample = options.pop("config"), options.pop("sample", None)
    # Of this command line alone: a file must not be able to allow it.
    trust_remote_code = options.pop("trust_remote_code")
    if force and resume is not None:
        raise UsageError(
            "--force replaces a run and --resume goes on with it: give one of the two."
        )
    _check_text({**options, "config": config, "resume": resume, "sample": sample})
    out_given = options.pop("out")
    out = None if out_given is None else user_path(out_given)
    resume = None if resume is None else str(user_path(resume))
    stored: dict[str, Any] = {}
    recorded: dict[str, Any] = {}
    going_on = False
    if resume is not None:
        out = run_folder.run_of(resume, out)
        going_on = run_folder.is_run(out)
        if going_on:
            stored, recorded = read_config(out / run_folder.CONFIG, command)
        elif out.exists():
            run_folder.check_new(out, force=False)
    given = read_config(user_path(config), command)[0] if config is not None else stored
    # Where a file's run went to is not where its repetition goes.
    given = {name: value for name, value in given.items() if name != "out"}
    settings = _inline(gather(command, options, given, sample))
    if going_on:
        _check_same(settings, stored, cast(Path, out))

    def allowed(run: Path) -> None:
        if not going_on:
            run_folder.check_new(run, force)
        elif not run_folder.is_run(run):
            raise UsageError(f"{run} is no longer a run: another process has removed its files.")

    with run_folder.taken(command.split()[1], out, allowed) as run:
        settings.out = str(run)
        # Sums of matrix products depend on the thread count, so a resumed run keeps its own.
        same = recorded.get("threads") if settings.threads is None else None
        device.use_threads(settings.threads if same is None else int(same))
        device.pick_dtype(settings.dtype, device.pick_device(settings.device))
        models.quiet_transformers()
        if isinstance(settings, TextSettings):
            task = text.prepare(settings, run, recorded, trust_remote_code)
        else:
            task = images.prepare(cast(ImageSettings, settings), run, recorded, trust_remote_code)
        train(task, resume if going_on else None)


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
                f"Leave {name} out to go on, or start a new run with --init-from."
            )
