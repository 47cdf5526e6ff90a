"""Rotary position embedding of queries and keys, into new memory or in place."""

from bigkernel.ops.rope.op import rope, rope_

__all__ = ["rope", "rope_"]
