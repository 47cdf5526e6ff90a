"""One binary under several versions of PyTorch: `make test-abi`.

Audits bigkernel/libbigkernel_ops.so with torch-abi-audit (must be STABLE, for torch 2.11 or
earlier), then lets each interpreter named on the command line load that very file and run the three
ops natively, forward and backward, against the package's PyTorch backend. A script and not a pytest
file, because the second interpreter has PyTorch and nothing else.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
import torch, bigkernel
from bigkernel import _library
assert _library.native is not None, _library.native_error
torch.manual_seed(0)

def both(run, tolerance=1e-4):
    def result(name):
        with bigkernel.use_backend(name):
            return run()
    results = {name: result(name) for name in ("cpu", "torch")}
    try:
        for a, b in zip(*results.values()):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-4)
    except AssertionError:
        for name, first in results.items():  # which of them is not what it is
            again = "the same" if all(map(torch.equal, first, result(name))) else "another result"
            print(f"{name}: the same call once more gives {again}")
        raise

q, k, v = (torch.randn(2, h, 33, 40) for h in (4, 2, 2))
def attention():
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = bigkernel.ops.attention(*leaves, causal=True, window=(20, None))
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]
both(attention)

start = torch.randn(1001)
def adam():
    p = start.clone().requires_grad_()
    optimizer = bigkernel.optim.AdamW([p], lr=0.1, max_grad_norm=1.0)
    for _ in range(3):
        optimizer.zero_grad(); p.square().sum().backward(); optimizer.step()
    return [p.detach()]
both(adam)

images = torch.randint(0, 256, (3, 3, 50, 60), dtype=torch.uint8)
t = bigkernel.transforms
jitter = t.ColorJitter(0.4, 0.4, 0.4)
chain = t.Compose([t.RandomResizedCrop(32), jitter, t.Normalize([0.5] * 3, [0.5] * 3)])
# The steps of a chain round to whole values of uint8, so one of them may differ by 1 / 255 / std.
augment = lambda: [chain(images, generator=torch.Generator().manual_seed(1), ids=torch.arange(3))]
both(augment, tolerance=2 / 255 + 1e-6)
print(f"torch {torch.__version__}: attention, adam and augment run in {_library.native.path}")
"""


def audit(command: str, binary: Path) -> None:
    done = subprocess.run(
        [command, "--json", "--check", "torch", str(binary)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"torch-abi-audit refuses {binary}: {done.stdout}{done.stderr}")
    (library,) = json.loads(done.stdout)["bundled_libs"]  # no module of Python's is in it
    verdict = library["torch"]
    oldest = tuple(int(part) for part in verdict["min_torch_version"].split(".")[:2])
    if not verdict["stable"] or verdict["unstable_symbols"] or oldest > (2, 11):
        sys.exit(f"{binary} is not STABLE from torch 2.11 on: {verdict}")
    print(f"torch-abi-audit: {binary.name} is STABLE, minimum torch {oldest[0]}.{oldest[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audit", required=True, help="torch-abi-audit's command")
    parser.add_argument("python", nargs="+", help="interpreters with different versions of PyTorch")
    arguments = parser.parse_args()
    audit(arguments.audit, ROOT / "bigkernel" / "libbigkernel_ops.so")
    for python in arguments.python:
        subprocess.run([python, "-c", SMOKE], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
