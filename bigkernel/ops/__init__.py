"""The ops: one file each, with schema, argument checks, fake, autograd and the public function."""

from bigkernel.ops.attention import attention, attention_varlen

__all__ = ["attention", "attention_varlen"]
