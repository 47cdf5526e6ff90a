"""What is imported with what: the kernels alone bring neither transformers nor torch's compiler."""

import subprocess
import sys

import pytest

HEAVY = ("torch._dynamo", "transformers", "accelerate", "torchvision", "matplotlib", "sympy")


@pytest.mark.parametrize(
    "use",
    [
        "",
        "q = torch.ones(1, 1, 4, 8); bigkernel.ops.attention(q, q, q)",
        "bigkernel.scaled_dot_product_attention(*torch.ones(3, 1, 1, 4, 8))",
        "bigkernel.transforms.RandomHorizontalFlip()(torch.ones(3, 4, 4))",
        "import bigkernel.cli.app, bigkernel.recipes.settings",  # what --help takes
    ],
    ids=["import", "attention", "sdpa", "transforms", "cli"],
)
def test_kernels_bring_nothing_heavy(use):
    code = (
        "import torch, sys\n"
        f"heavy = [name for name in {HEAVY} if name not in sys.modules]\n"
        f"import bigkernel\n{use}\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"
