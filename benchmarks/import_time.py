"""What `import bigkernel` takes above `import torch`.

    python benchmarks/import_time.py [--rounds 15]

Each round starts three processes in turn: one that imports nothing, one torch, one bigkernel. The
figure is the median over the rounds of (bigkernel - torch) within a round, with its quartiles; the
bar is 0.15 s. The first round, which may read from the disk, does not count.
"""

import argparse
import statistics
import subprocess
import sys
import time

BAR = 0.15
CODE = {"nothing": "", "torch": "import torch", "bigkernel": "import torch, bigkernel"}


def seconds(code: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    times = [{name: seconds(code) for name, code in CODE.items()} for _ in range(rounds + 1)][1:]
    for name in CODE:
        print(f"import {name}: {statistics.median(t[name] for t in times):.3f} s")
    above = sorted(t["bigkernel"] - t["torch"] for t in times)
    low, middle, high = statistics.quantiles(above, n=4)
    print(f"above torch: {middle:.3f} s (quartiles {low:.3f} to {high:.3f}), bar {BAR} s")
    return int(middle > BAR)


if __name__ == "__main__":
    sys.exit(main())
