"""What the demo's models reach with AdamW and with Muon, each tuned with the same budget.

    python -m benchmarks.muon_against_adamw [--task text|images] [--lrs LR ..] [--tuning-seeds N]
                                            [--seeds N] [--steps N] [--threads N] [--json FILE]

Both get the same learning rates, schedule, batches, weight decay, clipping and steps: those of
the preset demo. Each rate is tried with ``--tuning-seeds`` seeds, and the rate with the lowest mean
loss on the part held back is chosen, for each optimizer its own (``benchmarks/budget.py``). The
chosen ones train again with ``--seeds`` seeds that the choice has not seen.

Shown are the loss on the part held back (nats per token or image), the mean over the seeds with the
lowest and the highest, and the median seconds of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.budget import RATES, choose, try_all
from bigkernel.recipes import train_images, train_text
from bigkernel.recipes.progress import TrainingProgress

OPTIMIZERS = ("adamw", "muon")
TRAIN = {"text": train_text, "images": train_images}


class _Clock(TrainingProgress):
    """Seconds of each step; says nothing."""

    seconds_of_steps: list[float] = []  # noqa: RUF012 - of the run that goes on

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def step(self, step: int, steps: int) -> None:
        self.seconds_of_steps.append(time.perf_counter() - self.began)

    def show(self, step: int, steps: int) -> None:
        pass


def run(task: str, optim: str, lr: float, seed: int, **settings: Any) -> tuple[float, float]:
    """(loss on the part held back, median seconds of a step)."""
    _Clock.seconds_of_steps = []
    with tempfile.TemporaryDirectory() as folder:
        usual = {"preset": "demo", "quiet": True, "progress": _Clock, "out": Path(folder) / "run"}
        done = TRAIN[task](optim=optim, lr=lr, seed=seed, **usual, **settings)
    assert done.figures is not None
    return done.figures["loss"], statistics.median(_Clock.seconds_of_steps)


def shown(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TRAIN, default="text")
    parser.add_argument("--lrs", nargs="+", type=float, default=None)
    parser.add_argument("--tuning-seeds", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    rates = sorted(given.lrs or RATES[given.task])
    settings: dict[str, Any] = {"threads": given.threads, "max_steps": given.steps}

    def score(optim: str, lr: float, seed: int) -> float:
        loss, seconds = run(given.task, optim, lr, seed, **settings)
        print(f"{optim} lr {lr:g} seed {seed}: {loss:.4f}, {seconds:.3f} s a step", flush=True)
        return loss

    losses = try_all(OPTIMIZERS, rates, range(given.tuning_seeds), score)
    best = choose(losses, "--lrs")
    finals: dict[str, list[float]] = {optim: [] for optim in OPTIMIZERS}
    paces: dict[str, list[float]] = {optim: [] for optim in OPTIMIZERS}
    for seed in range(given.tuning_seeds, given.tuning_seeds + given.seeds):
        for optim in OPTIMIZERS:
            loss, seconds = run(given.task, optim, best[optim], seed, **settings)
            finals[optim].append(loss)
            paces[optim].append(seconds)
    print(f"\n| optimizer | {' | '.join(f'lr {lr:g}' for lr in rates)} | chosen, "
          f"{given.seeds} new seeds | seconds a step |")  # fmt: skip
    print(f"|---|{'---|' * len(rates)}---|---|")
    for optim in OPTIMIZERS:
        tried = " | ".join(f"{statistics.mean(losses[optim][lr]):.4f}" for lr in rates)
        chosen = f"lr {best[optim]:g}: {shown(finals[optim])}"
        print(f"| {optim} | {tried} | {chosen} | {statistics.median(paces[optim]):.3f} |")
    if given.json is not None:
        options = {key: str(value) for key, value in vars(given).items()}
        record = {"options": options, "tuning": losses, "best": best, "final": finals}
        given.json.write_text(json.dumps({**record, "seconds_a_step": paces}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
