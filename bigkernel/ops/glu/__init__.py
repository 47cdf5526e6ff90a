"""Gated linear units: an activation of one half times the other (SwiGLU, GeGLU and so on)."""

from bigkernel.ops.glu.op import glu

__all__ = ["glu"]
