"""What models run in place of a head and its loss, for ``tuning.py`` and the benchmark."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkernel import registry, tuning

# Bytes of logits, as `registry.InModels` has them. Below the first they are no burden, and in bf16
# their products are faster whole. Above the second, not to hold them counts for more than time.
SMALLEST, CONTESTED = 1 << 26, 1 << 28
_WIDTH, _CLASSES = 384, 8192


def theirs(target: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """A head and ForCausalLMLoss of transformers, after the shift."""
    logits = F.linear(input, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)


def _draw(count: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Input, weight, target; four times the elements, of which models have at least so many."""
    rows = 4 * count // _CLASSES
    input = torch.randn(rows, _WIDTH, generator=generator).to(dtype)
    weight = (torch.randn(_CLASSES, _WIDTH, generator=generator) * 0.02).to(dtype)
    return [input, weight, torch.randint(0, _CLASSES, (rows,), generator=generator)]


def contests(linear_cross_entropy: tuning.Function) -> dict[str, registry.Contest]:
    """Of hard labels, as language models have them."""

    def torchs(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return theirs(target, input, weight)

    words = "F.linear and F.cross_entropy"
    one = tuning.sized(words, _draw, linear_cross_entropy, torchs, SMALLEST)
    return {"linear_cross_entropy": one}
