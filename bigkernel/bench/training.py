"""One training with our Trainer or with transformers', and what it takes.

Seconds are taken from the end of step WARM on. In a process of its own (``alone``) a training also
says what memory it takes at its peak and where the time of a step goes.
"""

import contextlib
import copy
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from bigkernel.bench.case import REFERENCE, Alone, Case, strict
from bigkernel.bench.profile import Profile
from bigkernel.recipes import models
from bigkernel.trainer import Trainer, TrainingArguments

WARM = 3  # steps that are not timed
PARTS = ("data", "forward", "backward", "update")
_RESET, _STATUS = "/proc/self/clear_refs", "/proc/self/status"


@dataclass
class Training:
    """What both Trainers are given, and what each of them alone.

    options, their_options: of TrainingArguments. collate, their_collate: data collators. ours:
    arguments of our Trainer. packing: ours packs. skipped: why theirs can't be run. losses: those
    of the last run, by name.
    """

    model: Any
    data: Any
    options: dict[str, Any]
    collate: Callable[..., Any] | None = None
    their_collate: Callable[..., Any] | None = None
    ours: dict[str, Any] = field(default_factory=dict)
    their_options: dict[str, Any] = field(default_factory=dict)
    packing: bool = False
    skipped: str = ""
    losses: dict[str, list[float]] = field(default_factory=dict)

    def run_ours(self, name: str, **options: Any) -> float:
        """Seconds of the timed steps; the losses go to ``losses[name]``."""
        options = {"packing": self.packing, **options}
        padded = self.packing and not options["packing"]
        with _arguments({**self.options, **options}) as arguments:
            model = copy.deepcopy(self.model)
            measuring = _Measuring()
            trainer = Trainer(
                model=model,
                args=TrainingArguments(**arguments, announce=False),
                train_dataset=self.data,
                data_collator=self.their_collate if padded else self.collate,
                **self.ours,
            )
            return self._timed(name, trainer, measuring)

    def run_theirs(self, name: str) -> float:
        with _arguments({**self.options, **self.their_options}) as arguments:
            model = copy.deepcopy(self.model)
            measuring = _Measuring()
            trainer = transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(**arguments),
                train_dataset=self.data,
                data_collator=self.their_collate,
            )
            return self._timed(name, trainer, measuring)

    def _timed(self, name: str, trainer: transformers.Trainer, measuring: "_Measuring") -> float:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(measuring)
        measuring.watch_backward(trainer.accelerator)
        profile = None
        if _profiles:
            profile = Profile(trainer, WARM)
            if not isinstance(trainer, Trainer):
                profile.mark_parts(trainer.model)
        with contextlib.redirect_stdout(io.StringIO()), models.quiet_transformers():
            trainer.train()
        torch._dynamo.reset()  # the next model is another one
        self.losses[name] = measuring.losses
        global _latest, _groups
        _latest, _groups = measuring, None if profile is None else profile.groups()
        return measuring.seconds


@contextlib.contextmanager
def _arguments(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    usual = {
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        yield {**usual, **options, "output_dir": folder}


class _Measuring(TrainerCallback):  # type: ignore[misc]
    """Seconds from the end of step WARM on, in all and by the part of a step; losses; memory.

    A callback before the step of the optimizer would change how our Trainer clips, so clipping
    counts as a part of the update.
    """

    def __init__(self) -> None:
        self.seconds, self.losses = 0.0, []  # type: float, list[float]
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self.held = _held_since_now()
        self._last = self._begin = 0.0
        self._counts = False

    @property
    def peak(self) -> int | None:
        """Bytes of memory above those that were held when this was made."""
        return None if self.held is None else _status("VmHWM") - self.held

    def watch_backward(self, accelerator: Any) -> None:
        backward = accelerator.backward

        def timed(*arguments: Any, **options: Any) -> None:
            self._ends("forward")
            backward(*arguments, **options)
            self._ends("backward")

        accelerator.backward = timed

    def _ends(self, part: str) -> None:
        now = time.perf_counter()
        if self._counts:
            self.parts[part] += now - self._last
        self._last = now

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends("data")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends("update")
        self.seconds = self._last - self._begin
        self.steps += self._counts
        if state.global_step == WARM:
            self._begin, self._counts = self._last, True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


# Of this process: whether runs are taken apart op by op, and what the last one was.
_profiles = False
_latest: _Measuring | None = None
_groups: dict[str, float] | None = None


def _status(name: str) -> int:
    """Bytes, by Linux's account of this process."""
    with open(_STATUS, encoding="ascii") as file:
        return 1024 * int(file.read().split(f"{name}:")[1].split()[0])


def _held_since_now() -> int | None:
    """Bytes that the process holds; its peak is counted anew. None where Linux is not."""
    if not os.path.exists(_RESET):
        return None
    with open(_RESET, "w", encoding="ascii") as file:
        file.write("5")
    return _status("VmRSS")


def alone(case: str, small: bool, profile: bool = False) -> Callable[[str], Alone]:
    """Measures a competitor of the case ``case`` of the table "train" in a process of its own.

    ``profile``: the parts of a step are then the groups of `bigkernel.bench.profile`.
    """
    flags = [*(["small"] if small else []), *(["profile"] if profile else [])]

    def measure(competitor: str) -> Alone:
        given = [case, competitor, str(torch.get_num_threads()), *flags]
        code = f"import sys; from {__name__} import _tell; _tell(*sys.argv[1:])"
        command = [sys.executable, "-W", "ignore", "-c", code, *given]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{case!r} with {competitor} fails in a process of its own")
        return Alone(**json.loads(done.stdout.splitlines()[-1]))

    return measure


def profiled(case: Case, small: bool = False) -> dict[str, Alone]:
    """Each side of a case of the table "train" with the parts of a step by group of ops."""
    measure = alone(case.name, small, profile=True)
    return {name: measure(name) for name in case.build().runs if name != REFERENCE}


def _tell(case: str, competitor: str, threads: str, *flags: str) -> None:
    """Trains, and prints an `Alone` as JSON."""
    from bigkernel.bench.suite import cases_of  # whose cases import this module

    global _profiles
    _profiles = "profile" in flags
    torch.set_num_threads(int(threads))
    (found,) = (c for c in cases_of("train", "small" in flags) if c.name == case)
    with strict():
        found.build().runs[competitor]()
    assert _latest is not None
    parts = _groups
    if parts is None:
        parts = {name: seconds / _latest.steps for name, seconds in _latest.parts.items()}
    print(json.dumps(asdict(Alone(_latest.peak, parts, _latest.losses, _latest.seconds))))
