"""transformers' Trainer on bigkernel: the same arguments, the same scripts.

Differences: the model's attention is bigkernel's, AdamW is :class:`bigkernel.optim.AdamW` with the
clipping inside its step, image batches can be augmented on the device, checkpoints appear whole or
not at all and are checked before they are used, a resumed run repeats the uninterrupted one bit for
bit on the CPU, Ctrl-C saves, and a loss that is not finite stops the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from bigkernel import checkpoint
from bigkernel.checkpoint import NonFiniteLossError, TrainingInterrupted
from bigkernel.data.augmentation import Augmentation, BatchAugmentation
from bigkernel.integrations.replace import accelerate
from bigkernel.integrations.weights import has_other_names, load_weights
from bigkernel.optim import Adam, AdamW

STATE_FILE = "bigkernel_state.json"


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments, and switches for what bigkernel changes (all on)."""

    use_bigkernel_attention: bool = field(
        default=True, metadata={"help": "Use bigkernel's attention where the model allows it."}
    )
    use_bigkernel_optimizer: bool = field(
        default=True, metadata={"help": "Use bigkernel's AdamW in place of torch's."}
    )
    stop_on_nonfinite_loss: bool = field(
        default=True, metadata={"help": "Stop when the loss becomes NaN or infinite."}
    )
    save_on_interrupt: bool = field(
        default=True, metadata={"help": "On Ctrl-C finish the step and save a checkpoint."}
    )
    announce: bool = field(
        default=True, metadata={"help": "Print what bigkernel replaced and what it could not."}
    )


class Trainer(transformers.Trainer):
    """transformers' Trainer with bigkernel inside; every argument of it works as before.

    Args:
        augmentation: called as ``augmentation(images, generator=..., ids=...)`` on the images
            (``pixel_values``) of each training batch, on the device: a chain of
            :mod:`bigkernel.transforms` or any function with these arguments. It must end in float
            images of one size. Draws are keyed by the batch's ``sample_ids`` and a seed that
            changes every epoch, so they depend on neither batch size nor order; batches without
            ``sample_ids`` are numbered by a count that the checkpoint keeps.
        eval_augmentation: the same for evaluation and prediction, where it should be deterministic
            (such as resizing and normalising).

    ``train(resume_from_checkpoint=...)`` also takes ``"auto"`` (the newest whole checkpoint, or the
    start) and the path of a run folder.
    """

    _arguments_class: type[TrainingArguments] = TrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *positional: Any,
        augmentation: Augmentation | None = None,
        eval_augmentation: Augmentation | None = None,
        **keywords: Any,
    ) -> None:
        if args is None:
            args = self._arguments_class(output_dir="tmp_trainer")
        self.augmentation = augmentation
        self.eval_augmentation = eval_augmentation
        seed = args.seed if args.data_seed is None else args.data_seed
        self._batch_augmentation = BatchAugmentation(seed)
        self._in_training_step = False
        self._interrupted = False
        self._saved_step: int | None = None
        self._resumed_losses: dict[str, float] | None = None
        self._clipping_paused: tuple[Adam, float | None] | None = None
        super().__init__(model, args, *positional, **keywords)
        self._accelerate(self._module())

    # What is replaced

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model from ``model_init``, with bigkernel's attention."""
        model = super().call_model_init(trial)
        # The first call comes before __init__ has the model in place, which then does it.
        return self._accelerate(model) if hasattr(self, "callback_handler") else model

    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _accelerate(self, model: nn.Module) -> nn.Module:
        if not getattr(self.args, "use_bigkernel_attention", True):
            return model
        return accelerate(model, quiet=not self._announces())

    def _announces(self) -> bool:
        return self.is_world_process_zero() and getattr(self.args, "announce", True)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of transformers' choice, with bigkernel's AdamW in place of torch's."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and isinstance(optimizer, Adam) and self._announces():
            clip = optimizer.max_grad_norm
            inside = "" if clip is None else f", clipping at norm {clip:g} inside its step"
            print(f"bigkernel: the optimizer is bigkernel.optim.{type(optimizer).__name__}{inside}")
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """As transformers', with :class:`bigkernel.optim.AdamW` for ``torch.optim.AdamW``."""
        cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        if (
            cls is not torch.optim.AdamW
            or not getattr(args, "use_bigkernel_optimizer", True)
            or args.device.type not in ("cpu", "cuda")
        ):
            return cls, kwargs
        kwargs = {name: value for name, value in kwargs.items() if name not in ("fused", "foreach")}
        # FSDP and DeepSpeed hold the gradients in pieces and clip them their own way.
        if args.max_grad_norm and args.max_grad_norm > 0 and not args.fsdp and not args.deepspeed:
            kwargs["max_grad_norm"] = args.max_grad_norm
        return AdamW, kwargs

    # Clipping inside the optimizer's step

    def _clipping_optimizer(self) -> Adam | None:
        optimizer: Any = self.optimizer
        while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
            if not hasattr(optimizer, "optimizer"):
                return None
            optimizer = optimizer.optimizer
        if isinstance(optimizer, Adam) and optimizer.max_grad_norm is not None:
            return optimizer
        return None

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._resume_clipping()  # from a step that an exception ended
        optimizer = self._clipping_optimizer()
        if optimizer is None or self._gradients_are_shown():
            if optimizer is not None:
                self._clipping_paused = optimizer, optimizer.max_grad_norm
                optimizer.max_grad_norm = None
            return super()._clip_grad_norm(model)
        # The norm is known after the step; the log takes it from there.
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        clips = self._clipping_optimizer() is not None
        return None if clips else super()._get_grad_norm(model, grad_norm)

    def _gradients_are_shown(self) -> bool:
        """Whether a callback may look at gradients beside the step, where they must be clipped."""
        return any(
            getattr(type(callback), event, None) is not getattr(TrainerCallback, event)
            for callback in self.callback_handler.callbacks
            if not type(callback).__module__.startswith("transformers.")  # none of these looks
            for event in ("on_pre_optimizer_step", "on_optimizer_step")
        )

    def _resume_clipping(self) -> None:
        if self._clipping_paused is not None:
            optimizer, limit = self._clipping_paused
            optimizer.max_grad_norm, self._clipping_paused = limit, None

    # Images

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if columns is not None and "sample_ids" not in columns:
            columns.append("sample_ids")

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        ids = inputs.pop("sample_ids", None)
        training = self._in_training_step and self._module().training
        augmentation = self.augmentation if training else self.eval_augmentation
        if augmentation is not None and "pixel_values" in inputs:
            epoch = int(self.state.epoch or 0) if training else None
            images = inputs["pixel_values"]
            inputs["pixel_values"] = self._batch_augmentation(augmentation, images, ids, epoch)
        return inputs

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers', also for images of different sizes, which come as a list."""
        images = inputs.get("pixel_values")
        if isinstance(images, (list, tuple)):
            joined = torch.empty(
                sum(image.numel() for image in images), dtype=torch.uint8, device="meta"
            )
            inputs = {**inputs, "pixel_values": joined}
        return super().floating_point_ops(inputs)

    # Steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', which would take one step more where the checkpoint is the last one."""
        self._continue_losses()
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _continue_losses(self) -> None:
        """Put back the losses summed since the last log, which transformers starts from zero."""
        resumed, self._resumed_losses = self._resumed_losses, None
        if resumed is not None:
            self._tr_loss += resumed["sum"]
            self._globalstep_last_logged = int(resumed["step"])
            # The average that train() returns is that of the steps of this call.
            self._total_loss_scalar -= resumed["sum"]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """As transformers', with augmentation before and a check of the loss after.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; the parameters have not been touched.
        """
        self._in_training_step = True
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._in_training_step = False
        if self._stops_on_nonfinite() and not bool(loss.isfinite().all()):
            step = self.state.global_step + 1
            found = f"the loss is {float(loss.mean())} at step {step}"
            raise self._nonfinite(f"{found}; stopped before the parameters changed", step)
        return loss

    def _stops_on_nonfinite(self) -> bool:
        return bool(getattr(self.args, "stop_on_nonfinite_loss", True))

    def _nonfinite(self, found: str, step: int) -> NonFiniteLossError:
        last = checkpoint.newest_whole_checkpoint(self._run_folder())
        where = "there is no checkpoint yet" if last is None else f"the last good one is {last}"
        advice = "Resume with a lower learning rate, or look at the data."
        return NonFiniteLossError(f"{found}, and {where}. {advice}", step, last)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', without touching the random numbers that training goes on with."""
        with _same_random_numbers_after():
            return super().evaluation_loop(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *rest: Any, **more: Any
    ) -> None:
        self._resume_clipping()
        optimizer = self._clipping_optimizer()
        if grad_norm is None and optimizer is not None:
            grad_norm = optimizer.grad_norm
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **more)
        if self._interrupted:
            self._stop(model, trial)

    # Checkpoints

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train.

        Args:
            resume_from_checkpoint: None or False: start. True: the newest whole checkpoint of the
                output folder; ``"auto"``: the same, or the start where there is none. A path: that
                checkpoint, or the newest of that run folder. Damaged ones are passed over, with a
                sentence, for the one before.
            trial: as transformers'.
            ignore_keys_for_eval: as transformers'.

        Raises:
            NoCheckpointError: nothing to resume from.
            TrainingInterrupted: Ctrl-C; a checkpoint was saved.
            NonFiniteLossError: the loss became NaN or infinite.
            CheckpointError: a checkpoint could not be written; those before it are intact.
        """
        if self.args.should_save:
            checkpoint.clean_up(self._run_folder())
        self.accelerator.wait_for_everyone()
        folder: Path | None = None
        if resume_from_checkpoint:
            folder = checkpoint.resolve_checkpoint(resume_from_checkpoint, self._run_folder())
            if self.is_world_process_zero():
                nothing = f"no checkpoint in {self._run_folder()} yet: starting anew."
                checkpoint.notify(nothing if folder is None else f"resuming from {folder}.")
        self._resumed_losses = None if folder is None else self._load_own_state(folder)
        self._interrupted, self._saved_step = False, None
        try:
            with self._catching_interrupts():
                return super().train(
                    None if folder is None else str(folder), trial, ignore_keys_for_eval
                )
        finally:
            self.is_in_train = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers', but whole or not at all, and never with parameters that are lost."""
        if self._stops_on_nonfinite():
            for name, parameter in self._module().named_parameters():
                if not bool(parameter.detach().isfinite().all()):
                    step = self.state.global_step
                    found = f"{name} is no longer finite after step {step}; nothing was saved"
                    raise self._nonfinite(found, step)
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run = Path(self._get_output_dir(trial=trial))
        final = run / f"checkpoint-{self.state.global_step}"
        with self._checkpoint_folder(final) as folder:
            self.save_model(str(folder), _internal_call=True)
            self._note_best_checkpoint(run)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
            if self.args.should_save:
                self._note_callback_states()
                self.state.save_to_json(str(folder / "trainer_state.json"))
                (folder / STATE_FILE).write_text(json.dumps(self._own_state()))
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As transformers', also for weights that it saves under other names than it loads."""
        target = self._module() if model is None else model
        if has_other_names(target, resume_from_checkpoint):
            with _same_random_numbers_after():
                load_weights(target, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and has_other_names(self._module(), best):
            load_weights(self._module(), best)
        else:
            super()._load_best_model()

    @contextlib.contextmanager
    def _checkpoint_folder(self, final: Path) -> Iterator[Path]:
        """The folder to write to; every process writes to the one that the first puts in place."""
        if self.args.world_size <= 1:
            with checkpoint.atomic_folder(final) as folder:
                yield folder
            return
        if self.args.should_save:
            with checkpoint.atomic_folder(final) as folder:
                self.accelerator.wait_for_everyone()
                yield folder
                self.accelerator.wait_for_everyone()
        else:
            self.accelerator.wait_for_everyone()
            yield checkpoint.folder_aside(final)
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()

    def _note_best_checkpoint(self, run: Path) -> None:
        strategies = (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST)
        step = self.state.best_global_step
        if self.args.save_strategy in strategies and step:
            best = run / f"checkpoint-{step}"
            if step == self.state.global_step or best.exists():
                self.state.best_model_checkpoint = str(best)

    def _note_callback_states(self) -> None:
        states: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]
        for callback in [*self.callback_handler.callbacks, self.control]:
            if not isinstance(callback, ExportableState):
                continue
            name = type(callback).__name__
            known = states[name]
            if isinstance(known, list):
                known.append(callback.state())
            else:
                states[name] = callback.state()

    def _own_state(self) -> dict[str, Any]:
        return {
            # Python's float repr is exact, so these come back bit for bit.
            "loss_since_log": float(self._tr_loss),
            "step_of_last_log": self._globalstep_last_logged,
            "augmentation": self._batch_augmentation.state_dict(),
        }

    def _load_own_state(self, folder: Path) -> dict[str, float] | None:
        file = folder / STATE_FILE
        if not file.is_file():
            return None  # a checkpoint of transformers' own Trainer
        state = json.loads(file.read_text())
        self._batch_augmentation.load_state_dict(state["augmentation"])
        return {"sum": state["loss_since_log"], "step": state["step_of_last_log"]}

    def _run_folder(self) -> Path:
        return Path(self._get_output_dir(trial=None))

    # Ctrl-C

    @contextlib.contextmanager
    def _catching_interrupts(self) -> Iterator[None]:
        usual = signal.getsignal(signal.SIGINT)
        if (
            not getattr(self.args, "save_on_interrupt", True)
            or threading.current_thread() is not threading.main_thread()
            or usual is not signal.default_int_handler  # someone else looks after it
        ):
            yield
            return
        process = os.getpid()

        def handle(number: int, frame: Any) -> None:
            if os.getpid() != process:
                return  # a data-loading worker: it works on until it is told to stop
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            checkpoint.notify(
                "finishing this step, then saving; Ctrl-C again stops at once, without saving."
            )

        signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, usual)

    def _stop(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        saved = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{step}"
        if self._saved_step != step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        message = f"interrupted after step {step}; saved {saved}, from which it can be resumed."
        checkpoint.notify(message)
        raise TrainingInterrupted(message, step, saved)


@dataclass
class Seq2SeqTrainingArguments(TrainingArguments, transformers.Seq2SeqTrainingArguments):
    """transformers' Seq2SeqTrainingArguments, and the switches of :class:`TrainingArguments`."""


class Seq2SeqTrainer(Trainer, transformers.Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer (``predict_with_generate``) with what :class:`Trainer` adds."""

    _arguments_class = Seq2SeqTrainingArguments


@contextlib.contextmanager
def _same_random_numbers_after() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
