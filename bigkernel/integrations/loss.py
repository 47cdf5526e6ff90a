"""The loss of language models, from logits in their own dtype.

transformers makes a float32 copy of the logits first; `bigkernel.ops.cross_entropy` computes in
float32 from what there is. Models ask for their loss by ``self.loss_function``, which is set for
the one model. A model that calls torch's cross-entropy in its own forward keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss import loss_utils

from bigkernel.integrations import native
from bigkernel.integrations.report import Change
from bigkernel.integrations.source import names_in
from bigkernel.integrations.subclass import original_class
from bigkernel.ops.cross_entropy import cross_entropy

_SETTING = "_loss_function"


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss: labels [B, S] are shifted by one, logits are [B, S, V].

    num_items_in_batch: divides the sum of the losses; None: their mean.
    """
    if shift_labels is None and native.takes("cross_entropy", logits):
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = _loss(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index)
    if loss is not None:
        return loss
    theirs: Tensor = loss_utils.ForCausalLMLoss(
        logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
    )
    return theirs


def masked_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForMaskedLMLoss: as `causal_lm_loss`, with the labels where they stand."""
    loss = _loss(logits, labels, vocab_size, num_items_in_batch, ignore_index)
    if loss is not None:
        return loss
    theirs: Tensor = loss_utils.ForMaskedLMLoss(
        logits, labels, vocab_size, num_items_in_batch, ignore_index, **kwargs
    )
    return theirs


def _loss(
    logits: Tensor, labels: Any, vocab_size: int, items: Any, ignore_index: int
) -> Tensor | None:
    """The loss, or None where transformers' function is to compute it."""
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


# What stands in the place of what.
_OURS = {
    loss_utils.ForCausalLMLoss: causal_lm_loss,
    loss_utils.ForMaskedLMLoss: masked_lm_loss,
}


@dataclass
class _Set:
    """A model that got a loss function, and the one that had been set on it, if any."""

    model: nn.Module
    before: Any
    ours: Any

    def give_back(self) -> None:
        held = vars(self.model)
        if held.get(_SETTING) is not self.ours:
            return  # another one has been chosen since
        if self.before is None:
            del held[_SETTING]
        else:
            held[_SETTING] = self.before


def apply(model: nn.Module, names: frozenset[str]) -> Change:
    """Set the loss function of every language model in ``model``."""
    change = Change()
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        used = names_in(original_class(module))
        if "CrossEntropyLoss" in used:
            change.keep(module, "cross_entropy", "its forward calls torch's")
        if "loss_function" not in used:
            continue
        theirs: Any = module.loss_function
        if theirs in (causal_lm_loss, masked_lm_loss):
            change.replace(module, "cross_entropy")
            continue
        ours = _OURS.get(theirs)
        if ours is None:
            continue
        reason = native.why_not("cross_entropy", module)
        if reason is not None:
            change.leave(module, "cross_entropy", reason)
            continue
        before = vars(module).get(_SETTING)
        vars(module)[_SETTING] = ours
        change.undo.append(_Set(module, before, ours))
        change.replace(module, "cross_entropy")
    return change
