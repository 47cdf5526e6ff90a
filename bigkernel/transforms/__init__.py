"""Image transforms with torchvision.transforms.v2's names, for whole batches at once.

Every image of a batch gets parameters of its own, drawn from a ``torch.Generator`` or keyed by
(seed, sample id, transform), and a ``Compose`` of transforms runs as one native call. See
:class:`Transform` for what a call takes and returns, and :class:`Compose` for what folding means.
"""

from bigkernel.transforms import steps
from bigkernel.transforms.arguments import InterpolationMode
from bigkernel.transforms.color import ColorJitter, ColorJitterParams, RandomGrayscale
from bigkernel.transforms.container import Compose, RandomApply, Stage
from bigkernel.transforms.convert import Normalize, ToDtype, ToImage
from bigkernel.transforms.geometry import (
    CenterCrop,
    CropParams,
    Pad,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomVerticalFlip,
    Resize,
    ResizedCropParams,
    ResizeParams,
)
from bigkernel.transforms.transform import ImageInfo, Params, Transform
from bigkernel.transforms.warp import AffineParams, RandomAffine, RandomRotation, RotationParams

__all__ = [
    "AffineParams",
    "CenterCrop",
    "ColorJitter",
    "ColorJitterParams",
    "Compose",
    "CropParams",
    "ImageInfo",
    "InterpolationMode",
    "Normalize",
    "Pad",
    "Params",
    "RandomAffine",
    "RandomApply",
    "RandomCrop",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomVerticalFlip",
    "Resize",
    "ResizeParams",
    "ResizedCropParams",
    "RotationParams",
    "Stage",
    "ToDtype",
    "ToImage",
    "Transform",
    "steps",
]
