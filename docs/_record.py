"""The measured results of record (benchmarks/results/cpu_*.json), as the pages need them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
OPS = {"attention": "Attention", "adam": "Adam", "augment": "Augmentation"}
# Not other people's code: our own PyTorch backend, and our own kernel on an easier task.
NOT_PEERS = (
    "bigkernel-torch",
    "rotation and normalisation alone",
    "the same to a quarter of the pixels",
)
# What a chart calls a case.
SHORT = {
    "bf16 forward causal B1 H8 S2048 D64": "Attention, bf16, causal",
    "bf16 forward + backward causal B1 H8 S2048 D64": "the same, with backward",
    "fp32 forward B1 H8 S1024 D128": "Attention, fp32, no mask",
    "fp32 forward + backward causal B1 H8 S2048 D64": "fp32, causal, with backward",
    "bf16 forward causal 16 documents of 64..1024 H8 D64": "16 packed documents",
    "bf16 forward + backward causal 16 documents of 64..1024 H8 D64": "the same, with backward",
    "bf16 forward B32 H16 S16 D64": "Sequences of 16",
    "bf16 forward causal B1 H32:8 S1024 D64": "Grouped heads, 32 to 8",
    "bf16 forward key padding B4 H8 S512 D64": "Padded batch",
    "fp32 step, 1,000 tensors of 1,000": "AdamW, 1,000 small tensors",
    "fp32 clip + step, 1,000 tensors of 1,000": "the same, with clipping",
    "fp32 step, GPT-2, 124M parameters": "AdamW, GPT-2 (124M)",
    "fp32 clip + step, GPT-2, 124M parameters": "GPT-2, with clipping",
    "bf16, fp32 masters, step, GPT-2, 124M parameters": "GPT-2, bf16 + fp32 masters",
    "crop + flip + rotate + jitter + normalise, 64 of 256x256 to 224": "5 transforms, 64 images",
    "crop + flip + normalise, 64 of 256x256 to 224": "3 transforms, 64 images",
    "crop + flip + normalise, 64 of 256x256 to 224, bf16 result": "the same, to bf16",
    "crop + flip + normalise, 64 of 256x256 to 224, interleaved": "the same, channels last",
    "crop + flip + normalise, 1,000 of 250..500 a side to 224": "1,000 images at once",
    "resize + normalise, 4 of 3000x2000 to 224": "4 large photographs",
}


@dataclass(frozen=True)
class Ratio:
    """Our speed over that of a peer: the median of the runs, the lowest and the highest."""

    peer: str
    middle: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Row:
    """A case of the record."""

    op: str
    case: str
    seconds: float
    ratios: tuple[Ratio, ...]  # of peers alone
    share: float | None  # of the limit

    @property
    def best(self) -> Ratio:
        """The peer that comes nearest to us, or is furthest ahead."""
        return min(self.ratios, key=lambda ratio: ratio.middle)


def runs() -> list[dict[str, Any]]:
    files = sorted(RESULTS.glob("cpu_*.json"), key=lambda path: int(path.stem.split("_")[1]))
    return [json.loads(path.read_text()) for path in files]


@cache
def rows() -> tuple[Row, ...]:
    """Every case that has a peer, in the order of the record."""
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs():
        for result in run["results"]:
            cases.setdefault((result["table"], result["case"]), []).append(result)
    found = []
    for (op, case), results in cases.items():
        ratios = []
        for peer in results[0]["ratios"]:
            values = [r["ratios"][peer] for r in results if r["ratios"].get(peer) is not None]
            if peer not in NOT_PEERS and values:
                ratios.append(Ratio(peer, median(values), min(values), max(values), len(values)))
        shares = [r["share_of_limit"] for r in results if r["share_of_limit"] is not None]
        seconds = median(r["times"]["bigkernel"]["median"] for r in results)
        if ratios:
            share = median(shares) if shares else None
            found.append(Row(op, case, seconds, tuple(ratios), share))
    return tuple(found)


def weakest(op: str) -> Row:
    """The case in which the best peer comes nearest to us."""
    return min((row for row in rows() if row.op == op), key=lambda row: row.best.middle)


def row(case: str) -> Row:
    return next(row for row in rows() if row.case == case)


# The README's chart: these, and of each op the weakest case, whichever that is.
HEADLINES = (
    "bf16 forward causal B1 H8 S2048 D64",
    "bf16 forward + backward causal B1 H8 S2048 D64",
    "bf16 forward causal 16 documents of 64..1024 H8 D64",
    "fp32 step, 1,000 tensors of 1,000",
    "fp32 clip + step, GPT-2, 124M parameters",
    "crop + flip + rotate + jitter + normalise, 64 of 256x256 to 224",
    "crop + flip + normalise, 64 of 256x256 to 224",
)


def headlines(count: int = 8) -> list[Row]:
    """The rows of the README's chart, by op, the weakest of each op last."""
    weak = {op: weakest(op) for op in OPS}
    others = [row(case) for case in HEADLINES if row(case) not in weak.values()]
    others = others[: count - len(weak)]
    return [r for op in OPS for r in [*(o for o in others if o.op == op), weak[op]]]


def charted(op: str, count: int = 8) -> list[Row]:
    """The rows of an op's own chart: the named ones, and the weakest."""
    named = [row for row in rows() if row.op == op and row.case in SHORT]
    weak = weakest(op)
    others = [row for row in named if row != weak]
    return [*others[: count - 1], weak]


def machine() -> str:
    """One sentence on where and how often."""
    first = runs()[0]
    counts = {op: min(row.best.runs for row in rows() if row.op == op) for op in OPS}
    each = ", ".join(f"{op} {n} runs" for op, n in counts.items())
    return (
        f"{first['cpu']}, {first['threads']} threads, {first['isa']}; torch "
        f"{first['versions']['torch']}. Medians of {each}."
    )
