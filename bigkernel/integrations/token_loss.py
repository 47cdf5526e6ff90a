"""The loss of language models by the op, whose logits stay in their own dtype."""

from typing import Any

import torch
from torch import Tensor

from bigkernel.integrations import native
from bigkernel.ops.cross_entropy import cross_entropy


def token_loss(
    logits: Tensor, labels: Any, vocab_size: int, items: Any, ignore_index: int
) -> Tensor | None:
    """The loss of each row's label, or None where torch is to compute it.

    Args:
        logits: [.., vocab_size], in their own dtype.
        labels: int64, one a row of the logits.
        vocab_size: classes.
        items: what the sum of the losses is divided by; None: their mean.
        ignore_index: the label that does not count.
    """
    if (
        not native.takes("cross_entropy", logits)
        or type(labels) is not Tensor
        or labels.dtype != torch.int64
    ):
        return None
    reduction: Any = "mean" if items is None else "sum"
    labels = labels.reshape(-1).to(logits.device)
    loss = cross_entropy(
        logits.view(-1, vocab_size), labels, ignore_index=ignore_index, reduction=reduction
    )
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
