"""A bias and the activation after it in one pass: the middle of a plain (not gated) MLP."""

from bigkernel.ops.bias_act.op import bias_act

__all__ = ["bias_act"]
