"""Cross-entropy of given logits, whose gradient may take their place in memory."""

from bigkernel.ops.cross_entropy.op import cross_entropy

__all__ = ["cross_entropy"]
