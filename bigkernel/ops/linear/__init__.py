"""Linear layers of 16-bit tensors on processors that multiply none: in float32, rounded once."""

from bigkernel.ops.linear.op import linear

__all__ = ["linear"]
