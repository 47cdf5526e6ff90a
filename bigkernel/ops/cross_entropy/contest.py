"""What models run in place of the loss, for ``tuning.py`` and the benchmark."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkernel import registry, tuning

SMALLEST = 1 << 18  # as `registry.InModels` has it
_CLASSES = 8192


def theirs(labels: Tensor, logits: Tensor) -> Tensor:
    """ForCausalLMLoss of transformers, after the shift."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def _draw(count: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Logits, labels."""
    rows = count // _CLASSES
    labels = torch.randint(0, _CLASSES, (rows,), generator=generator)
    return [torch.randn(rows, _CLASSES, generator=generator).to(dtype), labels]


def contests(cross_entropy: tuning.Function) -> dict[str, registry.Contest]:
    """Of hard labels, as language models have them."""

    def torchs(logits: Tensor, labels: Tensor) -> Tensor:
        return theirs(labels, logits)

    return {
        "cross_entropy": tuning.sized("F.cross_entropy", _draw, cross_entropy, torchs, SMALLEST)
    }
