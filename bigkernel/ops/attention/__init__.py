"""Attention, for dense batches and for packed sequences, and torch's signature of it."""

from bigkernel.ops.attention.op import attention, attention_varlen

__all__ = ["attention", "attention_varlen"]
