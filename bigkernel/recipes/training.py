"""What training text and training images have in common, from settings to a finished folder."""

import math
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import bigkernel
from bigkernel.escape import printable
from bigkernel.integrations.sharding import whole_model
from bigkernel.interrupts import Stopped, drop_closed_streams
from bigkernel.optim import Adam
from bigkernel.recipes import ranks, report, run_folder
from bigkernel.recipes.device import pick_device, pick_dtype, show_only
from bigkernel.recipes.errors import Failure, is_quiet, option, say
from bigkernel.recipes.models import parameters
from bigkernel.recipes.progress import MetricsFile, TrainingProgress, human_time, read_metrics
from bigkernel.recipes.settings import Settings, dump
from bigkernel.trainer import MUON, Trainer, TrainingArguments

# Held-back data is looked at this many times during training, and checkpoints are written.
LOOKS = 4
# What the items of a dataset are called, by what is counted in them.
ITEMS = {"tokens": "sequences", "images": "images"}


@dataclass
class Task:
    """One training run, ready to start: everything that can be wrong with the input has been met.

    ``data`` are facts to record about the data, ``unit`` what is counted; ``look_at`` held-back
    items are measured while it trains, all of them at the end. ``finish`` is called with the
    trained model and the run folder; it writes samples and pictures and returns (figures, the
    sample for the card). ``opened`` gives the run, from the trained model, what was recorded and
    the figures.
    """

    command: str
    settings: Settings
    run: Path
    model: PreTrainedModel
    train: Any
    held_back: Any
    collate: Callable[..., Any]
    unit: str
    look_at: int
    data: dict[str, Any]
    save_inputs: Callable[[Path], None]
    finish: Callable[[PreTrainedModel, Path], tuple[dict[str, float], str]]
    card: Callable[[Path], dict[str, str]]
    opened: Callable[[PreTrainedModel, dict[str, Any], dict[str, float]], Any]
    trainer_options: dict[str, Any]


def train(
    task: Task, resume: str | None, progress: type[TrainingProgress] = TrainingProgress
) -> tuple[PreTrainedModel | None, dict[str, float], dict[str, Any]]:
    """Train and leave the run folder complete, together with the other processes of the run.

    Returns:
        (the whole model, or None where it is in pieces and another process has it; figures; what
        config.yaml records).
    """
    settings, run = task.settings, task.run
    arguments = _arguments(task)
    record = {
        "parameters": parameters(task.model),
        **task.data,
        "bigkernel": bigkernel.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    if ranks.count() > 1:
        record["processes"] = f"{ranks.count()} ({settings.parallel})"
    say(
        f"{record['parameters']:,} parameters, {len(task.train):,} training and "
        f"{len(task.held_back):,} held-back {ITEMS[task.unit]}"
    )
    looked_at = _few(task.held_back, task.look_at)
    if len(looked_at) < len(task.held_back):
        say(
            f"looking at {len(looked_at)} of the held-back {ITEMS[task.unit]} while training, at "
            "all of them in the end"
        )
    metrics = MetricsFile(run / run_folder.METRICS, kept=ranks.is_first())
    shown = (progress if ranks.is_first() else TrainingProgress)(metrics, task.unit)
    trainer = Trainer(
        model=task.model,
        args=arguments,
        train_dataset=task.train,
        eval_dataset=looked_at,
        data_collator=task.collate,
        callbacks=[shown],
        optimizer_cls_and_kwargs=_optimizer(settings),
        **task.trainer_options,
    )
    for shown_by_us in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown_by_us)
    if resume is None:
        config = dump(settings, task.command, record)
        # While there is still the run that this one replaces.
        trainer.check_saving()
        trainer.check_packing()
        if ranks.is_first():
            run_folder.clear(run)
            run_folder.write_text(run / run_folder.CONFIG, config)
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        shown.close()
    say(f"trained in {human_time(shown.seconds)}")
    took = {
        "steps": trainer.state.global_step,
        "time": human_time(shown.seconds) + (" since it was resumed" if resume else ""),
        "device": str(arguments.device),
    }
    model = whole_model(trainer.model) if settings.parallel == "fsdp2" else task.model
    figures: dict[str, float] = {}
    try:
        if ranks.is_first():
            assert model is not None
            history = read_metrics(metrics.path)
            figures = _leave(task, model, {**record, **took}, history, len(looked_at))
        figures = ranks.told(figures)
    except (KeyboardInterrupt, Stopped):
        drop_closed_streams()
        print(
            f"The training was done and is saved; bigkernel {task.command} --resume auto --out "
            f"{run} writes the rest.",
            file=sys.stderr,
        )
        raise
    return model, figures, record


def _arguments(task: Task) -> TrainingArguments:
    settings = task.settings
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    device = show_only(device)
    per_step = settings.batch_size * settings.accumulate
    batch_size, accumulate = ranks.share(settings.batch_size, settings.accumulate)
    steps = settings.max_steps or math.ceil(
        math.ceil(len(task.train) / per_step) * (settings.epochs or 1.0)
    )
    look = max(1, steps // LOOKS)
    return TrainingArguments(
        output_dir=str(task.run),
        max_steps=settings.max_steps or -1,
        num_train_epochs=settings.epochs or 1.0,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.min_lr},
        # A count, not a share: transformers reads 1 and more as steps.
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        eval_strategy="steps",
        eval_steps=look,
        save_strategy="steps",
        save_steps=settings.save_steps or min(look, 500),
        save_total_limit=2,
        # Reading the loss waits for the GPU; on the CPU it costs nothing.
        logging_steps=settings.log_steps or (1 if device.type == "cpu" else 10),
        logging_nan_inf_filter=False,
        report_to="none",
        announce=not is_quiet(),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        optim=MUON if settings.optim == MUON else TrainingArguments.default_optim,
        fsdp=True if settings.parallel == "fsdp2" else None,  # type: ignore[arg-type]
        fsdp_config={"version": 2} if settings.parallel == "fsdp2" else None,
    )


def _optimizer(settings: Settings) -> tuple[type, dict[str, Any]] | None:
    """None is the Trainer's own: bigkernel's AdamW, or Muon where the arguments say so."""
    if settings.optim == "adam":
        options: dict[str, Any] = {"lr": settings.lr, "betas": (0.9, settings.beta2)}
        if settings.max_grad_norm:
            options["max_grad_norm"] = settings.max_grad_norm
        return Adam, options
    if settings.optim == "sgd":
        return torch.optim.SGD, {"lr": settings.lr, "momentum": 0.9}
    return None


def _few(held_back: Any, limit: int) -> Any:
    """Some items spread over the held-back part: enough to see the curve, soon done."""
    if len(held_back) <= limit:
        return held_back
    places = (
        torch.linspace(0, len(held_back) - 1, limit, dtype=torch.float32, device="cpu")
        .round()
        .long()
        .tolist()
    )
    return torch.utils.data.Subset(held_back, places)


def _leave(
    task: Task,
    model: PreTrainedModel,
    record: Mapping[str, Any],
    history: list[dict[str, Any]],
    looked_at: int,
) -> dict[str, float]:
    """Model, inputs, pictures, figures and card; then say where they are."""
    settings, run = task.settings, task.run
    model.eval()
    with run_folder.files_moved_into(run) as aside:
        model.save_pretrained(aside)
        task.save_inputs(aside)
        figures, sample = task.finish(model, aside)
        about = report.memorized(history, figures["loss"])
        report.save_loss_curve(
            history,
            aside / run_folder.LOSS,
            f"{looked_at} of {len(task.held_back)} {ITEMS[task.unit]}",
            (int(record["steps"]), figures["loss"]),
        )
        shown = {k: v for k, v in vars(settings).items() if v is not None and k != "out"}
        facts = [name for name in record if name not in task.data]
        card = report.model_card(
            **task.card(run),
            data=[(name.replace("_", " "), str(value)) for name, value in task.data.items()],
            run=[(name, str(record[name])) for name in facts],
            recipe=[(name, report.without_folders(value)) for name, value in shown.items()],
            metrics=figures,
            about=about,
            sample=sample,
            repeat=f"bigkernel {task.command} --config config.yaml --out ANOTHER_FOLDER",
        )
        (aside / run_folder.CARD).write_text(card, encoding="utf-8")
    show(figures, f"on the {figures_of(task.unit)} held back from training")
    if about:
        say(about)
    say(f"model, metrics, pictures and card are in {printable(run)}")
    return figures


def figures_of(unit: str) -> str:
    """What the figures are about."""
    return "text" if unit == "tokens" else "images"


def show(figures: Mapping[str, float], about: str) -> None:
    """Say figures as aligned lines."""
    say(printable(about))
    rows = report.figures(figures)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"  {name:<{width}}  {value}")


def check_same_data(recorded: str | None, now: str, run: Path, what: str) -> None:
    """Failure if the data of a run is not what it was trained on."""
    if recorded is not None and recorded != now:
        raise Failure(
            f"the {what} of {run} has changed since it was recorded (sha256 {recorded[:12]}, now "
            f"{now[:12]}), so its held-back part is another one. Put the old {what} back, or name "
            f"what to use with {option('data')}."
        )
