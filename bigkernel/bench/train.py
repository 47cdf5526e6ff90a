"""bigkernel's Trainer against transformers' on the demo recipes: tokens and images per second.

Both train the model of `bigkernel train text|images --preset demo` on the same data, with the same
clipping and learning rate; transformers' with torch's SDPA and its own choice of AdamW. Images are
augmented by the demo's recipe: ours on the batch, for transformers by torchvision v2, image by
image in the collator. A run is some steps of training, timed from the end of the first ones on.
"""

import contextlib
import copy
import importlib
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from bigkernel.bench.case import OURS, REFERENCE, Bar, Case, Ready, on_torch
from bigkernel.bench.measure import Run
from bigkernel.recipes import images, models, presets, text
from bigkernel.recipes.errors import quietly
from bigkernel.recipes.settings import ImageSettings, TextSettings, gather
from bigkernel.recipes.training import Task
from bigkernel.trainer import Trainer, TrainingArguments

THEIRS = "transformers Trainer"
WARM, STEPS = 3, 15


def cases(small: bool = False) -> list[Case]:
    """The table; ``small`` times one step."""
    steps = 1 if small else STEPS
    recipe = presets.TEXT_RECIPES["demo"]
    table: list[tuple[str, Callable[[int], Ready], str, int]] = [
        ("demo text, LLaMA", build_text, "tokens/s", recipe["batch_size"] * recipe["max_length"]),
        ("demo images, ViT", build_images, "images/s", presets.IMAGE_RECIPES["demo"]["batch_size"]),
    ]
    return [
        Case(
            "train",
            name,
            (OURS, REFERENCE, THEIRS),
            partial(build, steps),
            (Bar(1.0, THEIRS),),
            unit,
            items * steps,
        )
        for name, build, unit, items in table
    ]


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the end of step WARM on, and the losses."""

    def __init__(self) -> None:
        self.begin = self.seconds = 0.0
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.begin
        if state.global_step == WARM:
            self.begin = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


def build_text(steps: int) -> Ready:
    """The default text model, with and without bigkernel."""
    settings = gather("train text", {})
    assert isinstance(settings, TextSettings)
    task = _prepared(lambda run: text.prepare(settings, run, {}))
    return _ready(task, steps, task.collate, {}, op="attention", alike=True)


def build_images(steps: int) -> Ready:
    """The default image model, with and without bigkernel."""
    settings = gather("train images", {})
    assert isinstance(settings, ImageSettings)
    task = _prepared(lambda run: images.prepare(settings, run, {}))
    skipped = {}
    collate: Callable[..., Any] | None = None
    try:
        collate = _torchvision(task)
    except ImportError as error:
        skipped[THEIRS] = str(error)
    return _ready(task, steps, collate, skipped, op="augment", alike=False)


def _prepared(prepare: Callable[[Path], Task]) -> Task:
    with tempfile.TemporaryDirectory() as folder, quietly(), models.quiet_transformers():
        return prepare(Path(folder) / "run")


def _torchvision(task: Task) -> Callable[..., Any]:
    """The demo's augmentation image by image, before the batch is made."""
    v2 = importlib.import_module("torchvision.transforms.v2")
    (recipe,) = presets.AUGMENTATIONS["gentle"]
    options = {**recipe["RandomAffine"], "interpolation": v2.InterpolationMode.BILINEAR}
    affine = v2.RandomAffine(**options)

    def collate(samples: Any) -> Any:
        batch = task.collate(samples)
        pixels: Tensor = batch["pixel_values"]
        pixels = torch.stack([affine(image) for image in pixels]).float() / 255
        return {**batch, "pixel_values": (pixels - images.MEAN) / images.STD}

    return collate


def _ready(
    task: Task,
    steps: int,
    their_collate: Callable[..., Any] | None,
    skipped: dict[str, str],
    op: str,
    alike: bool,
) -> Ready:
    losses: dict[str, list[float]] = {}

    def ours(name: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=copy.deepcopy(task.model),
                args=TrainingArguments(**_arguments(task, steps, folder), announce=False),
                train_dataset=task.train,
                data_collator=task.collate,
                **task.trainer_options,
            )
            return _timed(name, trainer)

    def theirs() -> float:
        with tempfile.TemporaryDirectory() as folder:
            trainer = transformers.Trainer(
                model=copy.deepcopy(task.model),
                args=transformers.TrainingArguments(**_arguments(task, steps, folder)),
                train_dataset=task.train,
                data_collator=their_collate,
            )
            return _timed(THEIRS, trainer)

    def _timed(name: str, trainer: transformers.Trainer) -> float:
        clock = _Clock()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        with contextlib.redirect_stdout(io.StringIO()), models.quiet_transformers():
            trainer.train()
        losses[name] = clock.losses
        return clock.seconds

    runs: dict[str, Run] = {
        OURS: partial(ours, OURS),
        REFERENCE: on_torch(partial(ours, REFERENCE)),
    }
    if THEIRS not in skipped:
        runs[THEIRS] = theirs

    def check(runs: dict[str, Run]) -> str:
        for run in runs.values():
            run()
        compared = [REFERENCE, THEIRS] if alike else [REFERENCE]
        for name in compared:
            for mine, other in zip(losses[OURS], losses[name], strict=True):
                assert abs(mine - other) < 2e-3 * abs(other), f"loss {mine} beside {name}'s {other}"
        return f"the loss of every step, to 0.2%, beside {' and '.join(compared)}"

    sample: Tensor = next(iter(task.model.parameters())).detach()
    tensors = (sample[None, None],) if op == "attention" else (sample,)
    return Ready(runs, check, op, tensors, skipped=skipped)


def _arguments(task: Task, steps: int, folder: str) -> dict[str, Any]:
    settings = task.settings
    return {
        "output_dir": folder,
        "max_steps": WARM + steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.lr,
        "weight_decay": settings.weight_decay,
        "adam_beta2": settings.beta2,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }
