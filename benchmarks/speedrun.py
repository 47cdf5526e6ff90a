"""The CPU speedrun: seconds of training to 1.53 nats per byte of the demo's held-back text.

    python -m benchmarks.speedrun tune [--sides ..] [--lrs ..] [--lengths ..] [--tuning-seeds N]
    python -m benchmarks.speedrun run  [--sides ..] [--threads N] [--part STEPS]
    python -m benchmarks.speedrun table

The sides are transformers' Trainer with its AdamW, and ours with our AdamW and with Muon. All train
the model of ``bigkernel train text --preset demo`` on its corpus, with the same weights to begin
with, the same batches, weight decay, clipping, warmup and cosine. Theirs gets rows with nothing
but tokens and labels, as scripts for transformers' Trainer cut them, on which SDPA is fastest.

``tune`` finds the learning rate and the number of steps of each side with one budget
(``benchmarks/budget.py``): first the rate, by what is reached after as many steps as the preset
has, then, at that rate, the number of steps, by those until the target is reached. Both are counted
in steps, so a busy machine does no harm. The outcome is ``benchmarks/records/tuning.json``.

``run`` trains each side with three seeds that the tuning has not seen, in turn, each in a process
of its own, and writes an entry of the ledger a side (``benchmarks/ledger.py``). The clock runs from
the call of ``train()``, so that it has all that the first step brings with it; it stands still
while the held-back text is measured, every ten steps. A side that does not reach the target has no
entry. Sides that ``tuning.json`` lacks are tuned first. ``--part STEPS`` trains so many steps of
each side once, without an entry, and says how long tuning and runs take.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from benchmarks import ledger
from benchmarks.budget import RATES, choose, try_all
from bigkernel import patch
from bigkernel.bench import machine
from bigkernel.recipes import text
from bigkernel.recipes.errors import quietly
from bigkernel.recipes.models import quiet_transformers
from bigkernel.recipes.settings import TextSettings, gather
from bigkernel.recipes.training import Task
from bigkernel.trainer import Trainer, TrainingArguments, same_random_numbers_after

# By name, the optimizer; None is transformers' Trainer and its own AdamW.
SIDES = {ledger.BASELINE: None, "bigkernel-adamw": "adamw", "bigkernel-muon": "muon"}
LENGTHS = [200, 240, 280, 330, 380, 440, 510, 590, 690]
EVERY = 10  # steps between two looks at the held-back text


@dataclass(frozen=True)
class Run:
    """One training: which side, and what it is told."""

    side: str
    seed: int
    lr: float
    steps: int  # of the schedule
    every: int = EVERY
    target: float = ledger.TARGET
    part: int = 0  # stop after so many steps


class _Watch(TrainerCallback):
    """A clock that stands still while the held-back text is measured; stops at the target."""

    def __init__(self, run: Run, task: Task) -> None:
        self.run, self.task = run, task
        # Of one kind for all sides, beside the model that is trained.
        self.judge = patch(copy.deepcopy(task.model), quiet=True).eval()
        self.log: list[dict[str, float]] = []
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        now, step = time.perf_counter(), state.global_step
        if step % self.run.every == 0 or step == self.run.steps:
            self.judge.load_state_dict(model.state_dict())
            with same_random_numbers_after():
                figures = text.measure(self.judge, self.task.held_back, 16)
            reached = figures["nats_per_byte"]
            seconds = round(now - self.began, 4)
            self.log.append({"step": step, "seconds": seconds, "nats_per_byte": round(reached, 5)})
            control.should_training_stop |= reached <= self.run.target
        control.should_training_stop |= step == self.run.part
        self.began += time.perf_counter() - now


def train(run: Run) -> list[dict[str, float]]:
    """What was measured: the step, seconds of training until then, nats per byte."""
    settings = gather("train text", {"seed": run.seed, "lr": run.lr, "max_steps": run.steps})
    assert isinstance(settings, TextSettings)
    with tempfile.TemporaryDirectory() as folder, quietly(), quiet_transformers():
        task = text.prepare(settings, Path(folder) / "run", {})
        watch = _Watch(run, task)
        trainer = _trainer(run, task, folder)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        watch.began = time.perf_counter()
        trainer.train()
    return watch.log


def _trainer(run: Run, task: Task, folder: str) -> transformers.Trainer:
    settings, optim = task.settings, SIDES[run.side]
    options: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": run.steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": run.lr,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": settings.min_lr},
        "warmup_steps": round(settings.warmup * run.steps),
        "weight_decay": settings.weight_decay,
        "adam_beta2": settings.beta2,
        "max_grad_norm": settings.max_grad_norm,
        "seed": run.seed,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": EVERY,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    given: dict[str, Any] = {"model": task.model, "train_dataset": task.train}
    if optim is None:
        arguments = transformers.TrainingArguments(**options)
        return transformers.Trainer(args=arguments, data_collator=_rows, **given)
    ours = TrainingArguments(
        **options, announce=False, **({"optim": optim} if optim == "muon" else {})
    )
    return Trainer(args=ours, data_collator=task.collate, **given)


def _rows(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "labels")}


def steps_to_target(log: Sequence[dict[str, float]], target: float) -> float:
    """The step at which the target was reached; infinity if it was not."""
    last = log[-1]
    return last["step"] if last["nats_per_byte"] <= target else math.inf


def alone(run: Run) -> list[dict[str, float]]:
    """`train` in a process of its own, with as many threads as this one has."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.speedrun", "_train"]
    given = [json.dumps(asdict(run)), str(torch.get_num_threads())]
    done = subprocess.run(
        [*command, *given], cwd=ledger.ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{run.side} with seed {run.seed} fails in a process of its own")
    log: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return log


def tune(sides: list[str], lrs: list[float], lengths: list[float], seeds: int) -> dict[str, Any]:
    """Of each side the rate and the number of steps to train with, and all that was tried."""
    usual = gather("train text", {}).max_steps
    assert usual is not None

    def loss(side: str, lr: float, seed: int) -> float:
        reached = train(Run(side, seed, lr, usual, every=usual, target=0.0))[-1]["nats_per_byte"]
        print(f"{side} lr {lr:g} seed {seed}: {reached:.4f} after {usual} steps", flush=True)
        return reached

    by_rate = try_all(sides, lrs, range(seeds), loss)
    rates = choose(by_rate, "--lrs")

    def steps(side: str, length: float, seed: int) -> float:
        log = train(Run(side, seed, rates[side], int(length)))
        reached = steps_to_target(log, ledger.TARGET)
        last = f"{log[-1]['nats_per_byte']:.4f} at step {log[-1]['step']}"
        print(f"{side} lr {rates[side]:g}, {length:g} steps, seed {seed}: {last}", flush=True)
        return reached

    by_length = try_all(sides, lengths, range(seeds), steps)
    chosen = choose(by_length, "--lengths")
    return {
        side: {
            "lr": rates[side],
            "steps": int(chosen[side]),
            "seeds": list(range(seeds)),
            f"nats_per_byte_after_{usual}_steps_by_lr": by_rate[side],
            # A length that does not reach the target has no number of steps.
            "steps_to_target_by_length": {
                length: [None if math.isinf(n) else int(n) for n in tried]
                for length, tried in by_length[side].items()
            },
        }
        for side in sides
    }


def estimate(sides: list[str], part: int) -> None:
    """Train ``part`` steps of each side, and say how long tuning and runs will take."""
    usual = gather("train text", {})
    assert isinstance(usual, TextSettings)
    assert usual.max_steps is not None
    steps = {"tune": len(RATES) * usual.max_steps + sum(LENGTHS)}
    steps["run"] = ledger.SEEDS * usual.max_steps
    minutes = dict.fromkeys(steps, 0.0)
    for side in sides:
        log = alone(Run(side, 0, usual.lr, usual.max_steps, every=part, part=part))
        pace = log[-1]["seconds"] / part
        print(f"{side}: {pace:.3f} s a step", flush=True)
        for what, count in steps.items():
            minutes[what] += count * pace / 60
    print(
        f"tune: {minutes['tune']:.0f} minutes of training at most; run: {minutes['run']:.0f}, and "
        "nearly as long again for the looks at the held-back text"
    )


def run(tuned: dict[str, Any], sides: list[str], records: Path) -> None:
    """The sides in turn, each with every seed, and an entry of the ledger for each side."""
    unseen = 1 + max(seed for side in sides for seed in tuned[side]["seeds"])
    facts = machine.facts()  # its time is that of the session
    logs: dict[str, dict[int, list[dict[str, float]]]] = {side: {} for side in sides}
    for i in range(ledger.SEEDS):
        for side in sides[i % len(sides) :] + sides[: i % len(sides)]:
            seed = unseen + i
            log = alone(Run(side, seed, tuned[side]["lr"], tuned[side]["steps"]))
            logs[side][seed] = log
            last = log[-1]
            print(
                f"{side} seed {seed}: {last['nats_per_byte']:.4f} at step {last['step']} after "
                f"{last['seconds']:.2f} s of training",
                flush=True,
            )
    for side in sides:
        missed = [
            seed
            for seed, log in logs[side].items()
            if math.isinf(steps_to_target(log, ledger.TARGET))
        ]
        if missed:
            print(f"{side}: no entry, seeds {missed} did not reach {ledger.TARGET} nats per byte")
            continue
        settings = {name: tuned[side][name] for name in ("lr", "steps")}
        facts_of_side = {"side": side, "optimizer": SIDES[side] or "adamw", **settings}
        corpus = text.facts(text.read(None))["sha256"]
        command = f"python -m benchmarks.speedrun run --threads {torch.get_num_threads()}"
        entry = {**facts_of_side, "corpus": corpus, "command": command, **facts}
        print(f"written: {ledger.write(entry, logs[side], records)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["tune", "run", "table"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--lrs", nargs="+", type=float, default=RATES)
    parser.add_argument("--lengths", nargs="+", type=float, default=LENGTHS)
    parser.add_argument("--tuning-seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--records", type=Path, default=ledger.RECORDS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    tuned = json.loads(ledger.TUNED.read_text()) if ledger.TUNED.exists() else {}
    again = given.sides if given.what == "tune" else [n for n in given.sides if n not in tuned]
    if given.what == "table":
        print(ledger.table(ledger.entries(given.records)), end="")
    elif given.part:
        estimate(given.sides, given.part)
    else:
        if again:
            tuned |= tune(again, given.lrs, given.lengths, given.tuning_seeds)
            ledger.TUNED.parent.mkdir(exist_ok=True)
            ledger.TUNED.write_text(json.dumps(tuned, indent=1) + "\n")
        if given.what == "run":
            run(tuned, given.sides, given.records)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["_train"]:
        torch.set_num_threads(int(sys.argv[3]))
        print(json.dumps(train(Run(**json.loads(sys.argv[2])))))
    else:
        sys.exit(main())
