"""Several runs of `bigkernel bench ... --json FILE` as one table.

    python benchmarks/summary.py FILE...

For each case the ratio to every peer and the share of the limit, as the median of the runs, with
the lowest and the highest; for each bar whether the median holds it.
"""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any


def spread(values: list[float], form: str) -> str:
    low, middle, high = (format(x, form) for x in (min(values), median(values), max(values)))
    return f"**{middle}** ({low} to {high})"


def row(runs: list[dict[str, Any]]) -> list[str]:
    """Markdown cells of one case."""
    first = runs[0]
    ours = median(run["times"]["bigkernel"]["median"] for run in runs)
    peers = [
        f"{spread([run['ratios'][name] for run in runs], '.2f')} {name}" for name in first["ratios"]
    ]
    shares = [run["share_of_limit"] for run in runs if run["share_of_limit"] is not None]
    bars = []
    for i, bar in enumerate(first["bars"]):
        reached = [run["bars"][i]["reached"] for run in runs]
        if None in reached:
            bars.append(f"{bar['bar']}: not measured")
            continue
        value = median(reached)
        held = value >= bar["at_least"] if "at_least" in bar else value <= bar["at_most"]
        bars.append(f"{bar['bar']}: {'held' if held else 'NOT held'}")
    return [
        first["case"],
        f"{ours * 1e3:.3g} ms",
        "<br>".join(peers),
        spread(shares, ".0%") if shares else "",
        "<br>".join(bars),
    ]


def main(files: list[str]) -> None:
    runs = [json.loads(Path(name).read_text()) for name in files]
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for case in run["results"]:
            cases.setdefault((case["table"], case["case"]), []).append(case)
    machine = {key: value for key, value in runs[0].items() if key != "results"}
    machine["command"] = " and ".join(dict.fromkeys(run["command"] for run in runs))
    least = min(map(len, cases.values()))
    print(f"Medians of {least} runs and more (lowest to highest), times the speed of each peer.\n")
    print("```json", json.dumps(machine, indent=1, ensure_ascii=False), "```\n", sep="\n")
    print("| case | bigkernel | times a peer's speed | of the limit | bars |")
    print("|---|---|---|---|---|")
    for results in cases.values():
        print("|", " | ".join(row(results)), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
