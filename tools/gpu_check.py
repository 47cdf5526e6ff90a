"""Everything that needs a GPU, in one command and in ten minutes: `make gpu-check`.

Measures against the peers that are installed, repeats the ops, replays the optimizer from a CUDA
graph, runs the tests that need a GPU, and a few of them under compute-sanitizer: in this order,
within --budget seconds, each section with a limit of its own. What hangs is ended, and the next one
begins. Nothing is downloaded.

A library that was carried here is used as it is, and one that was built here is built again where
anything has changed; so is one that is missing. It takes nvcc and no GPU to build one elsewhere:
docs/without-a-gpu.md says how.

Results are written after every row, to $OUT if that is set, and else to benchmarks/results:
gpu_check_<GPU>.json and .md. What the processes said: gpu_check.log in $OUT or build/gpu-check. The
exit status is 1 if a section failed, 2 without a GPU.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, ClassVar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.gpu_worker import BROKEN, MARK, STUB

RESULTS = ROOT / "benchmarks" / "results"
LIBRARY = ROOT / "bigkernel" / "libbigkernel_ops.so"
WORKER = ROOT / "tools" / "gpu_worker.py"
BUDGET = 480.0
# Seconds that a section may take, of a budget of 480, in the order in which they run.
LIMITS = {
    "build": 300.0,
    "attention": 150.0,
    "adam": 25.0,
    "augment": 40.0,
    "bias_act": 20.0,
    "determinism": 30.0,
    "graph": 15.0,
    "tests": 150.0,
    "memcheck": 60.0,
    "racecheck": 60.0,
}
NAMES = tuple(LIMITS)
TABLES = NAMES[1:5]
WORK = NAMES[1:7]  # what gpu_worker.py does
STALL = 60.0  # seconds without a line, after which a process is taken to hang
START = 120.0  # the same before its first one: torch is imported, the device started
GRACE = 15.0  # seconds above its limit that the last row of a table may take
STARTS = 6  # of a worker, at most
PROCESSES = 8
# The tests that need a GPU, the most telling first.
FIRST = ("attention", "attention_packed", "adam", "augment", "bias_act", "attention_dropout")
# One test of each kernel family; they have to be quick, compute-sanitizer slows them a hundredfold.
SANITIZED = (
    *(
        f"tests/ops/test_attention.py::test_attention_matches_reference[cuda-{case}]"
        for case in ("plain-bf16", "everything-bf16", "plain-f32")
    ),
    "tests/ops/test_attention_packed.py::test_attention_varlen_matches_reference[cuda-plain-bf16]",
    "tests/ops/test_adam.py::test_adam_cuda_matches_reference[bf16-masters-adamw]",
    "tests/ops/test_augment.py::test_augment_ragged[cuda]",
    "tests/ops/test_bias_act.py::test_bias_act_cuda_matches_torch[bf16-gelu]",
)
# What compute-sanitizer says where it cannot look into the device, in its own words.
REFUSALS = re.compile(
    r"^=+ .*(insufficient privilege|not supported|no (cuda|supported) (device|gpu)|unable to ).*$"
    r"|^.*device not supported.*$",
    re.I | re.M,
)


def tests() -> list[str]:
    """The files with tests of ops, in the order in which they run."""
    paths = {p.stem.removeprefix("test_"): p for p in sorted(ROOT.glob("tests/ops/test_*.py"))}
    names = [*FIRST, *(name for name in paths if name not in FIRST)]
    return [str(paths[name].relative_to(ROOT)) for name in names]


@dataclass
class Section:
    """A line of the report. status: ok, failed, skipped, cut (its time was up) or running."""

    name: str
    status: str = "running"
    reason: str = ""
    seconds: float = 0.0
    data: Any = None
    clocks: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        self.reason = "; ".join(filter(None, (self.reason, reason)))[:2000]


@dataclass
class Report:
    """All sections so far; every change of them is written at once."""

    folder: Path
    part: bool = False
    machine: dict[str, Any] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)

    def begin(self, name: str) -> Section:
        print(f"gpu-check: {name} ...", flush=True)
        self.sections.append(Section(name))
        return self.sections[-1]

    def end(self, section: Section, status: str, reason: str = "") -> None:
        section.status = status
        section.add(reason)
        print(f"gpu-check: {section.name}: {status} {section.reason[:300]}", flush=True)
        self.write()

    def skip(self, name: str, reason: str) -> None:
        self.sections.append(Section(name))
        self.end(self.sections[-1], "skipped", reason)

    @property
    def status(self) -> int:
        return int(any(section.status == "failed" for section in self.sections))

    @property
    def path(self) -> Path:
        gpu = re.sub(r"\W+", "_", str(self.machine.get("gpu", "unknown"))).strip("_").lower()
        return self.folder / f"gpu_check_{gpu}{'_part' if self.part else ''}.json"

    def write(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        everything = {"machine": self.machine, "sections": [asdict(s) for s in self.sections]}
        for path, text in (
            (self.path, json.dumps(everything, indent=1) + "\n"),
            (self.path.with_suffix(".md"), markdown(self)),
        ):
            new = path.with_name(f"{path.name}.new")
            new.write_text(text)
            new.replace(path)  # whoever ends us finds one or the other
        return self.path


class Process:
    """A command whose lines are read as they come, and which can be ended with all it started."""

    started: ClassVar[list["Process"]] = []
    log: ClassVar[IO[str] | None] = None  # what all of them said

    def __init__(self, words: Sequence[str], **environment: str) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.said: list[str] = []  # the last lines
        threading.Thread(target=self._read, daemon=True).start()
        self.started.append(self)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.queue.put(line.rstrip("\n"))
            if self.log is not None:
                self.log.write(line)
                self.log.flush()
        self.queue.put(None)

    def line(self, until: float) -> str | None:
        """The next line, None after the last one; TimeoutError if none comes by then."""
        try:
            line = self.queue.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if line is not None and not line.startswith(MARK):
            self.said = [*self.said[-199:], line]
        return line

    def end(self, patience: float = 2.0) -> int | None:
        """Its exit status; it is ended if it still runs then. None if the system cannot do it."""
        for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 2.0)):
            try:
                return self.process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, number)
        try:
            return self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return None

    def tail(self, lines: int = 12) -> str:
        return "\n".join(self.said[-lines:])[-1500:]


class Hung(Exception):
    """A process that was ended by the watchdog, with the reason."""


class Stop(Exception):
    """Nothing more can be done, with the reason and the exit status."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


class Unfit(Exception):
    """The library has no kernels for this GPU, with the reason."""


def watch(process: Process, seconds: float, stall: float = STALL) -> Iterator[str]:
    """The lines of a process; Hung where it takes too long, or says nothing for too long."""
    begin = time.monotonic()
    end, silent = begin + seconds, begin + max(START, stall)
    while True:
        try:
            line = process.line(min(end, silent))
        except TimeoutError:
            process.end(0.0)
            if time.monotonic() >= end:
                raise Hung(f"ended when its {seconds:.0f} s were up") from None
            raise Hung(f"ended after {stall:.0f} s without a word") from None
        if line is None:
            return
        silent = time.monotonic() + stall
        yield line


@dataclass
class Job:
    """A section that a worker does: the table's row that is next, and how long it has taken."""

    name: str
    row: int = 0
    case: str = ""  # being measured
    used: float = 0.0
    section: Section | None = None


@dataclass
class Check:
    """One run of the tool. command: what starts a process."""

    report: Report
    names: Sequence[str]
    budget: float = BUDGET
    device: str = "cuda"
    command: Callable[..., Process] = Process
    stall: float = STALL

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.budget

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def limit(self, name: str) -> float:
        """Seconds for a section, of what is left."""
        return max(0.0, min(LIMITS[name] * self.budget / BUDGET, self.left))

    def spent(self, name: str) -> bool:
        """Whether there is no time for a section, which is said then."""
        if self.left > self.budget / 100:
            return False
        self.report.skip(name, f"the budget of {self.budget:g} s is spent")
        return True

    def all(self) -> int:
        """The exit status."""
        try:
            work = [name for name in self.names if name in WORK]
            try:
                self.work([] if self.device != STUB and build_wanted() else work)
                fits = self.device == STUB or not build_wanted()
            except Unfit:
                if self.device == STUB or shutil.which("nvcc") is None:
                    raise
                fits = False
            if not fits:
                self.build()
                self.work(work)
        except Unfit as unfit:
            self.report.end(self.report.begin("library"), "failed", str(unfit))
        except Stop as stop:
            print(f"gpu-check: {stop}", file=sys.stderr)
            return stop.status
        else:
            for name in self.names:
                if name in WORK or self.spent(name):
                    continue
                begin = time.monotonic()
                section = self.tests() if name == "tests" else self.sanitize(name)
                section.seconds = round(time.monotonic() - begin, 1)
        self.report.write()
        return self.report.status

    def build(self) -> None:
        """Of this GPU's architecture; Unfit where that fails."""
        section, begin, limit = self.report.begin("build"), time.monotonic(), self.limit("build")
        words = sys.executable, "setup.py", "build_ext", "--inplace"
        process = self.command(words, BIGKERNEL_CUDA="1")
        try:
            lines = [*watch(process, limit, limit)]
        except Hung as hung:
            reason = str(hung)
        else:
            reason = process.tail() if process.end() else ""
            section.data = "\n".join(x for x in lines if x.startswith("bigkernel:"))
        section.seconds = round(time.monotonic() - begin, 1)
        self.report.end(section, "failed" if reason else "ok", reason)
        self.report.machine = {}  # what the library has is asked again
        if reason:
            raise Unfit("the library could not be built")

    def work(self, names: Sequence[str]) -> None:
        """What a worker does, which also says what the machine is.

        A new one goes on after a row or a section in which the last one died or hung. Raises Stop
        without a GPU, Unfit where our kernels do not run on it.
        """
        todo = [Job(name) for name in names]
        for _ in range(STARTS):
            while todo and todo[0].section is None and self.spent(todo[0].name):
                todo.pop(0)
            self.attempt(todo)
            if not todo:
                return
        for job in todo:
            section = job.section or self.report.begin(job.name)
            self.report.end(section, "failed", f"given up after {STARTS} starts of a worker")

    def attempt(self, todo: list[Job]) -> None:
        """Start a worker and hear what it tells; jobs that are done with leave the list."""
        given = [f"{j.name}:{j.row}:{max(0.0, self.limit(j.name) - j.used):.0f}" for j in todo]
        process = self.command(
            (sys.executable, str(WORKER), self.device, f"{self.left:.0f}",
             *([] if self.report.machine else ["facts"]), *given)
        )  # fmt: skip
        job, begin = None, time.monotonic()
        end = begin + START
        why = ""
        while True:
            now = time.monotonic()
            try:
                line = process.line(end if job is None else min(end, now + self.stall))
            except TimeoutError:
                why = f"ended after {self.stall:.0f} s without a word"
                if time.monotonic() >= end:
                    why = "ended when its time was up"
                process.end(0.0)
                break
            event = None if line is None else event_of(line)
            if line is None:
                break
            if event is None:
                continue
            kind = event["event"]
            if kind == "section":
                begin = time.monotonic()
                if event["name"] == "facts":
                    continue
                job = todo[0]
                job.section = job.section or self.report.begin(job.name)
                # A table ends itself after the row at which its time is up.
                end = begin + max(0.0, self.limit(job.name) - job.used) + GRACE
            elif kind == "end":
                if job is not None:
                    self.leave(job, begin)
                    self.close(todo)
                job, end = None, time.monotonic() + START
            elif job is None:
                try:
                    self.know(event)
                except (Stop, Unfit):
                    process.end()
                    raise
            else:
                self.hear(job, event)
        status = process.end()
        if job is None:
            if todo and status != 0:
                why = why or f"the worker ended with {status}: {process.tail()}"
                while todo:
                    todo[0].section = todo[0].section or self.report.begin(todo[0].name)
                    todo[0].section.status = "failed"
                    todo[0].section.add(why)
                    self.close(todo)
            if not self.report.machine:
                raise Stop(f"the machine cannot be asked what it is: {process.tail()}", 1)
            return
        self.leave(job, begin)
        assert job.section is not None
        if status != BROKEN:
            why = why or f"the worker ended with {status}: {process.tail(4)}"
            job.section.status = "failed"
            job.section.add(f"{job.case}: {why}" if job.case else why)
        if job.name not in TABLES or self.limit(job.name) - job.used < 1:
            self.close(todo)

    def leave(self, job: Job, begin: float) -> None:
        """Count what a job has taken."""
        job.used += time.monotonic() - begin
        if job.section is not None:
            job.section.seconds = round(job.used, 1)

    def close(self, todo: list[Job]) -> None:
        """The first job is done with."""
        section = todo.pop(0).section
        assert section is not None
        self.report.end(section, "ok" if section.status == "running" else section.status)

    def know(self, event: dict[str, Any]) -> None:
        """What a worker found out of the machine."""
        if event["event"] == "failed":
            raise Stop(f"the machine cannot be asked what it is: {event['reason']}", 1)
        machine = event["data"]
        if machine["gpu"] == "none":
            raise Stop(
                "torch sees no CUDA device; run this on a machine with an NVIDIA GPU and a CUDA "
                "build of torch. --dry-run shows what it does without one.",
                2,
            )
        self.report.machine = machine
        if machine["lacks"]:
            raise Unfit(machine["lacks"])
        print(f"gpu-check: {machine['gpu']}, torch {machine['torch']}, {machine['library']}")

    def hear(self, job: Job, event: dict[str, Any]) -> None:
        """One event of a section."""
        section, kind = job.section, event["event"]
        assert section is not None
        if kind == "case":
            job.case, job.row = event["name"], event["number"] + 1
            return
        if kind == "row":
            section.data = [*(section.data or []), event["row"]]
            print("\n".join(row_lines(event["row"])), flush=True)
        elif kind == "result":
            section.data = event["data"]
        elif kind == "clocks":  # of a table that went on in another process, the first and last
            if event["when"] not in section.clocks or event["when"] == "after":
                section.clocks[event["when"]] = event["clocks"]
        elif kind == "left":
            section.status = "cut" if section.status == "running" else section.status
            section.add(f"its time was up with {event['rows']} rows to go")
        elif kind == "failed":
            section.status = "failed"
            case = event.get("case")
            section.add(f"{case}: {event['reason']}" if case else event["reason"])
        job.case = ""
        self.report.write()

    def tests(self) -> Section:
        """The tests that need a GPU, in one pytest and some processes."""
        section, limit = self.report.begin("tests"), self.limit("tests")
        words = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
        words += ["--continue-on-collection-errors", "-o", f"faulthandler_timeout={self.stall / 2}"]
        if find_spec("pytest_timeout") is not None:  # ends a process of several, and goes on
            words += ["--timeout", f"{self.stall * 2 / 3:.0f}", "--timeout-method", "thread"]
        if find_spec("xdist") is not None:
            words += ["-n", str(min(PROCESSES, os.cpu_count() or 1))]
        else:
            section.add("one after another: pytest-xdist is not installed")
        process = self.command([*words, *tests()], BIGKERNEL_STRICT="1")
        counts, missing = dict[str, int](), set[str]()
        written, status = time.monotonic(), "ok"
        try:
            for line in watch(process, limit, self.stall):
                if found := re.search(r"ModuleNotFoundError: No module named '([^']+)'", line):
                    missing.add(found[1])
                outcome = outcome_of(line)
                if outcome is None:
                    continue
                counts[outcome[0]] = counts.get(outcome[0], 0) + 1
                if outcome[0] in ("failed", "error"):
                    section.add(outcome[1])
                section.data = ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
                if time.monotonic() > written + 2:
                    written = time.monotonic()
                    self.report.write()
        except Hung as hung:
            status = "cut" if "were up" in str(hung) else "failed"
            section.add(str(hung))
        else:
            returned = process.end()
            said = process.tail()
            if missing:
                section.add(f"not installed: {', '.join(sorted(missing))}")
            if "failed" in counts or "error" in counts:
                status = "failed"
            elif "No module named pytest" in said:
                status = "skipped"
                section.add("pytest is not installed")
            elif not counts and returned in (0, 5):
                status = "skipped"
                section.add("no test here needs a GPU")
            elif returned and not (missing and counts):
                status = "failed"
                section.add(said)
        if {"failed", "error"} & {*counts}:
            status = "failed"
        self.report.end(section, status)
        return section

    def sanitize(self, tool: str) -> Section:
        """A few tests under compute-sanitizer."""
        section, limit = self.report.begin(tool), self.limit(tool)
        program = shutil.which("compute-sanitizer")
        if program is None:
            self.report.end(section, "skipped", "compute-sanitizer is not on the path")
            return section
        process = self.command(
            (program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all",
             sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider",
             *SANITIZED),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # so that each tensor has bounds of its own
        )  # fmt: skip
        lines: list[str] = []
        try:
            lines += watch(process, limit, limit)
        except Hung as hung:
            self.report.end(section, "cut", str(hung))
            return section
        said = "\n".join([*lines, *process.said])
        if refused := REFUSALS.search(said):
            self.report.end(section, "skipped", f"compute-sanitizer: {refused[0].strip('= ')}")
        elif process.end():
            self.report.end(section, "failed", process.tail())
        else:
            self.report.end(section, "ok", process.tail(1))
        return section


def event_of(line: str) -> dict[str, Any] | None:
    """What a worker tells with a line, if anything."""
    if not line.startswith(MARK):
        return None
    found: dict[str, Any] = json.loads(line.removeprefix(MARK))
    return found


def outcome_of(line: str) -> tuple[str, str] | None:
    """("passed", test) of a line of pytest -v, alone or ahead of which one of several stands."""
    words = "PASSED|FAILED|ERROR|SKIPPED"
    found = re.match(rf"\[gw\d+\] \[ *\d+%\] ({words}) (\S+::.*)", line)
    if found:
        return found[1].lower(), found[2].strip()
    found = re.match(rf"(\S+::.*?) ({words})\b", line)
    return (found[2].lower(), found[1]) if found else None


def build_wanted() -> bool:
    """Whether the library is to be built: there is none, or its object files lie here too.

    One without them was carried from another machine.
    """
    built_here = any(ROOT.glob("build/temp*/csrc/*/*.o"))
    return not LIBRARY.exists() or (built_here and shutil.which("nvcc") is not None)


def row_lines(row: dict[str, Any]) -> list[str]:
    """A row of a table in Markdown: a line for each competitor, ours with its bars."""
    scale, unit = {"FLOP": (1e12, "TFLOP/s"), "B": (1e9, "GB/s")}.get(row["unit"], (1, "images/s"))
    lines = []
    for name, result in row["results"].items():
        low, high = result["quartiles_s"]
        median, share, eager = (result[k] for k in ("median_s", "share_of_limit", "eager_s"))
        if name == "limit" and row["unit"] == "images":
            rate = of = "-"
        else:
            rate = f"{result['rate'] / scale:,.1f} {unit}"
            of = "-" if share is None or row["unit"] == "images" else f"{share:.0%}"
        spread = (high - low) / median / 2
        told = "; ".join(map(bar_line, row["bars"])) if name == "bigkernel" else ""
        whole = "-" if eager is None else f"{eager * 1e6:,.1f} us"
        cells = (row["case"], name, f"{median * 1e6:,.1f} us", f"{spread:.1%}", whole, rate, of)
        lines.append("| " + " | ".join((*cells, told)) + " |")
    return lines


def bar_line(bar: dict[str, Any]) -> str:
    """A bar and what became of it."""
    if bar["held"] is None:
        return f"{bar['bar']}: did not run"
    value = f"{bar['value']:.0%}" if "limit" in bar["bar"] else f"{bar['value']:.2f}x"
    return f"{bar['bar']}: {value}{'' if bar['held'] else ', NOT HELD'}"


TOLD = """\
Kernels: of the device alone, the L2 flushed before each call; median of the rounds, half the
distance of the quartiles. Eager: a call of some in a row, with Python and launches. The limit is
measured in the same rounds."""


def markdown(report: Report) -> str:
    """The report as a page."""
    lines = ["# GPU check", ""]
    if report.machine.get("gpu") == STUB:
        lines += ["On a CPU, at small sizes, to see that the tool works: no time here counts.", ""]
    lines += [*(f"- {k}: {v}" for k, v in report.machine.items()), ""]
    lines += ["| section | result | seconds | |", "| --- | --- | --- | --- |"]
    for section in report.sections:
        if section.name in TABLES:
            bars = [bar["held"] for row in section.data or [] for bar in row["bars"]]
            judged = [held for held in bars if held is not None]
            found = f"{len(section.data or [])} rows, {sum(judged)} of {len(judged)} bars held"
        else:
            found = str(section.data or "")
        told = " ".join("; ".join(filter(None, (found, section.reason))).split())[:400]
        cells = (section.name, section.status, f"{section.seconds:.0f}", told.replace("|", "/"))
        lines.append("| " + " | ".join(cells) + " |")
    for section in report.sections:
        if section.name not in TABLES or not section.data:
            continue
        lines += ["", f"## {section.name}", ""]
        lines += [TOLD]
        told = "; ".join(f"{when}: {clocks}" for when, clocks in section.clocks.items())
        lines += [f"Clocks of multiprocessors and memory, temperature, power: {told}.", ""]
        lines += ["| case | | kernels | spread | eager | rate | of limit | bars |"]
        lines += ["| --- " * 8 + "|"]
        for row in section.data:
            lines += row_lines(row)
        reasons = {f"- skipped: {n}: {why}" for row in section.data
                   for n, why in row["skipped"].items()}  # fmt: skip
        lines += ["", *sorted(reasons)]
    return "\n".join(lines) + "\n"


def chosen(text: str) -> list[str]:
    """The sections that --only names, in the order in which they run."""
    names = {*text.replace(",", " ").split()}
    if wrong := sorted(names - {*NAMES[1:]}):
        raise argparse.ArgumentTypeError(
            f"must be of {', '.join(NAMES[1:])}, got {', '.join(wrong)}."
        )
    return [name for name in NAMES[1:] if name in names]


def seconds(text: str) -> float:
    """A budget."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, at least 1, got {text!r}.")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--budget",
        type=seconds,
        default=BUDGET,
        metavar="SECONDS",
        help="that all sections may take together (default: %(default)g)",
    )
    parser.add_argument(
        "--only",
        type=chosen,
        default=list(NAMES[1:]),
        metavar="NAMES",
        help=f"some sections, with commas between them: {', '.join(NAMES[1:])}.\n"
        "Their results are written to gpu_check_<GPU>_part.*",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="the same on the CPU, at small sizes: whether the tool works, and not how fast\n"
        "anything is. Results go to build/gpu-check unless $OUT is set",
    )
    given = parser.parse_args(arguments)
    aside = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
    folder = aside if given.dry_run or os.environ.get("OUT") else RESULTS
    report = Report(folder, part=given.only != list(NAMES[1:]))
    check = Check(report, given.only, given.budget, STUB if given.dry_run else "cuda")
    aside.mkdir(parents=True, exist_ok=True)
    try:
        with open(aside / "gpu_check.log", "w") as Process.log:
            status = check.all()
    finally:  # in sessions of their own, they do not hear a Ctrl-C
        for process in Process.started:
            process.end(0.0)
        Process.started.clear()
        Process.log = None
    if report.machine:
        print(markdown(report))
        print(f"gpu-check: {report.path}")
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
