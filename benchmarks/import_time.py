"""What `import bigkernel` takes above `import torch`.

    python benchmarks/import_time.py [--rounds 15]

Each round starts a process that imports torch, and then bigkernel: the second import takes what the
first has not brought. (Two processes, of which one imports torch alone, would differ by more than
that, since torch's import takes seconds.) The figure is the median over the rounds, with its
quartiles; the bar is 0.15 s. The first round, which may read from the disk and write bytecode, does
not count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

BAR = 0.15
CODE = """
import time
begin = time.perf_counter()
import torch
between = time.perf_counter()
import bigkernel
print([between - begin, time.perf_counter() - between])
"""
# An installation brings bytecode. With this variable each process here would compile the package's
# sources again, which takes longer than all else that the import does.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def seconds() -> tuple[float, float]:
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.PIPE)
    torch, bigkernel = json.loads(done.stdout)
    return torch, bigkernel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch, bigkernel = zip(*[seconds() for _ in range(rounds + 1)][1:], strict=True)
    low, middle, high = statistics.quantiles(bigkernel, n=4)
    print(f"import torch: {statistics.median(torch):.3f} s")
    print(f"above it: {middle:.3f} s (quartiles {low:.3f} to {high:.3f}), bar {BAR} s")
    return int(middle > BAR)


if __name__ == "__main__":
    sys.exit(main())
