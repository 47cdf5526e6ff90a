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
from bigkernel.integrations.token_loss import is_served, shifted, token_loss
from bigkernel.ops.cross_entropy import cross_entropy
from bigkernel.ops.linear_cross_entropy import linear_cross_entropy

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
        shift_labels = shifted(labels, ignore_index)
    if is_served(logits, shift_labels):
        assert shift_labels is not None
        return token_loss(
            cross_entropy, logits, shift_labels, vocab_size, num_items_in_batch, ignore_index
        )
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
    if is_served(logits, labels):
        return token_loss(
            cross_entropy, logits, labels, vocab_size, num_items_in_batch, ignore_index
        )
    theirs: Tensor = loss_utils.ForMaskedLMLoss(
        logits, labels, vocab_size, num_items_in_batch, ignore_index, **kwargs
    )
    return theirs


def of_linear(
    function: Any, hidden: Tensor, linear: nn.Linear, softcap: Any, *given: Any, **more: Any
) -> Tensor | None:
    """``function(logits, *given, **more)`` for the logits of ``linear(hidden)``, never made whole.

    None where that is not known to be the same.
    """
    try:
        wanted = _rows(function, *given, **more)
    except TypeError:  # arguments that the function is to complain about
        return None
    if wanted is None:
        return None
    labels, classes, items, ignore_index = wanted
    if (
        type(labels) is not Tensor
        or labels.dtype != torch.int64
        or labels.numel() * hidden.shape[-1] != hidden.numel()
        or classes not in (None, linear.out_features)
        or (isinstance(items, Tensor) and items.numel() != 1)
        or (softcap is not None and not softcap > 0)
    ):
        return None
    return linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        linear.weight,
        labels.reshape(-1).to(hidden.device),
        linear_bias=linear.bias,
        ignore_index=ignore_index,
        num_items=items,
        softcap=softcap,
    )


def _rows(function: Any, *given: Any, **more: Any) -> tuple[Any, int | None, Any, int] | None:
    """(labels as they belong to the rows, classes, items, ignore_index) of a loss's arguments."""
    if function is F.cross_entropy:
        return given[0], None, None, -100
    if function in (loss_utils.ForCausalLMLoss, causal_lm_loss):
        return _shifted(*given, **more)
    return _standing(*given, **more) if is_known(function) else None


def _shifted(
    labels: Any,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Any = None,
    **kwargs: Any,
) -> tuple[Any, int | None, Any, int]:
    if shift_labels is None:
        shift_labels = shifted(labels, ignore_index)
    return shift_labels, vocab_size, num_items_in_batch, ignore_index


def _standing(
    labels: Any,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> tuple[Any, int | None, Any, int]:
    return labels, vocab_size, num_items_in_batch, ignore_index


def is_known(function: Any) -> bool:
    """Whether this is the loss of a language model, transformers' or the one in its place."""
    return function in _OURS or function in _OURS.values()


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
        if theirs in _OURS.values():
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
