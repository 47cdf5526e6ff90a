"""Results as tables, JSON and a bar chart."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bigkernel.extras import needs

with needs("cli", "bigkernel.bench.report"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

from bigkernel.bench.case import LIMIT, OURS, Alone, Bar, MemoryBar, Result, TimeBar
from bigkernel.measure import Timing

WIDTH = 200  # of a table that goes to a file
FEW = 5  # below so many runs a table says how many


def human(seconds: float) -> str:
    """In the unit that fits: 12.3 ms."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def peers(results: Sequence[Result]) -> list[str]:
    """All competitors of the cases but ours, in the order of their first appearance."""
    names = dict.fromkeys(name for result in results for name in result.case.competitors)
    return [name for name in names if name != OURS]


def table(results: Sequence[Result]) -> Table:
    """Case, ours, each peer with our speed over its, share of the limit, bars, held or not."""
    shown = Table(title=results[0].case.table, title_justify="left")
    shown.add_column("case", overflow="fold")
    shown.add_column(OURS, justify="right")
    for name in peers(results):
        shown.add_column(name, justify="right")
    for name in ("of limit", "bar", "held"):
        shown.add_column(name, justify="right" if name == "of limit" else "left")
    for result in results:
        cells: list[Text] = [Text(result.case.name), _time(result, OURS)]
        cells += [_against(result, name) for name in peers(results)]
        share = result.share
        cells.append(Text("" if share is None else f"{share:.0%}"))
        bars = result.case.bars
        cells.append(Text("\n".join(map(str, bars))))
        cells.append(Text("\n").join(_held(result, bar) for bar in bars))
        shown.add_row(*cells, end_section=True)
    return shown


def steps(results: Sequence[Result]) -> Table:
    """Of each training: the time of a step's parts, its losses and its memory at the peak."""
    parts = list(dict.fromkeys(p for r in results for a in r.alone.values() for p in a.parts))
    shown = Table(title="a step, in a process of its own", title_justify="left")
    shown.add_column("case", overflow="fold")
    shown.add_column("")
    for name in (*parts, "losses", "peak memory"):
        shown.add_column(name, justify="right")
    for result in results:
        for i, (name, alone) in enumerate(result.alone.items()):
            times = [human(alone.parts[part]) for part in parts]
            losses = f"{alone.losses[0]:.4f} to {alone.losses[-1]:.4f}"
            peak = "" if alone.peak is None else f"{alone.peak / 2**20:,.0f} MiB"
            last = i == len(result.alone) - 1
            shown.add_row("" if i else result.case.name, name, *times, losses, peak,
                          end_section=last)  # fmt: skip
    return shown


def groups(case: str, sides: Mapping[str, Alone]) -> Table:
    """Of one training: the time of a step by groups of ops, all sides in one table, ours first.

    Beside a peer's time: its share of the step, and how many times as fast ours is.
    """
    shown = Table(title=f"a step of {case}, op by op", title_justify="left")
    shown.add_column("")
    for name in sides:
        shown.add_column(name, justify="right")
    ours = sides[OURS]
    steps = {name: sum(side.parts.values()) for name, side in sides.items()}
    for part in ours.parts:
        shown.add_row(
            part,
            *(
                Text(f"{human(side.parts[part])} {side.parts[part] / steps[name]:4.0%}")
                + _faster(ours.parts[part], side.parts[part], side is ours)
                for name, side in sides.items()
            ),
        )
    shown.add_section()
    cells = (
        Text(f"{human(steps[name])} 100%") + _faster(steps[OURS], steps[name], name == OURS)
        for name in sides
    )
    shown.add_row("a step", *cells)
    return shown


def _faster(ours: float, theirs: float, same: bool) -> Text:
    if same or not ours or not theirs:
        return Text("")
    ratio = theirs / ours
    return Text(f"  {ratio:.2f}x", style="green" if ratio >= 1 else "bold red")


def _time(result: Result, name: str) -> Text:
    timing = result.timings[name]
    if result.case.items:
        speed = result.case.items / timing.median
        return Text(f"{speed:,.0f} {result.case.unit} {_repeated(timing)}")
    return Text(f"{human(timing.median)} {_repeated(timing)}")


def _repeated(timing: Timing) -> str:
    """Half the distance of the quartiles; how many runs there were, if those are few."""
    runs = len(timing.samples)
    if runs == 1:
        return "(1 run)"
    spread = f"±{timing.spread / 2:.0%}"
    return spread if runs >= FEW else f"{spread} ({runs} runs)"


def _against(result: Result, name: str) -> Text:
    if name in result.skipped:
        return Text("skipped", style="dim")
    ratio = result.ratio(name)
    if ratio is None:
        return Text("")
    style = "green" if ratio >= 1 else "bold red"
    return _time(result, name).append("\n").append(f"{ratio:.2f}x", style=style)


def _held(result: Result, bar: Bar | MemoryBar | TimeBar) -> Text:
    value = bar.reached(result)
    if value is None:
        return Text("not measured", style="yellow")
    got = f"{value:.0%}" if bar.over == LIMIT else f"{value:.2f}x"
    return (
        Text(f"yes, {got}", style="green")
        if result.held(bar)
        else Text(f"NO, {got}", style="bold red")
    )


def show(results: Sequence[Result], console: Console) -> None:
    """The table, and below it what was skipped, compared and lost."""
    console.print(table(results))
    if any(result.alone for result in results):
        console.print(steps(results))
    console.print(
        "Median of the rounds ± half the distance of the quartiles. Below a peer's time: how many "
        "times its speed ours is."
    )
    reasons = {(name, why) for result in results for name, why in result.skipped.items()}
    for name, why in sorted(reasons):
        console.print(f"skipped: {name}: {why}", markup=False)
    for limit in dict.fromkeys(result.limit_name for result in results if result.limit_name):
        console.print(f"limit: {limit}.", markup=False)
    for compared in dict.fromkeys(result.compared for result in results):
        console.print(f"checked first: {compared}.", markup=False)
    slower = [
        f"{result.case.name}: {ratio:.2f}x {name}"
        for result in results
        for name in peers(results)
        if (ratio := result.ratio(name)) is not None and ratio < 1
    ]
    missed = [
        f"{result.case.name}: {bar}"
        for result in results
        for bar in result.case.bars
        if result.held(bar) is False
    ]
    bars = sum(result.held(bar) is not None for result in results for bar in result.case.bars)
    for title, lines in (("slower than a peer", slower), ("bars not held", missed)):
        of = f" of {bars}" if lines is missed else ""
        console.print(f"{title}: {len(lines)}{of}", style="bold red" if lines else "green")
        for line in lines:
            console.print(f"  {line}", markup=False, highlight=False)


def console() -> Console:
    """Standard output; a file or pipe gets lines long enough for a row."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=WIDTH)


def as_dict(result: Result) -> dict[str, Any]:
    """One case for the JSON file. Times are seconds of one call."""
    return {
        "table": result.case.table,
        "case": result.case.name,
        "backend": result.backend,
        "compared": result.compared,
        "times": {name: _timing(timing) for name, timing in result.timings.items()},
        "ratios": {
            name: result.ratio(name) for name in result.timings if name not in (OURS, LIMIT)
        },
        "limit": result.limit_name,
        "share_of_limit": result.share,
        "items_per_second": {
            name: result.case.items / timing.median
            for name, timing in result.timings.items()
            if result.case.items
        },
        "bars": [
            {
                "bar": str(bar),
                **asdict(bar),
                "reached": bar.reached(result),
                "held": result.held(bar),
            }
            for bar in result.case.bars
        ],
        "alone": {name: asdict(alone) for name, alone in result.alone.items()},
        "skipped": result.skipped,
    }


def _timing(timing: Timing) -> dict[str, Any]:
    low, high = timing.quartiles
    return {"median": timing.median, "q25": low, "q75": high, "samples": len(timing.samples)}


def save_json(results: Sequence[Result], facts: dict[str, Any], command: str, path: Path) -> None:
    """All that was measured, with machine, versions and the command."""
    content = {"command": command, **facts, "results": [as_dict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save_plot(results: Sequence[Result], facts: dict[str, Any], path: Path) -> None:
    """Bars of our speed over each peer's, one group a case; the line is the peer's own speed."""
    rows = [(result, name) for result in results for name in peers([result])]
    rows = [(result, name) for result, name in rows if result.ratio(name) is not None]
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(rows) + 0.12 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = {name: f"C{i % 10}" for i, name in enumerate(peers(results))}
    place, ticks, labels = 0.0, [], []
    for result in results:
        names = [name for name in peers([result]) if result.ratio(name) is not None]
        ticks.append(place + (len(names) - 1) / 2)
        labels.append(result.case.name)
        for name in names:
            ratio = result.ratio(name) or 0.0
            axes.barh(place, ratio, height=0.9, color=colors[name])
            axes.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=6)
            place += 1
        place += 0.6
    for name, color in colors.items():
        axes.barh(0, 0, color=color, label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("times as fast as the peer (logarithmic)")
    axes.set_title(f"{facts['cpu']}, {facts['threads']} threads, {facts['isa']}", fontsize=9)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
