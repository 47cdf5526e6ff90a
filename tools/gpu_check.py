"""Everything that needs a GPU, in one command: `make gpu-check`.

Builds for the GPU that is present, runs the tests that need one and a few under compute-sanitizer,
repeats the ops, replays the optimizer from a CUDA graph, and measures against the peers that are
installed. Nothing is downloaded. A section that fails does not stop the others; the exit status is
1 if one failed, 2 without a GPU. Results: benchmarks/results/gpu_check_<GPU>.{json,md}.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TESTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/ops/test_*.py"))
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


class Skip(Exception):
    """A section that cannot run here, with the reason."""


@dataclass
class Section:
    name: str
    status: str = "ok"  # ok, failed, skipped
    reason: str = ""
    seconds: float = 0.0
    data: Any = None


@dataclass
class Report:
    """Runs sections one after another, whatever becomes of them."""

    machine: dict[str, Any]
    sections: list[Section] = field(default_factory=list)

    def run(self, name: str, work: Callable[[], Any]) -> Section:
        print(f"gpu-check: {name} ...", flush=True)
        section, begin = Section(name), time.monotonic()
        try:
            section.data = work()
        except Skip as skip:
            section.status, section.reason = "skipped", str(skip)
        except Exception as error:
            section.status, section.data = "failed", getattr(error, "rows", None)
            section.reason = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
        section.seconds = round(time.monotonic() - begin, 1)
        self.sections.append(section)
        print(f"gpu-check: {name}: {section.status} {section.reason[:300]}", flush=True)
        return section

    @property
    def status(self) -> int:
        return int(any(section.status == "failed" for section in self.sections))

    def write(self, folder: Path = RESULTS) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        gpu = re.sub(r"\W+", "_", str(self.machine["gpu"])).strip("_").lower()
        path = folder / f"gpu_check_{gpu}.json"
        everything = {"machine": self.machine, "sections": [asdict(s) for s in self.sections]}
        path.write_text(json.dumps(everything, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(self))
        return path


def command(*words: str, timeout: float = 3600, **environment: str) -> str:
    """Output of a command, run in the repository; RuntimeError with its end where it fails."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        words, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=timeout
    )
    output = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} exited with {done.returncode}:\n{output[-1500:]}")
    return output


Command = Callable[..., str]


def build(run: Command = command) -> str:
    output = run(
        *(sys.executable, "setup.py", "build_ext", "--inplace"),
        BIGKERNEL_CUDA="1",
    )
    return "\n".join(line for line in output.splitlines() if line.startswith("bigkernel:"))


def native_list() -> str:
    """The architecture of the GPU that is present, as TORCH_CUDA_ARCH_LIST spells it."""
    return "{}.{}".format(*torch.cuda.get_device_capability())


def run_tests(path: str, run: Command = command) -> str:
    """The tests of a file that are marked as needing a GPU, in a process of their own."""
    words = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", path)
    try:
        output = run(*words, BIGKERNEL_STRICT="1")
    except RuntimeError as error:
        missing = re.search(r"ModuleNotFoundError: No module named '(\S+)'", str(error))
        if missing:
            raise Skip(f"{missing[1]} is not installed") from None
        if "exited with 5" in str(error):
            raise Skip("no test here needs a GPU") from None
        raise
    return output.strip().splitlines()[-1]


def sanitizer(tool: str, run: Command = command) -> str:
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Skip("compute-sanitizer is not on the path")
    output = run(
        *(program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"),
        *(sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider"),
        *SANITIZED,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # so that each tensor has bounds of its own
    )
    return output.strip().splitlines()[-1]


def table(cases: Iterable[tuple[str, Callable[[], Any]]]) -> list[dict[str, Any]]:
    """A row for each (name, measuring function), printed at once; one that fails stops no other."""
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for name, measure in cases:
        try:
            rows.append(measure().as_dict())
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {error}")
        else:
            print("\n".join(row_lines(rows[-1])), flush=True)
    if failed:
        raise TableError(rows, failed)
    return rows


class TableError(Exception):
    """A table that lacks rows, with those that it has."""

    def __init__(self, rows: list[dict[str, Any]], failed: list[str]) -> None:
        super().__init__("; ".join(failed))
        self.rows = rows


def row_lines(row: dict[str, Any]) -> list[str]:
    scale, unit = {"FLOP": (1e12, "TFLOP/s"), "B": (1e9, "GB/s")}.get(row["unit"], (1, "images/s"))
    lines = []
    for name, result in row["results"].items():
        low, high = result["quartiles_s"]
        median, share = result["median_s"], result["share_of_limit"]
        if name == "limit" and row["unit"] == "images":
            rate = of = "-"
        else:
            rate = f"{result['rate'] / scale:,.1f} {unit}"
            of = "-" if share is None or row["unit"] == "images" else f"{share:.0%}"
        spread = (high - low) / median / 2
        cells = (row["case"], name, f"{median * 1e6:,.1f} us", f"{spread:.1%}", rate, of)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(report: Report) -> str:
    lines = ["# GPU check", "", *(f"- {k}: {v}" for k, v in report.machine.items()), ""]
    lines += ["| section | result | seconds | |", "| --- | --- | --- | --- |"]
    for section in report.sections:
        reason = " ".join((section.reason or str(section.data or "")).split())[:200]
        shown = "" if section.name.startswith("benchmark") and not section.reason else reason
        cells = (section.name, section.status, f"{section.seconds:.0f}", shown.replace("|", "/"))
        lines.append("| " + " | ".join(cells) + " |")
    for section in report.sections:
        if not section.name.startswith("benchmark") or not section.data:
            continue
        lines += ["", f"## {section.name}", ""]
        lines += [
            "Median of the rounds, half the distance of the quartiles, L2 flushed before each"
        ]
        lines += ["call; the limit is measured in the same rounds.", ""]
        lines += ["| case | | median | spread | rate | of limit |", "| --- " * 6 + "|"]
        for row in section.data:
            lines += row_lines(row)
        reasons = {f"- skipped: {n}: {why}" for row in section.data
                   for n, why in row["skipped"].items()}  # fmt: skip
        lines += ["", *sorted(reasons)]
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """GPU, driver, versions."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        said = f"nvidia-smi does not run: {error}"
    facts = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "nvidia-smi": said,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    }
    for name in ("triton", "flash_attn", "apex", "torchvision", "kornia", "numpy"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    return facts


def check(
    report: Report, gpu: Any, device: str, clock: Any, capture: Any, small: bool = False
) -> None:
    """The sections that use the package: repeated runs, graphs and tables."""
    report.run("determinism", lambda: gpu.deterministic(device, 3 if small else 30))
    report.run("CUDA graph of the optimizer", lambda: gpu.optimizer_in_graph(device, capture))
    for name in gpu.OPS:
        cases = partial(gpu.of_op(name).cases, device, clock, small)
        report.run(f"benchmark {name}", lambda cases=cases: table(cases()))


def main() -> int:
    if not torch.cuda.is_available():
        print(
            "gpu-check: torch sees no CUDA device; run this on a machine with an NVIDIA GPU and a "
            "CUDA build of torch.",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", native_list())
    report = Report(machine())
    report.run("build", build)
    for path in TESTS:
        report.run(f"tests {path}", lambda path=path: run_tests(path))
    for tool in ("memcheck", "racecheck"):
        report.run(f"compute-sanitizer {tool}", lambda tool=tool: sanitizer(tool))
    section = report.run("import", lambda: __import__("bigkernel.bench.gpu"))
    section.data = None
    if section.status == "ok":
        gpu = sys.modules["bigkernel.bench.gpu"]
        check(report, gpu, "cuda", gpu.CudaClock(), gpu.captured)
    path = report.write()
    print(markdown(report))
    print(f"gpu-check: {path}")
    return report.status


if __name__ == "__main__":
    sys.exit(main())
