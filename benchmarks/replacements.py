"""What each replacement of ``bigkernel.patch`` gives: seconds of a training step, on and off.

    python benchmarks/replacements.py [--model llama|tiny] [--vocab N] [--dtype fp32|bf16|default]
                                      [--weights fp32|bf16|fp16] [--compile] [--rows ROW..]
                                      [--memory]

LLaMA with 16.9M parameters (vocabulary 8192, hidden 384, 6 layers, 6 heads, intermediate 1024),
batch 4 x 512; "tiny" has 32 hidden, 2 layers, batch 2 x 32: there a call's Python counts most. The
dtype "default" leaves bf16 to each Trainer, and "bf16" is its autocast; with 16-bit weights the
model itself is of them, as transformers loads most checkpoints. The rows: transformers' Trainer;
ours with nothing replaced (our AdamW); then with one replacement alone, with all but one, and with
all; for 16-bit weights, all with fp32 weights too. Rounds alternate; shown are the median over the
rounds, the fastest, the seconds of the processor in the cheapest step (which other work on the
machine hardly changes), and the last loss. With --memory,
each row in a process of its own: the memory that training takes at its peak above what the process
held before, parameters and data included.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import transformers
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from bigkernel import Trainer, TrainingArguments, patch
from bigkernel.integrations.patching import NAMES

SIZES = {
    "llama": ({"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024}, 6, 6, 4, 512),
    "tiny": ({"vocab_size": 64, "hidden_size": 32, "intermediate_size": 80}, 2, 4, 2, 32),
}
WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDE = "all, fp32 weights"


class _Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.busy: list[float] = []
        self.loss = float("nan")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self.began[0])
        self.busy.append(time.process_time() - self.began[1])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SIZES, default="llama")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "default"], default="fp32")
    parser.add_argument("--weights", choices=WEIGHTS, default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--rows", nargs="*", default=None)
    parser.add_argument("--vocab", type=int, default=None)
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    sizes, layers, heads, batch, length = SIZES[given.model]
    sizes = {**sizes, "vocab_size": given.vocab or sizes["vocab_size"]}
    steps = 0 if given.memory else given.steps or (4 if given.model == "llama" else 60)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=heads)
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, sizes["vocab_size"], (batch * (steps + 2), length))
    data = [{"input_ids": row, "labels": row} for row in tokens]

    rows: dict[str, tuple[str, ...] | None] = {"transformers": None, "nothing": ()}
    rows |= {f"only {name}": (name,) for name in NAMES}
    rows |= {f"without {name}": tuple(n for n in NAMES if n != name) for name in NAMES}
    rows["all"] = NAMES
    if given.weights != "fp32":
        rows[WIDE] = NAMES
    if given.rows:
        rows = {name: rows[name] for name in given.rows}

    def run(name: str) -> tuple[float, float, float]:
        names = rows[name]
        options: dict[str, Any] = {
            "output_dir": tempfile.gettempdir(),
            "max_steps": steps + 2,
            "per_device_train_batch_size": batch,
            "use_cpu": True,
            **({} if given.dtype == "default" else {"bf16": given.dtype == "bf16"}),
            "torch_compile": given.compile,
            "save_strategy": "no",
            "logging_steps": steps + 2,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        own = copy.deepcopy(model).to(torch.float32 if name == WIDE else WEIGHTS[given.weights])
        trainer: transformers.Trainer
        if names is None:
            arguments = transformers.TrainingArguments(**options)
            trainer = transformers.Trainer(model=own, args=arguments, train_dataset=data)
        else:
            if names:
                patch(own, quiet=True, only=names)
            switches = {"use_bigkernel_attention": False, "use_bigkernel_kernels": False}
            ours = TrainingArguments(**options, **switches, announce=False)
            trainer = Trainer(model=own, args=ours, train_dataset=data)
        clock = _Clock()
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        before = _held()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        if given.memory:
            print(_peak() - before)
            return 0.0, 0.0, clock.loss
        return statistics.median(clock.steps[2:]), min(clock.busy[2:]), clock.loss

    shape = f"vocabulary {sizes['vocab_size']}, {batch} x {length}"
    title = f"{given.model}, weights {given.weights}, {given.dtype}{', compiled' * given.compile}"
    title = f"{title}, {shape}"
    if given.memory and len(rows) == 1:
        run(next(iter(rows)))
        return
    if given.memory:
        print(title)
        peaks = {name: _in_a_process(name) for name in rows}
        print(f"{'':28}  peak MiB     x")
        for name, peak in peaks.items():
            print(f"{name:28} {peak / 2**20:9.0f} {peak / next(iter(peaks.values())):5.2f}")
        return
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    busy: dict[str, list[float]] = {name: [] for name in rows}
    losses = {}
    for _ in range(given.rounds):
        for name in rows:
            took, used, losses[name] = run(name)
            seconds[name].append(took)
            busy[name].append(used)
            torch._dynamo.reset()
    first = next(iter(rows))
    print(title)
    print(f"{'':28}  median ms     x   fastest     x  processor     x  loss")
    for name in rows:
        columns = []
        for find, table in ((statistics.median, seconds), (min, seconds), (min, busy)):
            value = find(table[name])
            columns.append(f"{1e3 * value:9.1f} {find(table[first]) / value:5.2f}")
        print(f"{name:28} {'  '.join(columns)}  {losses[name]:.6f}")


def _held() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_a_process(row: str) -> int:
    command = [sys.executable, *sys.argv, "--rows", row]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
