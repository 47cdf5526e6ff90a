"""The Adam update of many tensors at once, and the norm of their gradients."""

from bigkernel.ops.adam.op import AdamGroup, adam_groups_step_, adam_norm, adam_step_

__all__ = ["AdamGroup", "adam_groups_step_", "adam_norm", "adam_step_"]
