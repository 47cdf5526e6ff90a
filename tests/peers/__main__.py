"""Run a peer's own tests twice, on the peer's code and on ours, and compare.

    python -m tests.peers SUITE PATH [arguments of pytest]

PATH is the peer's test file or folder, from a copy of its sources as new as the installed library.
A test counts where it passes with the peer's own code; it must then pass with ours, or stand in
``exceptions/SUITE.txt`` with a reason. The exit code is 1 where one does not.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
SUITES = {
    "optim": "torch's test/test_optim.py: torch.optim.Adam and AdamW",
    "sdpa": "torch's test/test_transformers.py: scaled_dot_product_attention",
    "flash": "flash-attention's tests/test_flash_attn.py, on the CPU without dropout",
    "transforms": "torchvision's test/test_transforms_v2.py: the classes that we have",
    "trainer": "transformers' tests/trainer: Trainer, Seq2SeqTrainer and their arguments",
    "examples": "transformers' examples/pytorch: run_clm, run_mlm, run_image_classification",
}


def read_exceptions(suite: str, folder: Path = HERE / "exceptions") -> dict[str, str]:
    """Pattern of test ids -> reason. Lines ``pattern: reason``; ``#`` begins a comment."""
    known = {}
    file = folder / f"{suite}.txt"
    for line in file.read_text().splitlines() if file.is_file() else []:
        if line.strip() and not line.startswith("#"):
            pattern, reason = line.split(": ", 1)
            known[pattern.strip()] = reason.strip()
    return known


def run(suite: str, path: Path, side: str, arguments: list[str]) -> dict[str, str]:
    """The outcome of each test, by its id without the file: passed, failed or skipped."""
    path = path.resolve()
    folder = path if path.is_dir() else path.parent
    tests = HERE / "examples.py" if suite == "examples" else path  # scripts have no tests
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "outcomes.json")
        repository = HERE.parent.parent
        places = [str(HERE), str(repository), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            # Without the plugins that write beside the peer's sources.
            [
                *(sys.executable, "-m", "pytest", "-p", "swap"),
                *("-p", "no:cacheprovider", "-p", "no:benchmark"),
                *("-q", "--tb=line", f"--rootdir={folder}", *arguments, str(tests)),
            ],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(places),
                "PYTHONDONTWRITEBYTECODE": "1",
                "BIGKERNEL_PEER": f"{suite}:{side}",
                "BIGKERNEL_PEER_PATH": str(path),
                "BIGKERNEL_PEER_RESULT": str(result),
            },
            check=False,
        )
        if not result.is_file():
            raise SystemExit(f"pytest ended with {done.returncode} before any test of {path} ran")
        outcomes: dict[str, str] = json.loads(result.read_text())
        return outcomes


def compare(
    theirs: dict[str, str], ours: dict[str, str], exceptions: dict[str, str]
) -> tuple[Counter[str], list[str], list[str]]:
    """(counts, ids that fail with ours alone and without a reason, exceptions that none needs)."""
    counts: Counter[str] = Counter()
    wrong, needed = [], set()
    for test, outcome in theirs.items():
        if outcome != "passed":
            counts["do not pass with theirs"] += 1
            continue
        counts["pass with theirs"] += 1
        if ours.get(test) == "passed":
            counts["pass with ours"] += 1
            continue
        reasons = [pattern for pattern in exceptions if fnmatch.fnmatchcase(test, pattern)]
        needed.update(reasons)
        counts["are exceptions" if reasons else "fail with ours"] += 1
        if not reasons:
            wrong.append(test)
    return counts, wrong, sorted(set(exceptions) - needed)


def main(words: list[str] | None = None, folder: Path = HERE / "exceptions") -> int:
    suites = "\n".join(f"  {name:11}{what}" for name, what in SUITES.items())
    parser = argparse.ArgumentParser(
        "python -m tests.peers",
        description=__doc__,
        epilog=f"suites:\n{suites}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", choices=SUITES, metavar="SUITE")
    parser.add_argument("path", type=Path, metavar="PATH")
    options, arguments = parser.parse_known_args(words)
    if not options.path.exists():
        parser.error(f"{options.path} does not exist; give the peer's test file or folder")
    theirs = run(options.suite, options.path, "theirs", arguments)
    if not theirs:
        print(f"{options.suite}: no test of {options.path} was collected and chosen")
        return 1
    ours = run(options.suite, options.path, "ours", arguments)
    counts, wrong, unneeded = compare(theirs, ours, read_exceptions(options.suite, folder))
    for test in wrong:
        print(f"fails with ours: {test}")
    for pattern in unneeded:
        print(f"not needed in this run: the exception {pattern}")
    print(f"{options.suite}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    return 1 if wrong or not counts["pass with theirs"] else 0


if __name__ == "__main__":
    sys.exit(main())
