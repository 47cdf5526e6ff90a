"""What a training step costs on N GPUs, on paper: compute, memory and bytes on the wire.

``python -m benchmarks.scaling`` prints the tables of docs/scaling.md, which says what is assumed.
``python -m benchmarks.scaling --measure 2`` counts and times steps of so many processes on the CPU
(gloo) beside what is predicted for them.

The bytes are those of torch's DistributedDataParallel and ``fully_shard`` as the Trainer uses them:
a test compares them with the counted ones, to the byte. Times and memory are estimates.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

KINDS = ("ddp", "fsdp2")
RANKS = (8, 64, 512, 4096)
NODE = 8  # GPUs that NVLink connects

# Assumed, not measured.
SHARE = 0.5  # of the peak that the products of a step reach
HOP_INSIDE, HOP_BETWEEN = 3e-6, 14e-6  # seconds from one GPU to the next, in a node and between


@dataclass(frozen=True)
class Gpu:
    """By its data sheet. Rates are a second; links are one direction of one GPU."""

    name: str
    flops: float  # bfloat16, dense
    memory: float  # bytes
    bandwidth: float  # bytes, of the memory
    inside: float  # bytes, NVLink
    between: float  # bytes, its network card


GPUS = (
    Gpu("A100 80GB SXM", 312e12, 80e9, 2.0e12, 300e9, 25e9),
    Gpu("H100 SXM", 989e12, 80e9, 3.35e12, 450e9, 50e9),
    Gpu("H200 SXM", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    Gpu("B200 SXM", 2250e12, 180e9, 8.0e12, 900e9, 50e9),
)


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered as one, each as (rows, numbers in a row).

    again: whether they are given up after the forward pass and gathered again for the backward.
    """

    shapes: tuple[tuple[int, int], ...]
    again: bool

    def numel(self, ranks: int = 1) -> int:
        """Numbers of all ranks together, where each holds as many rows as the one with most."""
        return sum(ranks * math.ceil(rows / ranks) * row for rows, row in self.shapes)


@dataclass(frozen=True)
class Decoder:
    """A LLaMA by its shapes: grouped queries, gated units, no biases, a head of its own."""

    name: str
    vocab: int
    width: int
    inner: int
    layers: int
    heads: int
    groups: int  # of keys and values
    checkpoints: bool = False  # whether activations are computed again in the backward pass

    def units(self) -> list[Unit]:
        """As accelerate cuts it: the embedding, each layer, and the last norm with the head."""
        w, kv = self.width, self.width // self.heads * self.groups
        attention = ((w, w), (kv, w), (kv, w), (w, w))
        gated = ((self.inner, w), (self.inner, w), (w, self.inner))
        layer = Unit((*attention, *gated, (w, 1), (w, 1)), again=True)
        ends = Unit(((self.vocab, w),), again=True), Unit(((w, 1), (self.vocab, w)), again=False)
        return [ends[0], *[layer] * self.layers, ends[1]]

    def parameters(self) -> int:
        return sum(unit.numel() for unit in self.units())

    def config(self) -> Any:
        """transformers' own of this model."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
        )

    def flops(self, tokens: int, length: int) -> float:
        """Of a step on so many tokens in documents of ``length``, as bigkernel.utilization counts.

        With what checkpointing computes again.
        """
        shapes = [shape for unit in self.units()[1:] for shape in unit.shapes]  # of products
        weights = sum(rows * row for rows, row in shapes if row > 1)
        once = 6.0 * weights * tokens + 12.0 * self.layers * self.width * tokens * length
        return once * (4 / 3 if self.checkpoints else 1)

    def activations(self, tokens: int) -> float:
        """Bytes kept for the backward pass, in bfloat16, by fused attention, norms and gates."""
        kv = self.width // self.heads * self.groups
        layer = 2.0 * tokens * (6 * self.width + 2 * kv + 3 * self.inner)
        if self.checkpoints:
            return 2.0 * tokens * self.width * self.layers + layer
        return layer * self.layers


MODELS = (
    Decoder("LLaMA 1B", 128256, 2048, 8192, 16, 32, 8),
    Decoder("LLaMA 8B", 128256, 4096, 14336, 32, 32, 8),
    Decoder("LLaMA 70B", 128256, 8192, 28672, 80, 64, 8, checkpoints=True),
)


# Bytes


def messages(
    units: list[Unit],
    kind: str,
    ranks: int,
    *,
    batches: int = 1,
    parameter: int = 4,
    gradient: int = 4,
) -> dict[str, int]:
    """Bytes of the tensors that collectives work on in a step, of one rank.

    Args:
        units: what is gathered as one.
        kind: ddp or fsdp2.
        ranks: how many.
        batches: that are accumulated for a step.
        parameter: bytes of a number in which parameters are gathered.
        gradient: bytes of a number in which gradients are summed.

    Returns:
        by collective; of all_gather the result, of reduce_scatter what is summed.
    """
    if kind == "ddp":
        tensors = sum(len(unit.shapes) for unit in units)
        # One number of 4 bytes a parameter says which were used (find_unused_parameters).
        return {"all_reduce": sum(unit.numel() for unit in units) * gradient + 4 * tensors}
    gathered = sum(unit.numel(ranks) * (2 if unit.again else 1) for unit in units)
    return {
        "all_gather": gathered * parameter * batches,
        "reduce_scatter": sum(unit.numel(ranks) for unit in units) * gradient,
        "all_reduce": 8,  # the norm for clipping
    }


def wire(sizes: dict[str, int], ranks: int) -> float:
    """Bytes that each rank sends, and receives, in rings."""
    times = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
    return sum(times[name] * size for name, size in sizes.items()) * (ranks - 1) / ranks


# Times


@dataclass(frozen=True)
class Step:
    """An estimate. Seconds of computing and communicating, and bytes of memory a GPU."""

    kind: str
    computing: float
    communicating: float
    memory: float

    @property
    def at_best(self) -> float:
        """With all that can hide behind computing hidden: DDP sums in the backward pass alone."""
        hides = self.computing * (2 / 3 if self.kind == "ddp" else 1)
        return self.computing - hides + max(hides, self.communicating)

    @property
    def at_worst(self) -> float:
        return self.computing + self.communicating


def seconds(gpu: Gpu, name: str, size: float, ranks: int) -> float:
    """Of one collective: what the slower kind of link needs, and the hops of a ring or tree."""
    nodes = max(1, ranks // NODE)
    times = 2 if name == "all_reduce" else 1
    inside = times * size * (ranks - 1) / ranks / gpu.inside
    # All cards of a node share what passes between nodes.
    between = times * size * (nodes - 1) / nodes / (NODE * gpu.between)
    hops = times * ((ranks - nodes) * HOP_INSIDE + (nodes - 1) * HOP_BETWEEN)
    if name == "all_reduce":
        hops = min(hops, 2 * ((NODE - 1) * HOP_INSIDE + math.log2(nodes) * HOP_BETWEEN))
    return max(inside, between) + hops


def step(model: Decoder, gpu: Gpu, kind: str, ranks: int, tokens: int, length: int) -> Step:
    """bfloat16, float32 parameters and AdamW; ``tokens`` are those of a GPU."""
    units, count = model.units(), model.parameters()
    sizes = messages(units, kind, ranks, parameter=2, gradient=4 if kind == "ddp" else 2)
    held = count if kind == "ddp" else count / ranks
    # AdamW reads parameter, gradient and two moments, and writes all but the gradient.
    computing = model.flops(tokens, length) / (gpu.flops * SHARE) + 28 * held / gpu.bandwidth
    memory = 16 * held + model.activations(tokens)
    if kind == "ddp":
        # Buckets, and the copies of weights in bfloat16.
        memory += (4 + 2) * count
        calls = {"all_reduce": math.ceil(sizes["all_reduce"] / 25e6)}
    else:
        # Two units and the last one whole, one's gradients; logits and their gradient.
        largest = max(unit.numel() for unit in units)
        memory += 2 * (2 * largest + units[-1].numel() + largest) + 6 * tokens * model.vocab
        again = sum(unit.again for unit in units)
        calls = {"all_gather": len(units) + again, "reduce_scatter": len(units), "all_reduce": 1}
    communicating = sum(
        calls[name] * seconds(gpu, name, size / calls[name], ranks) for name, size in sizes.items()
    )
    return Step(kind, computing, communicating, memory)


# Tables


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def bytes_table() -> str:
    rows = []
    for model in MODELS:
        for kind in KINDS:
            sent = [
                wire(
                    messages(model.units(), kind, n, parameter=2, gradient=4 - 2 * (kind != "ddp")),
                    n,
                )
                for n in RANKS
            ]
            size = f"{model.name}, {model.parameters() / 1e9:.2f}B"
            rows.append([size, kind, *(f"{x / 1e9:,.2f}" for x in sent)])
    return _table(["model", "GB sent a step", *(f"{n:,} GPUs" for n in RANKS)], rows)


def steps_table(tokens: int = 8192, length: int = 8192) -> str:
    rows = []
    for model in MODELS:
        for gpu in GPUS:
            for kind in KINDS:
                cells = []
                for ranks in RANKS:
                    at = step(model, gpu, kind, ranks, tokens, length)
                    share = [100 * at.computing / t for t in (at.at_worst, at.at_best)]
                    fits = f"{share[0]:.0f} to {share[1]:.0f}%, {at.memory / 1e9:.0f} GB"
                    cells.append(fits if at.memory < gpu.memory else f"({at.memory / 1e9:.0f} GB)")
                if any("%" in cell for cell in cells):
                    one = step(model, gpu, kind, NODE, tokens, length).computing
                    rows.append([model.name, gpu.name, kind, f"{1e3 * one:,.0f}", *cells])
    return _table(["model", "GPU", "", "computing, ms", *(f"{n:,} GPUs" for n in RANKS)], rows)


# Measured


def counter() -> Any:
    """A context that adds up the bytes of the collectives called in it, by name: ``.sizes``."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    # Which argument has the bytes of `messages`.
    names = {
        "allreduce_": ("all_reduce", 0),
        "_allgather_base_": ("all_gather", 0),
        "_reduce_scatter_base_": ("reduce_scatter", 1),
        "allgather_": ("all_gather of numbers", 0),
        "broadcast_": ("broadcast", 0),
    }

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[str, int] = {}

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "c10d" and "barrier" not in func.name():
                name, place = names[func.name().removeprefix("c10d::").split(".")[0]]
                found = [t.nbytes for t in tree_leaves(args[place]) if isinstance(t, Tensor)]
                self.sizes[name] = self.sizes.get(name, 0) + sum(found)
            return func(*args, **(kwargs or {}))

    return Counter()


SMALL = Decoder("small", 2048, 256, 768, 4, 8, 4)


def measure_rank(steps: int = 6, tokens: int = 512) -> None:
    """On each rank: steps without communication, of DDP and of FSDP2; the first one prints."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaForCausalLM

    from bigkernel.optim import AdamW

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks, found = dist.get_world_size(), {}
    probe = torch.zeros(4_000_000)
    for _ in range(2):  # the first one connects
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(probe)
        rate = 2 * probe.nbytes * (ranks - 1) / ranks / (time.perf_counter() - began)
    for kind in ("alone", *KINDS):
        torch.manual_seed(0)
        m: Any = LlamaForCausalLM(SMALL.config())
        if kind == "ddp":
            m = DistributedDataParallel(m, find_unused_parameters=True)
        elif kind == "fsdp2":
            for layer in m.model.layers:
                fully_shard(layer)
            fully_shard(m.model.embed_tokens)
            fully_shard([m.model.norm, m.lm_head], reshard_after_forward=False)
            fully_shard(m)
        optimizer = AdamW(m.parameters(), max_grad_norm=1.0)
        ids = torch.randint(0, SMALL.vocab, (1, tokens))
        times = []
        for _ in range(steps):
            dist.barrier()
            began, count = time.perf_counter(), counter()
            with count:
                m(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            dist.barrier()
            times.append(time.perf_counter() - began)
        found[kind] = {"sizes": count.sizes, "seconds": statistics.median(times[1:])}
    if dist.get_rank() == 0:
        print(json.dumps({"rate": rate, **found}), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads


def measure(ranks: int) -> str:
    """A table row for each kind."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", str(ranks), "-m", "benchmarks.scaling", "--rank"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    rows = []
    for kind in KINDS:
        sizes = messages(SMALL.units(), kind, ranks)
        alone = found["alone"]["seconds"]
        expected = alone + wire(sizes, ranks) / found["rate"] if ranks > 1 else alone
        # Without the angles of the rotary embedding, which DDP sends as buffers.
        counted = sum(size for name, size in found[kind]["sizes"].items() if name in sizes)
        bytes_ = f"{sum(sizes.values()):,}", f"{counted:,}"
        times = f"{1e3 * expected:.0f}", f"{1e3 * found[kind]['seconds']:.0f}"
        rows.append([str(ranks), kind, *bytes_, *times])
    heads = ["ranks", "", "bytes predicted", "counted", "ms predicted", "measured"]
    return _table(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--measure", type=int, metavar="RANKS")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        measure_rank()
    elif asked.measure:
        print(measure(asked.measure))
    else:
        print(bytes_table(), steps_table(), sep="\n")


if __name__ == "__main__":
    main()
