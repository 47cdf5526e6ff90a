"""The loss of language models by the op, whose logits stay in their own dtype, or by torch's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bigkernel.integrations import native


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels [B, S] of the inputs as those of what comes after each."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def is_served(logits: Tensor, labels: Any) -> bool:
    """Whether the op computes the loss of these, and not torch."""
    return (
        native.takes("cross_entropy", logits)
        and type(labels) is Tensor
        and labels.dtype == torch.int64
    )


def token_loss(
    cross_entropy: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    items: Any,
    ignore_index: int,
) -> Tensor:
    """The loss of each row's label.

    Args:
        cross_entropy: the op, or torch's function.
        logits: [.., vocab_size], in the dtype that it is given.
        labels: int64, one a row of the logits.
        vocab_size: classes.
        items: what the sum of the losses is divided by; None: their mean.
        ignore_index: the label that does not count.
    """
    reduction = "mean" if items is None else "sum"
    labels = labels.reshape(-1).to(logits.device)
    loss = cross_entropy(
        logits.view(-1, vocab_size), labels, ignore_index=ignore_index, reduction=reduction
    )
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
