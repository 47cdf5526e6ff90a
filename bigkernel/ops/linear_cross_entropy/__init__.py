"""A linear layer and the cross-entropy of its results, whose logits never exist all at once."""

from bigkernel.ops.linear_cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
