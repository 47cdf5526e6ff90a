"""RMS norm and layer norm, with the addition to the residual stream that comes before them."""

from bigkernel.ops.norm.op import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
