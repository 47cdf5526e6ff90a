"""Where the time of a training step goes, op by op, in groups that both Trainers have.

torch.profiler watches the steps after the first ones. An op counts for the outermost name around it
that stands in a group: what a matrix product is made of counts as products. In transformers' model,
whose norms, head and loss are made of many small ops, these parts are marked by hooks; in ours they
are ops themselves, and hooks would keep some from being used. A backward op counts where the
forward op of its number does. What is left of the time is Python's between the ops.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback

PYTHON = "Python, and the rest"
# By the beginning of a name. The first group that has one counts.
GROUPS: dict[str, tuple[str, ...]] = {
    "head and loss": (
        "bigkernel::linear_cross_entropy", "bigkernel::cross_entropy", "aten::cross_entropy",
        "aten::log_softmax", "aten::_log_softmax", "aten::nll_loss",
    ),
    "optimizer": ("Optimizer.", "bigkernel::adam", "bigkernel::muon", "aten::_fused_adam"),
    "attention": (
        "bigkernel::attention", "aten::scaled_dot_product_attention", "aten::_scaled_dot_product",
    ),
    "norms": (
        "bigkernel::norm", "bigkernel::rms_norm", "bigkernel::layer_norm", "aten::rms_norm",
        "aten::layer_norm", "aten::native_layer_norm",
    ),
    "products": (
        "bigkernel::linear", "aten::linear", "aten::matmul", "aten::mm", "aten::addmm", "aten::bmm",
        "aten::baddbmm", "aten::conv", "aten::_conv", "mkldnn::",
    ),
    "data": ("enumerate(DataLoader", "bigkernel::augment"),
    "activations, rotations, sums": (
        "bigkernel::", "aten::add", "aten::mul", "aten::div", "aten::sub", "aten::neg", "aten::cat",
        "aten::silu", "aten::gelu", "aten::sigmoid", "aten::tanh", "aten::pow", "aten::rsqrt",
        "aten::mean", "aten::sum", "aten::cos", "aten::sin", "aten::exp", "aten::dropout",
    ),
    "copies and conversions": (
        "aten::to", "aten::_to_copy", "aten::copy_", "aten::clone", "aten::contiguous",
        "aten::zero", "aten::fill_", "aten::empty", "aten::new_", "aten::ones", "aten::full",
        "torch::autograd::AccumulateGrad",
    ),
    "compiled code": ("## Call CompiledFxGraph", "CompiledFunction", "Torch-Compiled Region"),
}  # fmt: skip
NAMES = (*GROUPS, PYTHON)
_MARK = "bigkernel.bench: "


class Profile(TrainerCallback):  # type: ignore[misc]
    """Watches a training from the end of step ``warm`` to its last one."""

    def __init__(self, trainer: Any, warm: int) -> None:
        self._warm = warm
        self._watch = torch.profiler.profile(activities=[ProfilerActivity.CPU])
        self._seconds = 0.0
        self._steps = 0
        trainer.add_callback(self)
        for name, group in (("_clip_grad_norm", "optimizer"), ("get_batch_samples", "data"),
                            ("_prepare_inputs", "data")):  # fmt: skip
            setattr(trainer, name, _marked(group, getattr(trainer, name)))

    def mark_parts(self, model: Any) -> None:
        """Name the parts of a model that has none of our ops."""
        for module in model.modules():
            if "Norm" in type(module).__name__:
                _mark_calls("norms", module)
        if isinstance(model, PreTrainedModel):
            for head in (model.get_output_embeddings(), getattr(model, "classifier", None)):
                if isinstance(head, torch.nn.Module):
                    _mark_calls("head and loss", head)
            model.loss_function = _marked("head and loss", model.loss_function)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._warm:
            self._watch.start()
            self._seconds = -time.perf_counter()
        elif state.global_step == state.max_steps:
            self._seconds += time.perf_counter()
            self._watch.stop()
            self._steps = state.global_step - self._warm

    def groups(self) -> dict[str, float]:
        """Seconds of a step, by group; they add up to the step."""
        found = summed(self._watch.events() or ())
        found[PYTHON] = max(self._seconds - sum(found.values()), 0.0)
        return {name: found.get(name, 0.0) / self._steps for name in NAMES}


def _marked(group: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def marked(*arguments: Any, **options: Any) -> Any:
        with record_function(_MARK + group):
            return call(*arguments, **options)

    return marked


def _mark_calls(group: str, module: torch.nn.Module) -> None:
    marks = contextlib.ExitStack()

    def enter(*_: Any) -> None:
        marks.enter_context(record_function(_MARK + group))

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(lambda *_: marks.close())


@functools.cache  # a step has thousands of ops, with few names
def group_of(name: str) -> str | None:
    """The group of an op, or of a mark; None belongs to what is around it."""
    if name.startswith(_MARK):
        return name.removeprefix(_MARK)
    return next((group for group, begins in GROUPS.items() if name.startswith(begins)), None)


def summed(events: Iterable[Any]) -> dict[str, float]:
    """Seconds by group, of the profiler's events; what is in no group is left out."""
    events = list(events)
    forward: dict[int, str] = {}
    own: list[tuple[Any, str | None, int]] = []
    for event in events:
        group, number = None, -1
        around = event
        while around is not None:  # outwards, so that the outermost one stays
            group = group_of(around.name) or group
            if around.name.startswith("autograd::engine::evaluate_function"):
                number = around.sequence_nr
            around = around.cpu_parent
        own.append((event, group, number))
        if number < 0 and group is not None and event.sequence_nr >= 0:
            forward[event.sequence_nr] = group
    found: dict[str, float] = {}
    for event, group, number in own:
        group = forward.get(number, group)
        if group is not None:
            found[group] = found.get(group, 0.0) + event.self_cpu_time_total * 1e-6
    return found
