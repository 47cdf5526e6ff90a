"""transformers' Trainer on bigkernel: the same arguments, the same scripts.

Differences: bigkernel's ops are put into the model (`bigkernel.patch`), AdamW is
:class:`bigkernel.optim.AdamW` with the clipping inside its step, image batches can be augmented on
the device, checkpoints appear whole or not at all and are checked before they are used, a resumed
run repeats the uninterrupted one bit for bit on the CPU, Ctrl-C and a cluster's signals save, what
saving needs is checked before the first step, no two runs write to one folder, and a loss that is
not finite stops the run.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bigkernel.extras import needs

with needs("train", "bigkernel.Trainer"):
    import transformers
    from accelerate.utils import broadcast_object_list
    from transformers.trainer_callback import ExportableState, TrainerCallback
    from transformers.trainer_utils import SaveStrategy
    from transformers.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )

from bigkernel import backend, checkpoint, heap, precision, tuning
from bigkernel.checkpoint import CheckpointError, NonFiniteLossError, TrainingInterrupted
from bigkernel.data.augmentation import Augmentation, BatchAugmentation
from bigkernel.data.collators import PackingCollator, PaddingCollator
from bigkernel.data.streams import StreamTrack
from bigkernel.expect import Expect
from bigkernel.integrations import contract, heads, sharding
from bigkernel.integrations.packing import Packing, PackingError, packing_of
from bigkernel.integrations.patching import NAMES, patch
from bigkernel.integrations.weights import has_other_names, load_weights
from bigkernel.interrupts import StopRequest, shield_workers
from bigkernel.optim import Adam, AdamW, Muon, muon_groups
from bigkernel.run_lock import RunLockedError, writing_to
from bigkernel.utilization import Meter

STATE_FILE = "bigkernel_state.json"
_DTYPE = {False: "float32", True: "bfloat16"}
MUON = "muon"
_TUNING_SECONDS = 1.0
# What `optim_args` may say with it, and how each is read.
_MUON_ARGS: dict[str, Callable[[str], Any]] = {
    "muon_lr": float,
    "momentum": float,
    "nesterov": {"true": True, "false": False}.__getitem__,
    "ns_steps": int,
    "ns_dtype": {"bfloat16": torch.bfloat16, "float32": torch.float32}.__getitem__,
    "adjust_lr_fn": str,
}


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments, and switches for what bigkernel changes (all on).

    ``bf16=None``, the default, leaves it to the Trainer: training steps of a transformers model
    that is in float32 and wide enough compute in bfloat16 (autocast) where the processor or GPU
    multiplies it 1.5 times as fast or more. Weights, gradients,
    optimizer, evaluation and what is saved stay float32. True and False are obeyed as ever; with
    fp16, DeepSpeed, FSDP, ``accelerate launch`` or a loss of one's own, None is False.

    ``optim="muon"`` is :class:`bigkernel.optim.Muon`, with AdamW for what
    :func:`bigkernel.optim.muon_groups` gives to it. Updates of both kinds are as large as AdamW's
    ("match_rms_adamw"), so that one ``learning_rate`` and ``weight_decay`` will do; ``optim_args``
    may have ``muon_lr``, ``momentum``, ``nesterov``, ``ns_steps``, ``ns_dtype`` and
    ``adjust_lr_fn``, as in ``"muon_lr=0.02,momentum=0.9"``; ``adam_beta1``, ``adam_beta2`` and
    ``adam_epsilon`` are AdamW's. A momentum that is not given rises from 0.85 to 0.95 over the
    first 300 steps, as in the runs for which Muon was made (K. Jordan et al., 2024).

    ``tune_kernels=True`` times the kernels that the first training batch has called beside torch's
    own code, for one second at most, and takes the faster one of each class of calls from the
    second batch on, in eager code. The figures are kept for later runs, as those of
    ``bigkernel tune-kernels`` are, and not measured again. Of several processes the first one
    measures for all.

    ``packing=True`` lays the documents of each batch end to end
    (:class:`bigkernel.data.PackingCollator`): the same steps on the same examples with the same
    losses as padded, without computing the padding. Examples are lists of tokens, or what the data
    collator makes batches [B, L] of. Evaluations that return outputs, and predictions, are padded.
    Models that do not keep packed documents apart are refused before the first step.
    """

    # Not "bool | None": for that, HfArgumentParser no longer takes "--bf16" without a value.
    bf16: bool = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "Compute in bfloat16 (autocast): true, false, or by default where training "
            "steps are faster so."
        },
    )
    # Not transformers' enum: HfArgumentParser would take its values alone.
    optim: str = field(  # type: ignore[assignment]
        default=transformers.TrainingArguments.default_optim,
        metadata={"help": "The optimizer to use: muon, or one of transformers' OptimizerNames."},
    )
    use_bigkernel_attention: bool = field(
        default=True, metadata={"help": "Use bigkernel's attention where the model allows it."}
    )
    use_bigkernel_kernels: bool = field(
        default=True,
        metadata={
            "help": "Use bigkernel's norms, rotary embedding, gated units, linear layers and loss "
            "where they are faster."
        },
    )
    use_bigkernel_optimizer: bool = field(
        default=True, metadata={"help": "Use bigkernel's AdamW in place of torch's."}
    )
    stop_on_nonfinite_loss: bool = field(
        default=True, metadata={"help": "Stop when the loss becomes NaN or infinite."}
    )
    save_on_interrupt: bool = field(
        default=True,
        metadata={
            "help": "On Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 finish the step and save a checkpoint."
        },
    )
    tune_kernels: bool = field(
        default=False,
        metadata={
            "help": "After the first batch, time the kernels it called beside torch's own code, in "
            "a second at most, and take the faster ones from then on."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Lay the documents of a batch end to end, without padding and without letting "
            "them see each other."
        },
    )
    announce: bool = field(
        default=True, metadata={"help": "Print what bigkernel replaced and what it could not."}
    )

    def __post_init__(self) -> None:
        # Each of these decides on the precision itself.
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ
        if self.bf16 is None and (self.fp16 or self.deepspeed or self.fsdp or launched):
            self.bf16 = False
        muon = self.optim == MUON
        if muon:  # which transformers does not know
            _muon_options(self)
            self.optim = type(self).default_optim
        super().__post_init__()
        if muon:
            self.optim = MUON

    def set_optimizer(self, name: Any = "adamw_torch", *args: Any, **kwargs: Any) -> Any:
        """As transformers', with ``"muon"`` too."""
        super().set_optimizer(self.default_optim if name == MUON else name, *args, **kwargs)
        if name == MUON:
            self.optim = MUON
            _muon_options(self)
        return self


_ARGUMENTS = Expect("TrainingArguments")


def _muon_options(args: Any) -> dict[str, Any]:
    """What ``optim_args`` says of Muon, and the scaling that makes one learning rate do."""
    options: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw"}
    for pair in (args.optim_args or "").replace(" ", "").split(","):
        if not pair:
            continue
        name, _, value = pair.partition("=")
        expected = f"NAME=VALUE,.. of {', '.join(_MUON_ARGS)}"
        _ARGUMENTS(name in _MUON_ARGS, "optim_args", expected, repr(pair))
        try:
            options[name] = _MUON_ARGS[name](value)
        except (ValueError, KeyError):
            what = f"{name} in optim_args"
            kinds = {"ns_dtype": "bfloat16 or float32", "nesterov": "true or false"}
            raise _ARGUMENTS.error(what, kinds.get(name, "a number"), repr(value)) from None
    rate = options.get("muon_lr")
    # The rest is checked with the same words when the optimizer is made, before the first step.
    _ARGUMENTS(rate is None or rate >= 0, "muon_lr in optim_args", "at least 0", rate)
    return options


def _shares(optimizer: Adam) -> str:
    """How many parameters each half of a Muon has."""
    if not isinstance(optimizer, Muon):
        return ""
    counts = {True: 0, False: 0}
    for group in optimizer.param_groups:
        counts[group["use_muon"]] += len(group["params"])
    return f" of {counts[True]} weights, with AdamW for {counts[False]} other parameters"


class _MomentumWarmup(TrainerCallback):
    """Muon's momentum by the step: early gradients change too fast for an average of twenty."""

    first, last, steps = 0.85, 0.95, 300

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        share = min(state.global_step / self.steps, 1.0)
        for group in given["optimizer"].param_groups:
            if group.get("use_muon"):
                group["momentum"] = self.first + share * (self.last - self.first)


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
        contract.check("trainer")
        if args is None:
            args = self._arguments_class(output_dir="tmp_trainer")
        self.augmentation = augmentation
        self.eval_augmentation = eval_augmentation
        seed = args.seed if args.data_seed is None else args.data_seed
        self._batch_augmentation = BatchAugmentation(seed)
        self._in_training_step = self._wants_loss_alone = False
        self._stop_request = StopRequest(self._tell_stop)
        self._in_evaluation_that_may_stop = False
        self._has_begun = self._evaluation_due = False
        self._saved_step: int | None = None
        self._resumed_losses: dict[str, float] | None = None
        self._clipping_paused: tuple[Adam, float | None] | None = None
        self._steps_in_bf16 = False
        self._steps_were_in_bf16: bool | None = None
        self._packing: Packing | None = None
        self._tunes_next = False
        self._meter: Meter | None = None
        self._flops_of_one: int | None = None
        # As a model was prepared, and without what that put around it.
        self._unwrapped: tuple[Any, Any] = (None, None)
        self._stream: StreamTrack | None = None
        self._stream_before: dict[str, int] | None = None
        self._passes_more = 0
        super().__init__(model, args, *positional, **keywords)
        self._patch(self._module())
        given = positional[0] if positional else keywords.get("data_collator")
        if given is None and getattr(args, "packing", False):
            self.data_collator = PaddingCollator(self._pad_token_id())

    # Processes

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers', and FSDP2 on CPUs, where accelerate would make DDP of it.

        Raises:
            ShardingError: FSDP was asked for where it would not be what is asked.
        """
        asked = sharding.version_of(self.args)
        sharding.check_request(self.args, asked)
        super().create_accelerator_and_postprocess()
        sharding.shard_on_cpu(self, asked)

    def _is_fsdp2(self) -> bool:
        """Whether the model is, or will be, sharded by `fully_shard`."""
        return bool(self.is_fsdp_enabled and self.accelerator.is_fsdp2)

    def _weights_come_from_the_first(self) -> bool:
        """Whether accelerate is to send the weights of the first rank to the others."""
        return bool(self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading)

    # What is replaced

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model from ``model_init``, with bigkernel inside."""
        model = super().call_model_init(trial)
        # The first call comes before __init__ has the model in place, which then does it.
        return self._patch(model) if hasattr(self, "callback_handler") else model

    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _patch(self, model: nn.Module) -> nn.Module:
        switches = {
            name: "use_bigkernel_attention" if name == "attention" else "use_bigkernel_kernels"
            for name in NAMES
        }
        names = [name for name, switch in switches.items() if getattr(self.args, switch, True)]
        return patch(model, quiet=not self._announces(), only=names) if names else model

    def _announces(self) -> bool:
        return self.is_world_process_zero() and getattr(self.args, "announce", True)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of transformers' choice, with bigkernel's AdamW in place of torch's.

        And Muon, which transformers does not know.
        """
        fresh = self.optimizer is None
        if fresh and self.optimizer_cls_and_kwargs is None and self.args.optim == MUON:
            self.optimizer = self._create_muon(self.model if model is None else model)
        optimizer = super().create_optimizer(model)
        if fresh and isinstance(optimizer, Adam) and self._announces():
            clip = optimizer.max_grad_norm
            inside = "" if clip is None else f", clipping at norm {clip:g} inside its step"
            kind = f"bigkernel.optim.{type(optimizer).__name__}"
            print(f"bigkernel: the optimizer is {kind}{_shares(optimizer)}{inside}")
        return optimizer

    def _create_muon(self, model: Any) -> torch.optim.Optimizer:
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        args, rate = self.args, kwargs.pop("muon_lr", None)
        groups = muon_groups(
            model,
            decay=self.get_decay_parameter_names(model),
            muon={} if rate is None else {"lr": rate},
            adamw={"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon},
        )
        self.remove_callback(_MomentumWarmup)  # of an optimizer before this one
        if "momentum" not in kwargs:
            self.add_callback(_MomentumWarmup)
        optimizer: torch.optim.Optimizer = cls(groups, **kwargs)
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """As transformers', with :class:`bigkernel.optim.AdamW` for ``torch.optim.AdamW``.

        For Muon also ``muon_lr``, if there is one, which `create_optimizer` gives to its groups.
        """
        # FSDP1 and DeepSpeed flatten what they cut, and clip it their own way.
        clips = args.max_grad_norm and args.max_grad_norm > 0 and sharding.version_of(args) != 1
        clip = {"max_grad_norm": args.max_grad_norm} if clips and not args.deepspeed else {}
        if args.optim == MUON:
            expected = "left out with optim='muon'"
            got, fix = "one", "DeepSpeed flattens the weights, and Muon needs whole matrices"
            _ARGUMENTS(not args.deepspeed, "deepspeed", expected, got, fix)
            rates = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
            return Muon, {**rates, **_muon_options(args), **clip}
        # Not by its name in transformers, which a script may have made ours.
        cls, kwargs = super(Trainer, Trainer).get_optimizer_cls_and_kwargs(args, model)
        if (
            cls is not torch.optim.AdamW
            or not getattr(args, "use_bigkernel_optimizer", True)
            or args.device.type not in ("cpu", "cuda")
        ):
            return cls, kwargs
        kwargs = {name: value for name, value in kwargs.items() if name not in ("fused", "foreach")}
        return AdamW, {**kwargs, **clip}

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

    # Packed documents

    def get_train_dataloader(self) -> Any:
        """As transformers', packed with ``packing=True``."""
        with self._collating(packed=True):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As transformers', packed with ``packing=True`` where the loss alone is wanted."""
        loss_alone = self.compute_metrics is None or self.args.prediction_loss_only
        with self._collating(packed=loss_alone):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As transformers'; never packed, as predictions belong to examples."""
        with self._collating(packed=False):
            return super().get_test_dataloader(test_dataset)

    def check_packing(self) -> None:
        """Where batches are packed, try out whether the model keeps their documents apart.

        `train` does so before the first step.

        Raises:
            PackingError: it does not; the message names it.
        """
        self._packing = None  # of a model that may be another now
        if self._packs():
            self._how_to_pack()

    def _packs(self) -> bool:
        packing = getattr(self.args, "packing", False)
        return packing or isinstance(self.data_collator, PackingCollator)

    @contextlib.contextmanager
    def _collating(self, packed: bool) -> Iterator[None]:
        """Inside, the data collator is that of packed batches, or of padded ones beside them."""
        given: Any = self.data_collator
        collator = given
        loading: Any = self.accelerator.dataloader_config
        dispatch = loading.dispatch_batches
        if self._packs():
            how = self._how_to_pack()
            if packed and isinstance(given, PaddingCollator):
                collator = PackingCollator()
            elif packed and not isinstance(given, PackingCollator):
                collator = PackingCollator(collator=given)
            elif isinstance(given, (PackingCollator, PaddingCollator)):
                collator = copy.copy(given)
            if isinstance(collator, (PackingCollator, PaddingCollator)):
                collator.shifted = how.shifted
                if how.decoder_start_token_id is not None:
                    collator.decoder_start_token_id = how.decoder_start_token_id
                    collator.pad_token_id = how.pad_token_id
            if isinstance(collator, PackingCollator):
                collator.first_position = how.first_position
                if dispatch:
                    raise PackingError(
                        "dispatch_batches=True cuts batches into rows for the processes, and a "
                        "packed batch is one row. Use dispatch_batches=False."
                    )
                loading.dispatch_batches = False  # left open, it is True for streams
        self.data_collator = collator
        try:
            yield
        finally:
            self.data_collator, loading.dispatch_batches = given, dispatch

    def _how_to_pack(self) -> Packing:
        """How documents are packed for the model; PackingError where that cannot be."""
        if self._packing is None:
            parallel = getattr(self.accelerator, "parallelism_config", None)
            if self.args.n_gpu > 1:
                raise PackingError(
                    "packed batches are one row, and torch.nn.DataParallel deals out rows to "
                    f"{self.args.n_gpu} GPUs. Start one process a GPU (torchrun), or show one GPU."
                )
            if max(getattr(parallel, "cp_size", 1), getattr(parallel, "sp_size", 1)) > 1:
                raise PackingError(
                    "context and sequence parallelism cut sequences into pieces, and the offsets "
                    "of packed documents would not be those of a piece. Train without packing."
                )
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            with same_random_numbers_after():
                self._packing = packing_of(model, lambda batch: self.compute_loss(model, batch))
            # By which transformers counts the labels of a step; of GPT-2 it does not know.
            self._loss_shifts_labels = self._packing.shifted
        return self._packing

    def _pad_token_id(self) -> int:
        sources: Any = (self.processing_class, getattr(self._module(), "config", None))
        ids = (getattr(source, "pad_token_id", None) for source in sources)
        return next((n for n in ids if isinstance(n, int) and n >= 0), 0)

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
        """As transformers', also for images of different sizes, which come as a list.

        The parameters are counted once a training, and not in every step.
        """
        name = getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs:
            return 0
        if self._flops_of_one is None:
            one = {name: torch.empty(1, device="meta")}
            self._flops_of_one = super().floating_point_ops(one)
        main = inputs[name]
        many = isinstance(main, (list, tuple))
        return self._flops_of_one * (sum(x.numel() for x in main) if many else main.numel())

    # Steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', which would take one step more where the checkpoint is the last one."""
        if not self._has_begun:
            self._has_begun = True
            self._check_before_first_step()
            self._choose_precision()
            self._meter = Meter(self._module(), self.args.device, max(1, self.args.n_gpu))
            self._flops_of_one = None
            self._tunes_next = getattr(self.args, "tune_kernels", False)
            self._continue_losses()
        shield_workers(kwargs["train_dataloader"], self._stop_request)
        kwargs = self._enter_stream(kwargs)
        if self._evaluation_due:
            self._make_up_evaluation(**kwargs)
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if self.control.should_training_stop:
            return
        super()._run_epoch(*args, **kwargs)

    def _enter_stream(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What an epoch is told where the data is a stream: which pass it is, and where it begins.

        transformers takes a stream without a length for one long epoch when it resumes, although it
        has begun anew each time that it came to its end.
        """
        loader, source = kwargs["train_dataloader"], kwargs["resume_from_checkpoint"]
        if not isinstance(getattr(loader, "dataset", None), torch.utils.data.IterableDataset):
            return kwargs
        if self._stream is None or self._stream.loader is not loader:
            self._stream = StreamTrack(loader, self.args.world_size)
            self._passes_more = 0
        stream, epoch = self._stream, kwargs["epoch"]
        step = self.state.global_step
        if source is None or epoch != kwargs["epochs_trained"] or self.args.ignore_data_skip:
            stream.begin(epoch + self._passes_more, step)
            return {**kwargs, "epoch": stream.epoch}
        accumulated = self.args.gradient_accumulation_steps
        skipped = kwargs["steps_trained_in_current_epoch"] // accumulated
        before = self._stream_before or {"epoch": epoch, "began": step - skipped}
        self._passes_more = before["epoch"] - epoch
        stream.begin(before["epoch"], before["began"])
        batches = (step - before["began"]) * accumulated
        told = {
            "epoch": stream.epoch,
            "epochs_trained": stream.epoch,
            "steps_trained_in_current_epoch": batches,
        }
        if batches == 0:
            return {**kwargs, **told}
        saved = stream.read(Path(source), self.args.process_index)
        if self.args.world_size > 1 and not stream.own:  # all do as the first one
            saved = broadcast_object_list([saved])[0]
        reason = stream.enter(saved)
        if reason is not None and self.is_world_process_zero():
            checkpoint.notify(f"{reason}, so its first {batches} batches are read again.")
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(stream.epoch)
        resumed = stream.resumed(batches, read_again=reason is not None)
        return {**kwargs, **told, "train_dataloader": resumed}

    def _choose_precision(self) -> None:
        """Let training steps compute in bfloat16 where the arguments leave it open and it pays."""
        model: Any = self._module()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's
        self._steps_in_bf16 = (
            self.args.bf16 is None
            # A loss of one's own may use what float32 alone has.
            and not self._computes_own_loss()
            and self.compute_loss_func is None
            and isinstance(base, transformers.PreTrainedModel)
            and precision.bf16_pays(model, self.args.device)
        )
        before, now = self._steps_were_in_bf16, self._steps_in_bf16
        if before not in (None, now) and self.is_world_process_zero():
            checkpoint.notify(
                f"the run computed in {_DTYPE[not now]} and goes on in {_DTYPE[now]}, since bf16 "
                "is None and the machine or the model is another; bf16=True or False decides."
            )
        if now and self._announces():
            print(
                "bigkernel: training steps compute in bfloat16, which is faster here; weights, "
                "optimizer and evaluation stay float32 (bf16=False: everything)"
            )

    def _tune(self, called: set[tuning.Class]) -> None:
        """Measure what is not known of these classes; every process chooses as the first one."""
        kind = self.args.device.type
        figures = tuning.known(kind)
        if self.is_world_process_zero() and not backend.is_forced():
            wanted = [c for c in called if c[1] == kind and (c[0], c[2]) not in figures]
            found = tuning.measure(sorted(wanted), seconds=_TUNING_SECONDS)
            new = {(name, words): of for (name, _, words), of in found.items()}
            figures.update(new)
            kept = ""
            try:
                kept = f", kept in {tuning.save(kind, new)}" if new else ""
            except OSError as error:
                checkpoint.notify(f"what was measured of kernels could not be kept: {error}.")
            if self._announces():
                faster = sorted(" ".join(key) for key, of in figures.items() if of.takes_torch)
                print(
                    f"bigkernel: timed {len(new)} of {len(called)} classes of calls beside torch's "
                    f"own code{kept}; torch's is taken for: {', '.join(faster) or 'none'}"
                )
        if self.args.world_size > 1:
            figures = broadcast_object_list([figures])[0]
        tuning.adopt(kind, figures)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """As transformers', and bfloat16 in training steps where it was chosen."""
        if self._steps_in_bf16 and self._in_training_step:
            return torch.autocast(
                self.args.device.type, torch.bfloat16, cache_enabled=cache_enabled
            )
        return super().autocast_smart_context_manager(cache_enabled)

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
        if getattr(self.args, "packing", False) and "cu_seq_lens_q" not in inputs:
            raise PackingError(
                f"packing=True, and a training batch is not packed: {type(self).__name__} makes "
                "its own. Use bigkernel.data.PackingCollator there, or packing=False."
            )
        if self._meter is not None:
            self._meter.count(inputs)
        tunes, self._tunes_next = self._tunes_next, False
        self._in_training_step = True
        try:
            with tuning.noting() if tunes else contextlib.nullcontext() as called:
                loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._in_training_step = False
        if self._stream is not None:
            self._stream.advance()
        if called is not None:
            self._tune(called)
        if self._stops_on_nonfinite() and not bool(loss.isfinite().all()):
            step = self.state.global_step + 1
            found = f"the loss is {float(loss.mean())} at step {step}"
            raise self._nonfinite(f"{found}; stopped before the parameters changed", step)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As transformers', without the logits of a language model where nobody gets to see them.

        They are there for whoever asks for the outputs, and for a loss that is not the model's own.
        """
        unseen = not return_outputs or self._wants_loss_alone
        if unseen and self.label_smoother is None and self.compute_loss_func is None:
            if self._unwrapped[0] is not model:
                inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
                self._unwrapped = model, inner
            if heads.can_skip_logits(self._unwrapped[1]):
                inputs = {heads.SKIP: True, **inputs}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _computes_own_loss(self) -> bool:
        """Whether a subclass has another `compute_loss`."""
        return type(self).compute_loss is not Trainer.compute_loss

    def _stops_on_nonfinite(self) -> bool:
        return bool(getattr(self.args, "stop_on_nonfinite_loss", True))

    def _nonfinite(self, found: str, step: int) -> NonFiniteLossError:
        last = checkpoint.newest_whole_checkpoint(self._run_folder())
        where = "there is no checkpoint yet" if last is None else f"the last good one is {last}"
        advice = "Resume with a lower learning rate, or look at the data."
        return NonFiniteLossError(f"{found}, and {where}. {advice}", step, last)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', without touching the random numbers that training continues with."""
        shield_workers(args[0] if args else kwargs["dataloader"], self._stop_request)
        try:
            with same_random_numbers_after():
                return super().evaluation_loop(*args, **kwargs)
        finally:
            sharding.put_back(self._module())

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers'; an evaluation during training is left when training is to stop."""
        if self._in_evaluation_that_may_stop and self._stop_request.received is not None:
            raise _EvaluationLeft
        # A loss of one's own may look at the outputs.
        self._wants_loss_alone = prediction_loss_only and not self._computes_own_loss()
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._wants_loss_alone = False

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *rest: Any, **more: Any
    ) -> None:
        self._resume_clipping()
        optimizer = self._clipping_optimizer()
        if grad_norm is None and optimizer is not None:
            grad_norm = optimizer.grad_norm
        # Several processes leave an evaluation together, or they would wait for each other.
        self._in_evaluation_that_may_stop = self.args.world_size <= 1
        began = time.monotonic()
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **more)
        except _EvaluationLeft:
            self._evaluation_due, self._saved_step = True, None
        finally:
            self._in_evaluation_that_may_stop = False
            if self._meter is not None:  # a log, an evaluation, a checkpoint
                self._meter.leave_out(began)
        self._stop_if_asked(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers', with a training loss also speed, memory and MFU, of this process."""
        if self._meter is not None and "loss" in logs:
            logs.update(self._meter.figures(self._dtype_of_steps()))
        super().log(logs, start_time)

    def _dtype_of_steps(self) -> torch.dtype:
        mixed = "bf16" if self._steps_in_bf16 else self.accelerator.mixed_precision
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed)
        return half or next(self._module().parameters()).dtype

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
                sentence, for the one before. One that is named is also taken when its files have
                been edited or some that can be done without are gone, with a sentence.
            trial: as transformers'.
            ignore_keys_for_eval: as transformers'.

        Raises:
            NoCheckpointError: nothing to resume from.
            RunLockedError: another run writes to the output folder.
            PackingError: the model cannot be trained on packed documents.
            TrainingInterrupted: Ctrl-C, SIGTERM, SIGHUP or SIGUSR1; a checkpoint was saved.
            NonFiniteLossError: the loss became NaN or infinite.
            CheckpointError: a checkpoint could not be written, or could not have been, which is
                found out before the first step; those before it are intact.
        """
        with contextlib.ExitStack() as stack:
            if self.args.device.type == "cpu":
                stack.enter_context(heap.kept())
            if self.args.should_save:
                try:
                    stack.enter_context(writing_to(self._run_folder()))
                    checkpoint.clean_up(self._run_folder())
                except RunLockedError:
                    raise
                except CheckpointError:
                    if self.args.save_strategy != SaveStrategy.NO:
                        raise
                    # Only a signal would have something saved; then the folder is named again.
            if self.is_fsdp_enabled:
                sharding.check_state(self.accelerator)
            if self._is_fsdp2():
                sharding.check_model(self._module(), self.args)
                sharding.choose_units(self._module(), self.accelerator.state.fsdp_plugin)
            self.check_saving()
            self.check_packing()
            self.accelerator.wait_for_everyone()
            if self._is_fsdp2() and not self._weights_come_from_the_first():
                sharding.share_start(self._module(), self.args.device)
            advice = sharding.restarts_meet_the_dead()
            if advice is not None and self.is_world_process_zero():
                checkpoint.notify(advice)
            folder: Path | None = None
            if resume_from_checkpoint:
                folder = checkpoint.resolve_checkpoint(resume_from_checkpoint, self._run_folder())
                if self.is_world_process_zero():
                    nothing = f"no checkpoint in {self._run_folder()} yet: starting anew."
                    checkpoint.notify(nothing if folder is None else f"resuming from {folder}.")
            self._has_begun = self._evaluation_due = False
            self._stream = self._stream_before = None
            self._resumed_losses = None if folder is None else self._load_own_state(folder)
            self._saved_step = None
            if folder is not None and folder.parent.resolve() == self._run_folder().resolve():
                name = folder.name.removeprefix("checkpoint-")
                self._saved_step = int(name) if name.isdecimal() else None
            self._stop_request = StopRequest(self._tell_stop)
            if getattr(self.args, "save_on_interrupt", True):
                stack.enter_context(self._stop_request)
            try:
                return super().train(
                    None if folder is None else str(folder), trial, ignore_keys_for_eval
                )
            finally:
                self.is_in_train = False
                if self._stream is not None:
                    self._stream.leave()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers', but whole or not at all, and never with parameters that are lost."""
        sharding.put_back(self._module())  # whoever has called it since the step
        if self._stops_on_nonfinite():
            name = sharding.first_not_finite(self._module().named_parameters())
            if name is not None:
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
                self._save_stream(folder)
            if self.args.should_save:
                self._note_callback_states()
                self.state.save_to_json(str(folder / "trainer_state.json"))
                (folder / STATE_FILE).write_text(json.dumps(self._own_state()))
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = [final] if best is None else [final, Path(best)]
            checkpoint.rotate(run, self.args.save_total_limit, keep)

    def _save_stream(self, folder: Path) -> None:
        if self._stream is None:
            return
        reason = self._stream.save(folder, self.args.process_index)
        if reason is not None:
            checkpoint.notify(f"{reason}. A resumed run will read the stream from its start.")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As transformers', also for weights that it saves under other names than it loads.

        A sharded model's are read by each rank for itself, whatever the ranks that saved them.
        """
        target = self._module() if model is None else model
        if has_other_names(target, resume_from_checkpoint):
            with same_random_numbers_after():
                load_weights(target, resume_from_checkpoint)
        elif self._has_whole_weights():
            read = sharding.load_weights(target, Path(resume_from_checkpoint))
            self._issue_warnings_after_load(read)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _has_whole_weights(self) -> bool:
        """Whether a sharded model's weights are saved whole: else transformers saves all of it."""
        kind = self._is_fsdp2() and self.accelerator.state.fsdp_plugin.state_dict_type
        return "FULL" in str(kind)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As transformers'; under FSDP2 each rank writes its part of the optimizer's state."""
        if not self._has_whole_weights():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer: Any = self.optimizer
        sharding.save_optimizer(self._module(), optimizer, Path(output_dir))
        if self.args.should_save:
            schedule: Any = self.lr_scheduler
            torch.save(schedule.state_dict(), Path(output_dir, "scheduler.pt"))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As transformers', and CheckpointError if a weight that is trained was not loaded."""
        missing = set(load_result.missing_keys)
        if missing:
            model = self._module()
            parameters = dict(model.named_parameters(remove_duplicate=False))
            loaded = {id(p) for name, p in parameters.items() if name not in missing}
            ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
            lost = sorted(
                name
                for name in missing - ignored
                if name in parameters
                and parameters[name].requires_grad
                and id(parameters[name]) not in loaded  # tied to one that was
            )
            if lost:
                raise CheckpointError(
                    f"the checkpoint lacks {len(lost)} of the model's weights, such as {lost[0]}."
                )
        super()._issue_warnings_after_load(load_result)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the best checkpoint found where the run folder is now.

        It is recorded by the path that it had when it was saved.
        """
        result = super()._init_training_state(*args, **kwargs)
        folder = kwargs.get("resume_from_checkpoint", args[3] if len(args) > 3 else None)
        if folder is None:
            return result
        recorded = json.loads((Path(folder) / "trainer_state.json").read_text())
        best = recorded.get("best_model_checkpoint")
        if best is None:
            return result
        beside = Path(folder).resolve().parent / Path(best).name
        if beside.is_dir():
            self.state.best_model_checkpoint = str(self._as_seen_from_run(beside))
        elif self.state.best_model_checkpoint is None and self.is_world_process_zero():
            checkpoint.notify(
                f"the best checkpoint so far, {best}, is gone; the best from here on counts."
            )
            self.state.best_metric = self.state.best_global_step = None
        return result

    def _as_seen_from_run(self, folder: Path) -> Path:
        """A checkpoint of this run by the path that its run folder was given."""
        run = self._run_folder()
        return run / folder.name if folder.parent == run.resolve() else folder

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers', which loads both or, if one is missing, none without a word.

        Each rank reads its part of the optimizer's state, whatever the ranks that saved it.
        """
        whole = self._has_whole_weights()
        in_pieces = checkpoint is not None and sharding.has_pieces(Path(checkpoint))
        ours = whole or (in_pieces and not self.is_fsdp_enabled)
        if not ours:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.is_deepspeed_enabled or (self.is_fsdp_enabled and not whole):
            return
        optimizer, scheduler = Path(checkpoint, "optimizer.pt"), Path(checkpoint, "scheduler.pt")
        has_optimizer = in_pieces or optimizer.is_file()
        if not ours and has_optimizer and scheduler.is_file():
            return
        stepper: Any = self.optimizer
        schedule: Any = self.lr_scheduler
        if has_optimizer:
            sharding.load_optimizer(self._module(), stepper, Path(checkpoint))
        if scheduler.is_file():
            schedule.load_state_dict(torch.load(scheduler, weights_only=True))
            if has_optimizer:
                return
            rates = schedule.get_last_lr()
            for group, rate in zip(stepper.param_groups, rates, strict=True):
                group["lr"] = rate
            return
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            with warnings.catch_warnings():
                # The optimizer has made these steps, before it was saved.
                warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
                for _ in range(self.state.global_step):
                    schedule.step()

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and (
            has_other_names(self._module(), best) or self._has_whole_weights()
        ):
            self._load_from_checkpoint(best)
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
            "evaluation_due": self._evaluation_due,
            "steps_in_bf16": self._steps_in_bf16 if self.args.bf16 is None else None,
            "stream": None if self._stream is None else self._stream.place(self.state.global_step),
        }

    def _load_own_state(self, folder: Path) -> dict[str, float] | None:
        file = folder / STATE_FILE
        if not file.is_file():
            return None  # a checkpoint of transformers' own Trainer
        state = json.loads(file.read_text())
        self._batch_augmentation.load_state_dict(state["augmentation"])
        self._evaluation_due = bool(state.get("evaluation_due", False))
        if self.args.bf16 is None:
            self._steps_were_in_bf16 = state.get("steps_in_bf16")
        self._stream_before = state.get("stream")
        return {"sum": state["loss_since_log"], "step": state["step_of_last_log"]}

    def _run_folder(self) -> Path:
        return Path(self._get_output_dir(trial=None))

    # Before the first step

    def check_saving(self) -> None:
        """Try all that a checkpoint needs, except the weights' bytes; `train` begins with it.

        Raises:
            CheckpointError: something cannot be saved; the message names the file.
        """
        if (
            not self.args.should_save
            or self.args.save_strategy == SaveStrategy.NO
            or self.is_deepspeed_enabled
            or (self.is_fsdp_enabled and not self._has_whole_weights())
        ):
            return
        run = self._run_folder()
        with writing_to(run):
            trial = checkpoint.folder_aside(run / "checkpoint-0")
            shutil.rmtree(trial, ignore_errors=True)
            try:
                trial.mkdir()
                for name, save in self._savers(trial):
                    _rehearse(run, name, save)
            except OSError as error:
                reason = os.strerror(error.errno or 0).lower()
                raise CheckpointError(f"{run} cannot be written to: {reason}.") from error
            finally:
                shutil.rmtree(trial, ignore_errors=True)

    def _savers(self, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
        """The files of a checkpoint, and what writes each to ``folder`` without the weights."""
        model: Any = self._module()
        if isinstance(model, transformers.PreTrainedModel):
            yield "config.json", lambda: model.config.save_pretrained(folder)
            if model.can_generate():
                yield (
                    "generation_config.json",
                    lambda: model.generation_config.save_pretrained(folder),
                )
            yield "model.safetensors", lambda: _check_ties(model)
            yield "model.safetensors", lambda: _save_without_weights(model, folder)
        elif not hasattr(model, "save_pretrained"):
            yield "model.safetensors", lambda: _check_state_dict(model)
        tokenizer: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            yield "tokenizer_config.json", lambda: tokenizer.save_pretrained(folder)
        yield "training_args.bin", lambda: torch.save(self.args, folder / "training_args.bin")
        yield "trainer_state.json", self._check_callback_states

    def _check_before_first_step(self) -> None:
        """What can be checked only now: there are an optimizer and a scheduler."""
        if self._is_fsdp2():
            sharding.check_sharded(self._module())
        if not self.args.should_save or self.args.save_strategy == SaveStrategy.NO:
            return
        if not self.args.save_only_model:
            run = self._run_folder()
            optimizer, scheduler = self.optimizer, self.lr_scheduler
            if optimizer is not None:
                # Not its state, which a resumed run has in full: only what describes it.
                groups = [
                    {name: value for name, value in group.items() if name != "params"}
                    for group in optimizer.param_groups
                ]
                _rehearse(run, "optimizer.pt", lambda: torch.save(groups, io.BytesIO()))
            if scheduler is not None:
                state = scheduler.state_dict()
                _rehearse(run, "scheduler.pt", lambda: torch.save(state, io.BytesIO()))
        self._check_space()

    def _check_callback_states(self) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                json.dumps(callback.state())

    def _check_space(self) -> None:
        """CheckpointError if the disk has less room than a checkpoint is estimated to need."""
        weights = sum(p.nbytes for p in self._module().parameters())
        moments = 0
        wrapped: Any = self.optimizer
        optimizer = getattr(wrapped, "optimizer", wrapped)
        if isinstance(optimizer, (Adam, torch.optim.Adam)) and not self.args.save_only_model:
            width = getattr(optimizer, "state_dtype", None)
            moments = sum(
                p.numel()
                * (p.element_size() if width is None else width.itemsize)
                # Adam's first and second, or Muon's momentum.
                * (1 if group.get("use_muon") else 2)
                for group in optimizer.param_groups
                for p in group["params"]
            )
        free = shutil.disk_usage(self._run_folder()).free
        if weights + moments > free:
            raise CheckpointError(
                f"{self._run_folder()} has {free / 1e6:,.1f} MB free, and a checkpoint takes about "
                f"{(weights + moments) / 1e6:,.1f} MB: model.safetensors {weights / 1e6:,.1f}, "
                f"optimizer.pt {moments / 1e6:,.1f}. Free some space, or use another output folder."
            )

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """As transformers', also for a plain module that holds a parameter under two names."""
        model = self._module()
        if state_dict is None and not hasattr(model, "save_pretrained") and self.args.should_save:
            state_dict = _separate(model.state_dict())
        super()._save(output_dir, state_dict)

    # Signals

    def _tell_stop(self, number: signal.Signals) -> None:
        if self.is_world_process_zero():  # what another was sent is told when the step is done
            name = "" if number == signal.SIGINT else f"{number.name}: "
            checkpoint.notify(
                f"{name}finishing this step, then saving; Ctrl-C again stops at once, without "
                "saving."
            )

    def _stop_if_asked(self, model: nn.Module, trial: Any, save: bool = True) -> None:
        """Save and raise if a signal has asked any of the processes to stop."""
        number = 0 if self._stop_request.received is None else int(self._stop_request.received)
        if self.args.world_size > 1:  # all stop after the same step, or none
            flag = torch.tensor([number], dtype=torch.int64, device=self.args.device)
            number = int(self.accelerator.gather(flag).max())
        if number:
            self._stop(model, trial, signal.Signals(number), save)

    def _stop(self, model: nn.Module, trial: Any, number: signal.Signals, save: bool) -> None:
        step = self.state.global_step
        saved = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{step}"
        by = "" if number == signal.SIGINT else f" by {number.name}"
        if self._saved_step != step and save:
            try:
                self._save_checkpoint(model, trial)
            except (CheckpointError, NonFiniteLossError):
                raise
            except Exception as error:  # of as many kinds as there are things to save
                raise CheckpointError(
                    f"interrupted{by} after step {step}, and {saved} could not be saved: "
                    f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
                ) from error
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        elif self._saved_step != step:
            saved = Path(self.state.best_model_checkpoint or saved)
        message = f"interrupted{by} after step {step}; saved {saved}, from which it can be resumed."
        if self.is_world_process_zero():
            checkpoint.notify(message)
        raise TrainingInterrupted(message, step, saved, number)

    def _finalize_training(self, trial: Any, *rest: Any) -> Any:
        """As transformers'; a signal that came after the last step stops too."""
        self._stop_if_asked(self.model_wrapped, trial)
        result = super()._finalize_training(trial, *rest)
        best_is_loaded = (
            self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        )
        self._stop_if_asked(self.model_wrapped, trial, save=not best_is_loaded)
        return result

    def _make_up_evaluation(
        self,
        model: nn.Module,
        epoch: int,
        trial: Any,
        ignore_keys_for_eval: Any,
        start_time: float,
        resume_from_checkpoint: str,
        **_: Any,
    ) -> None:
        """The evaluation that a signal cut short, so that the run is the uninterrupted one."""
        self._evaluation_due = False
        self._load_rng_state(resume_from_checkpoint)  # the checkpoint is written anew
        self.control.should_log = False
        self.control.should_evaluate = self.control.should_save = True
        self._maybe_log_save_evaluate(
            self._tr_loss, None, model, trial, epoch, ignore_keys_for_eval, start_time
        )


class _EvaluationLeft(Exception):
    """A signal came during an evaluation."""


def _rehearse(run: Path, name: str, save: Callable[[], Any]) -> None:
    try:
        save()
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise CheckpointError(f"{run} cannot be written to: {name}: {reason}.") from error
    except Exception as error:  # of as many kinds as there are things to save
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{name} could not be saved, so there would be no checkpoint; nothing was trained: "
            f"{type(error).__name__}: {reason[:600]}"
        ) from error


def _check_ties(model: Any) -> None:
    """What `save_pretrained` does about shared weights, on those that it would save."""
    state = dict(model.state_dict())
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    with warnings.catch_warnings():
        contract.get("trainer", "remove_tied_weights_from_state_dict")(state, model)


def _save_without_weights(model: Any, folder: Path) -> None:
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict={})
    finally:
        if shown:
            enable_progress_bar()


def _check_state_dict(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        if not torch.is_tensor(value):
            raise TypeError(
                f"{name} of the model's state_dict is no tensor but a {type(value).__name__}"
            )


def _separate(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict in which no two tensors share memory, which safetensors refuses."""
    seen: set[int] = set()
    apart = {}
    for name, value in state.items():
        if torch.is_tensor(value):
            memory = value.untyped_storage().data_ptr()
            value = value.clone() if memory in seen else value
            seen.add(memory)
            value = value.contiguous()
        apart[name] = value
    return apart


@dataclass
class Seq2SeqTrainingArguments(TrainingArguments, transformers.Seq2SeqTrainingArguments):
    """transformers' Seq2SeqTrainingArguments, and the switches of :class:`TrainingArguments`."""


class Seq2SeqTrainer(Trainer, transformers.Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer (``predict_with_generate``) with what :class:`Trainer` adds."""

    _arguments_class = Seq2SeqTrainingArguments


@contextlib.contextmanager
def same_random_numbers_after() -> Iterator[None]:
    """Afterwards Python's, NumPy's and torch's generators are as they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
