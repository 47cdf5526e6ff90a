"""Runs a command that compiles, and says what each GPU architecture cost: `make wheel` does so.

    python tools/build_cost.py COMMAND ...

Processor seconds of all its compilers, and the most memory that one of them held. nvcc starts a
preprocessor, cicc and ptxas for each architecture; what is compiled for the host is a line of its
own. The processes are looked at four times a second, so the last moments of each are not counted.
Ends as the command does.
"""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# What tells, on a compiler's command line, the architecture that it works for.
ARCHITECTURE = {
    "cc1plus": r"-E .*__CUDA_ARCH__=(\d+)0\b",  # it preprocesses for a device
    "cicc": r"-arch compute_(\w+)",
    "ptxas": r"-arch=sm_(\w+)",
}
HOST = "the host"
INTERVAL = 0.25  # seconds
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Cost:
    seconds: float = 0.0
    bytes: int = 0


def architecture(name: str, line: str) -> str:
    """What a compiler compiles for: "sm_90" or the host."""
    found = re.search(ARCHITECTURE[name], line)
    return f"sm_{found[1].removesuffix('a')}" if found else HOST


def look(root: int) -> dict[tuple[int, int], tuple[str, float, int]]:
    """(process, when it started) -> (what for, seconds, bytes) of the compilers below ``root``."""
    parents, found = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, rest = (folder / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            fields = rest.split()
            pid = int(folder.name)
            parents[pid] = int(fields[1])
            if name not in ARCHITECTURE:
                continue
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            most = re.search(r"^VmHWM:\s+(\d+) kB", (folder / "status").read_text(), re.M)
        except (OSError, IndexError):  # it has ended
            continue
        if not line or most is None:  # it is ending, and has neither any more
            continue
        seconds = (int(fields[11]) + int(fields[12])) / TICK
        found[pid, int(fields[19])] = (architecture(name, line), seconds, 1024 * int(most[1]))

    def is_below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return {key: seen for key, seen in found.items() if is_below(key[0])}


def costs(command: Sequence[str]) -> tuple[int, dict[str, Cost]]:
    """(exit status, architecture -> cost) of a command."""
    running, ended = subprocess.Popen(command), threading.Event()
    seen: dict[tuple[int, int], tuple[str, float, int]] = {}

    def watch() -> None:
        while not ended.wait(INTERVAL):
            seen.update(look(running.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        status = running.wait()
    finally:
        ended.set()
        watcher.join()
    found: dict[str, Cost] = {}
    for what, seconds, peak in seen.values():
        cost = found.setdefault(what, Cost())
        cost.seconds += seconds
        cost.bytes = max(cost.bytes, peak)
    return status, found


def main(command: Sequence[str]) -> int:
    if not command:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    status, found = costs(command)
    for what in sorted(found, key=lambda what: (what != HOST, len(what), what)):
        cost = found[what]
        print(
            f"bigkernel: compiling for {what}: {cost.seconds:.0f} s of processor, at most "
            f"{cost.bytes / 2**20:.0f} MiB in one compiler"
        )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
