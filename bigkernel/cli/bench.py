"""`bigkernel bench`: the tables, and where they are written."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bigkernel import _library
from bigkernel.bench import TABLES, Result, cases_of, machine, report, run_case, training
from bigkernel.bench.case import Alone
from bigkernel.measure import QUICK, Plan
from bigkernel.recipes.device import use_threads
from bigkernel.recipes.errors import Failure, UsageError
from bigkernel.recipes.settings import user_path


def bench(
    ops: Sequence[str],
    json: Path | None,
    quick: bool,
    threads: int | None,
    plot: Path | None,
    only: str | None = None,
    profile: bool = False,
) -> None:
    """Measure the tables ``ops`` and print them; Failure where a result is wrong or not native.

    only: the cases whose names contain it, in letters of either case. profile: of the table
    "train", take a few steps of each side apart, op by op, and time nothing else.
    """
    for op in ops:
        if op not in TABLES:
            raise UsageError(f"there is no benchmark {op!r}. There are: {', '.join(TABLES)}.")
    if profile and (set(ops) != {"train"} or plot is not None):
        raise UsageError(
            "--profile takes the steps of train apart: bigkernel bench train --profile."
        )
    json, plot = (None if path is None else user_path(path) for path in (json, plot))
    for path in (json, plot):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}.")
    tables = {op: cases_of(op) for op in dict.fromkeys(ops)}
    if only is not None:
        names = [case.name for cases in tables.values() for case in cases]
        tables = {
            op: [case for case in cases if only.lower() in case.name.lower()]
            for op, cases in tables.items()
        }
        if not any(tables.values()):
            raise UsageError(f"no case has {only!r} in its name. There are:\n" + "\n".join(names))
    if _library.native is None:
        raise Failure(f"there is no native kernel to measure: {_library.native_error}.")
    use_threads(threads)
    facts = machine.facts()
    console = report.console()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['isa']} "
        f"(torch: {facts['torch_isa']}); {versions}; commit {facts['commit']}",
        highlight=False,
    )
    results: list[Result] = []
    profiles: dict[str, dict[str, Alone]] = {}
    for op, cases in tables.items():
        table: list[Result] = []
        for case in cases:
            print(f"{op}: {case.name} ...", file=sys.stderr, flush=True)
            if profile:
                sides = training.profiled(case)
                console.print(report.groups(case.name, sides))
                profiles[case.name] = sides
                continue
            table.append(run_case(case, QUICK if quick else Plan()))
        if table:
            report.show(table, console)
        results += table
    command = " ".join(["bigkernel", "bench", *ops, *(["--quick"] if quick else [])])
    if only is not None:
        command += f" --only {shlex.quote(only)}"
    if threads is not None:
        command += f" --threads {threads}"
    if profile:
        command += " --profile"
        parts = {case: {name: a.parts for name, a in of.items()} for case, of in profiles.items()}
        facts["seconds_of_a_step"] = parts
    if json is not None:
        report.save_json(results, facts, command, json)
    if plot is not None:
        report.save_plot(results, facts, plot)
    written = [str(path) for path in (json, plot) if path is not None]
    if written:
        print("written: " + ", ".join(written))
