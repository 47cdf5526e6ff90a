"""Image augmentation: geometry, colour and normalisation of a batch in one pass."""

from bigkernel.ops.augment.op import augment

__all__ = ["augment"]
