"""What a training run says while it runs, and the metrics.jsonl that it leaves behind."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bigkernel.checkpoint import write_file_atomically
from bigkernel.recipes.errors import say
from bigkernel.utilization import WINDOW_SECONDS

# Without a terminal one line in this many seconds: enough to follow, little enough for a log.
LINE_SECONDS = 5.0


def human_bytes(count: float) -> str:
    """A size in the unit that leaves one to three digits before the point."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def human_time(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``; ``?`` for a time that is not known yet."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Throughput:
    """Steps a second over the last ``WINDOW_SECONDS``."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []

    def update(self, now: float, step: int) -> None:
        self._marks.append((now, step))
        # Two marks must stay, however long a step takes.
        while len(self._marks) > 2 and now - self._marks[1][0] >= WINDOW_SECONDS:
            self._marks.pop(0)

    def steps_per_second(self) -> float:
        if len(self._marks) < 2:
            return math.nan
        (t0, s0), (t1, s1) = self._marks[0], self._marks[-1]
        return (s1 - s0) / max(t1 - t0, 1e-9)


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, each with its step; appended to as they come.

    ``kept=False`` writes nothing: of several processes one keeps the file.
    """

    def __init__(self, path: Path, kept: bool = True) -> None:
        self.path, self.kept = path, kept

    def rewind(self, step: int) -> None:
        """Drop what an interrupted run logged after the checkpoint at ``step``."""
        if not self.kept:
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_file_atomically(self.path, text)

    def append(self, record: dict[str, Any]) -> None:
        if self.kept:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON.") from None
    return records


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """Says a line now and then, and puts every logged number into metrics.jsonl.

    What shows progress in another way overrides ``begin``, ``step``, ``show`` and ``close``.

    Args:
        metrics: the file.
        unit: what a step consumes: "tokens" or "images".
    """

    def __init__(self, metrics: MetricsFile, unit: str) -> None:
        self.metrics = metrics
        self.unit = unit
        self.seconds = 0.0
        self._throughput = Throughput()
        self._latest: dict[str, float] = {}
        self._started = self._spoke = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.metrics.rewind(state.global_step)
        self._started = time.monotonic()
        self._throughput.update(self._started, state.global_step)
        self.begin(state.global_step, state.max_steps)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._throughput.update(time.monotonic(), state.global_step)
        self.step(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        names = {"learning_rate": "lr"}
        record = {names.get(k, k): v for k, v in logs.items() if isinstance(v, (int, float))}
        if "train_runtime" in record:  # the summary of the whole run, not a point of a curve
            return
        self._latest.update(record)
        self.metrics.append({"step": state.global_step, **record})
        self.show(state.global_step, state.max_steps)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.seconds = time.monotonic() - self._started
        self.close()

    def begin(self, step: int, steps: int) -> None:
        """Training starts after ``step`` of ``steps``."""

    def step(self, step: int, steps: int) -> None:
        """A step has ended."""

    def show(self, step: int, steps: int) -> None:
        """Something was logged: a line, unless the last one is not long ago."""
        now = time.monotonic()
        if step >= steps or now - self._spoke >= LINE_SECONDS:
            self._spoke = now
            say(f"step {step}/{steps}  {self.text(steps)}")

    def close(self) -> None:
        """Training has ended, also by an exception."""

    def text(self, max_steps: int, width: int | None = None) -> str:
        """What is known, on one line; of ``width`` characters, the more important part of it."""
        parts: dict[str, str] = {}
        for name, shown, form in (
            ("loss", "loss", ".3f"),
            ("eval_loss", "eval_loss", ".3f"),
            ("eval_accuracy", "accuracy", ".1%"),
            ("lr", "lr", ".2e"),
            ("grad_norm", "grad_norm", ".2f"),
        ):
            if name in self._latest:
                parts[name] = f"{shown} {self._latest[name]:{form}}"
        speed = f"{self.unit}_per_second"
        if speed in self._latest:
            parts["speed"] = f"{self._latest[speed]:,.0f} {self.unit}/s"
        if "mfu" in self._latest:
            parts["mfu"] = f"MFU {self._latest['mfu']:.0%}"
        if "memory_bytes" in self._latest:
            parts["memory"] = human_bytes(self._latest["memory_bytes"])
        if self._throughput._marks:
            left = max_steps - self._throughput._marks[-1][1]
            pace = self._throughput.steps_per_second()
            parts["left"] = f"{human_time(left / pace if pace > 0 else math.nan)} left"
        return fitting(parts, width)


# What a narrow terminal is spared, first things first.
_SPARED = ("grad_norm", "memory", "lr", "mfu", "speed", "eval_loss", "eval_accuracy", "loss")


def fitting(parts: Mapping[str, str], width: int | None) -> str:
    """``parts`` in their order, without the least important ones that ``width`` has no room for."""
    kept = dict(parts)
    for name in _SPARED:
        if width is None or len("  ".join(kept.values())) <= width:
            break
        kept.pop(name, None)
    return "  ".join(kept.values())
