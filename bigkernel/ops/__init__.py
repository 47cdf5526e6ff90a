"""The ops: one file each, with schema, argument checks, fake, autograd and the public function."""

from bigkernel.ops.adam import AdamGroup, adam_groups_step_, adam_norm, adam_step_
from bigkernel.ops.attention import attention, attention_varlen
from bigkernel.ops.augment import augment

__all__ = [
    "AdamGroup",
    "adam_groups_step_",
    "adam_norm",
    "adam_step_",
    "attention",
    "attention_varlen",
    "augment",
]
