"""bigkernel's Trainer against transformers': tokens and images per second.

Both train the model of `bigkernel train text|images --preset demo` on the same data, with the same
clipping and learning rate; transformers' with torch's SDPA and its own choice of AdamW. Images are
augmented by the demo's recipe: ours on the batch, for transformers by torchvision v2, image by
image in the collator. A LLaMA of 16.9M parameters is trained on random tokens, 4 x 512, in the
precision that each Trainer takes by itself, in float32 and in bfloat16 (autocast). It is also
trained, in float32, on documents of 64 to 512 tokens: packed by our Trainer, padded by it and by
transformers'; the tokens of the documents count, those of the padding do not. A run is some steps
of training, timed from the end of the first ones on.
"""

import contextlib
import copy
import importlib
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from bigkernel import _library, precision
from bigkernel.bench.case import OURS, REFERENCE, Bar, Case, Ready, on_torch
from bigkernel.data import PaddingCollator
from bigkernel.measure import Run
from bigkernel.recipes import images, models, presets, text
from bigkernel.recipes.errors import quietly
from bigkernel.recipes.settings import ImageSettings, TextSettings, gather
from bigkernel.recipes.training import Task
from bigkernel.trainer import Trainer, TrainingArguments

THEIRS = "transformers Trainer"
PADDED = "bigkernel, padded"
WARM, STEPS = 3, 15
LLAMA_STEPS, ROWS, LENGTH = 4, 4, 512
DOCUMENTS, SHORTEST = 8, 64  # in a batch; tokens


def cases(small: bool = False) -> list[Case]:
    """The table; ``small`` times one step, and the LLaMA is a small one."""
    recipe = presets.TEXT_RECIPES["demo"]
    demo = 1 if small else STEPS
    # What this machine can gain by itself: bfloat16, or no more than the rest of a step.
    default = 2.0 if precision.bf16_is_faster(torch.device("cpu")) else 1.3
    table: list[tuple[str, Callable[[int], Ready], str, int, int, float]] = [
        (
            "demo text, LLaMA",
            build_text,
            "tokens/s",
            recipe["batch_size"] * recipe["max_length"],
            demo,
            1.0,
        ),
        (
            "demo images, ViT",
            build_images,
            "images/s",
            presets.IMAGE_RECIPES["demo"]["batch_size"],
            demo,
            1.0,
        ),
    ]
    llama, rows, length = (1, 2, 32) if small else (LLAMA_STEPS, ROWS, LENGTH)
    precisions: list[tuple[str, dict[str, Any], float]] = [
        ("as it comes", {}, default),
        ("float32", {"bf16": False}, 1.3),
        ("bfloat16", {"bf16": True}, 1.5),
    ]
    for name, options, bar in precisions:
        build = partial(build_llama, options, rows, length, small)
        table.append((f"LLaMA 16.9M, {name}", build, "tokens/s", rows * length, llama, bar))
    count, shortest = (2, 4) if small else (DOCUMENTS, SHORTEST)
    lengths = _lengths(count * (WARM + llama), shortest, length)
    wide = _library.native is not None and _library.native.cpu_isa().startswith(("avx512", "amx"))
    packed = Case(
        "train",
        f"LLaMA 16.9M, float32, documents of {shortest} to {length} tokens, packed",
        (OURS, REFERENCE, PADDED, THEIRS),
        partial(build_packed, lengths, count, small, llama),
        (Bar(2.2 if wide else 2.0, THEIRS),),
        "tokens/s",
        sum(lengths[count * WARM :]),
    )
    return [
        *(
            Case(
                "train",
                name,
                (OURS, REFERENCE, THEIRS),
                partial(build, steps),
                (Bar(bar, THEIRS),),
                unit,
                items * steps,
            )
            for name, build, unit, items, steps, bar in table
        ),
        packed,
    ]


def _lengths(count: int, shortest: int, longest: int) -> list[int]:
    """Lengths of documents, as many from 64 to 128 as from 256 to 512: text has a long tail."""
    draw = torch.Generator().manual_seed(0)
    places = torch.rand(count, generator=draw, dtype=torch.float64)
    drawn: list[int] = (shortest * (longest / shortest) ** places).round().long().tolist()
    return drawn


@dataclass
class _Training:
    """What both Trainers are given.

    their_collate: theirs, where it is another. packing: ours packs, and pads with theirs beside.
    """

    model: Any
    data: Any
    options: dict[str, Any]
    collate: Callable[..., Any] | None = None
    their_collate: Callable[..., Any] | None = None
    ours: dict[str, Any] = field(default_factory=dict)
    packing: bool = False


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
    return _ready(_training(task, task.collate), steps, {}, op="attention", alike=True)


def build_llama(options: dict[str, Any], rows: int, length: int, small: bool, steps: int) -> Ready:
    """A LLaMA of 16.9M parameters, or a `small` one, over random tokens."""
    model = _llama(small)
    draw = torch.Generator().manual_seed(0)
    size = rows * (WARM + steps), length
    tokens = torch.randint(0, model.config.vocab_size, size, generator=draw)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    options = {**options, "per_device_train_batch_size": rows}
    return _ready(_Training(model, data, options), steps, {}, op="attention", alike=True)


def build_packed(lengths: list[int], count: int, small: bool, steps: int) -> Ready:
    """The same model over random documents of these lengths, so many in a batch."""
    model = _llama(small)
    draw = torch.Generator().manual_seed(0)
    size = model.config.vocab_size
    data = [{"input_ids": torch.randint(0, size, (n,), generator=draw)} for n in lengths]
    options = {
        "bf16": False,
        "per_device_train_batch_size": count,
        "train_sampling_strategy": "sequential",
    }
    training = _Training(model, data, options, None, PaddingCollator(), packing=True)
    return _ready(training, steps, {}, op="attention", alike=True)


def _llama(small: bool) -> Any:
    width, layers = (64, 1) if small else (384, 6)
    config = transformers.LlamaConfig(
        vocab_size=256 if small else 8192,
        hidden_size=width,
        intermediate_size=128 if small else 1024,
        num_hidden_layers=layers,
        num_attention_heads=6 if not small else 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


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
    return _ready(_training(task, collate), steps, skipped, op="augment", alike=False)


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
    training: _Training,
    steps: int,
    skipped: dict[str, str],
    op: str,
    alike: bool,
) -> Ready:
    losses: dict[str, list[float]] = {}

    def arguments(folder: str) -> dict[str, Any]:
        own = {"output_dir": folder, "max_steps": WARM + steps}
        return {**_ARGUMENTS, **training.options, **own}

    def ours(name: str, packing: bool = training.packing) -> float:
        padded = training.packing and not packing
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=copy.deepcopy(training.model),
                args=TrainingArguments(**arguments(folder), announce=False, packing=packing),
                train_dataset=training.data,
                data_collator=training.their_collate if padded else training.collate,
                **training.ours,
            )
            return _timed(name, trainer)

    def theirs() -> float:
        with tempfile.TemporaryDirectory() as folder:
            trainer = transformers.Trainer(
                model=copy.deepcopy(training.model),
                args=transformers.TrainingArguments(**arguments(folder)),
                train_dataset=training.data,
                data_collator=training.their_collate,
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
    if training.packing:
        runs[PADDED] = partial(ours, PADDED, packing=False)
    if THEIRS not in skipped:
        runs[THEIRS] = theirs

    def check(runs: dict[str, Run]) -> str:
        for run in runs.values():
            run()
        compared = [name for name in runs if name != OURS] if alike else [REFERENCE]
        for name in compared:
            for mine, other in zip(losses[OURS], losses[name], strict=True):
                assert abs(mine - other) < 2e-3 * abs(other), f"loss {mine} beside {name}'s {other}"
        return f"the loss of every step, to 0.2%, beside {' and '.join(compared)}"

    sample: Tensor = next(iter(training.model.parameters())).detach()
    config = training.model.config
    dim = config.hidden_size // config.num_attention_heads
    tensors = (sample[None, None, :, :dim],) if op == "attention" else (sample,)
    return Ready(runs, check, op, tensors, skipped=skipped)


def _training(task: Task, their_collate: Callable[..., Any] | None) -> _Training:
    settings = task.settings
    options = {
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.lr,
        "weight_decay": settings.weight_decay,
        "adam_beta2": settings.beta2,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
    }
    return _Training(
        task.model, task.train, options, task.collate, their_collate, task.trainer_options
    )


_ARGUMENTS = {
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
}
