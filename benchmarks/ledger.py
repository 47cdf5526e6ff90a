"""The ledger of the CPU speedrun, benchmarks/records: one folder an entry, read and written here.

An entry is a side of ``benchmarks/speedrun.py`` in one session: ``entry.json`` (the side, its
settings, machine, versions, commit, command, time of the session) and ``seed-N.jsonl``, a line for
each look at the held-back text: ``step``, ``seconds`` of training until then, ``nats_per_byte``.
The last line is the first at or below the target. What an entry took over transformers' Trainer is
computed from the logs of the same session; seconds of different sessions are not compared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
TUNED = RECORDS / "tuning.json"
TARGET = 1.53  # nats per byte
SEEDS = 3
BASELINE = "transformers"
# What an entry of ours may take at most, as a share of the baseline's seconds: by instruction set.
BARS = {"avx512_bf16": 0.4, "avx2": 0.5}

Log = list[dict[str, float]]


@dataclass(frozen=True)
class Entry:
    """A folder of the ledger: its number, what entry.json says, and the logs by seed."""

    number: int
    facts: dict[str, Any]
    logs: dict[int, Log]

    @property
    def side(self) -> str:
        return str(self.facts["side"])

    @property
    def session(self) -> str:
        return str(self.facts["time"])

    @property
    def seconds(self) -> list[float]:
        """Of each seed, until the target."""
        return [log[-1]["seconds"] for log in self.logs.values()]

    @property
    def steps(self) -> list[int]:
        return [int(log[-1]["step"]) for log in self.logs.values()]


def write(facts: dict[str, Any], logs: dict[int, Log], records: Path = RECORDS) -> Path:
    """A new entry behind the others."""
    number = 1 + max((entry.number for entry in entries(records)), default=-1)
    folder = records / f"{number:02d}-{facts['side']}"
    folder.mkdir(parents=True)
    (folder / "entry.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    for seed, log in logs.items():
        lines = "".join(json.dumps(line) + "\n" for line in log)
        (folder / f"seed-{seed}.jsonl").write_text(lines)
    return folder


def read(folder: Path) -> Entry:
    facts = json.loads((folder / "entry.json").read_text())
    logs = {
        int(path.stem.removeprefix("seed-")): [json.loads(x) for x in path.read_text().splitlines()]
        for path in sorted(folder.glob("seed-*.jsonl"))
    }
    return Entry(int(folder.name.split("-")[0]), facts, logs)


def entries(records: Path = RECORDS) -> list[Entry]:
    """All of the ledger, by number."""
    return sorted((read(path.parent) for path in records.glob("*/entry.json")), key=_number)


def _number(entry: Entry) -> int:
    return entry.number


def ratio(entry: Entry, ledger: list[Entry]) -> float:
    """Its mean seconds to the target over transformers' of the same session."""
    (theirs,) = (e for e in ledger if e.side == BASELINE and e.session == entry.session)
    return mean(entry.seconds) / mean(theirs.seconds)


def table(ledger: list[Entry]) -> str:
    """Markdown: a line an entry."""
    if not ledger:
        return "No run is on record yet.\n"
    heads = ["record", "trainer, optimizer", "steps", "seconds", "of transformers'", "machine"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for entry in ledger:
        facts, share = entry.facts, ratio(entry, ledger)
        bar = BARS.get(facts["isa"]) if entry.side != BASELINE else None
        against = "" if bar is None else f" (bar: {bar:g})"
        seconds = (
            f"{mean(entry.seconds):.1f} ({min(entry.seconds):.1f} to {max(entry.seconds):.1f})"
        )
        steps = ", ".join(map(str, entry.steps))
        machine = f"{facts['cpu']}, {facts['threads']} threads, {facts['isa']}"
        cells = [f"{entry.number}", f"{_shown(entry.side)}, lr {facts['lr']:g}", steps, seconds]
        lines.append("| " + " | ".join([*cells, f"{share:.2f}x{against}", machine]) + " |")
    return "\n".join(lines) + "\n"


def tuning_table() -> str:
    """Markdown: a line a side, with what it reached by learning rate."""
    heads, lines = [], []
    for side, tuned in json.loads(TUNED.read_text()).items():
        (name,) = (name for name in tuned if name.endswith("_lr"))
        heads = [f"lr {float(lr):g}" for lr in tuned[name]]
        lines.append([_shown(side), *(f"{mean(reached):.3f}" for reached in tuned[name].values())])
    rows = [["trainer, optimizer", *heads], ["---"] * (len(heads) + 1), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _shown(side: str) -> str:
    """Trainer and optimizer of a side."""
    trainer, _, optimizer = side.partition("-")
    return f"{trainer}, {'Muon' if optimizer == 'muon' else 'AdamW'}"
