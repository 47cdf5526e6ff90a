"""Rows of augment's tables for the tests, from what torchvision's functions are given."""

import torch
from torch import Tensor
from torchvision.transforms.v2.functional._geometry import _get_inverse_affine_matrix

from bigkernel.ops.augment import table
from bigkernel.ops.augment.table import CLAMP, FILL_BLEND, FILL_OVER

FLOOR, EVEN, RESIZE, WARP = table.Nearest
CODES = {code.name.lower(): int(code) for code in table.Color}
WHOLE = table.WHOLE_NUMBERS


def row(matrix, box, size, border=CLAMP, rule=FLOOR, out_box=None) -> Tensor:
    """One row of geometry; ``size`` is the output's (height, width)."""
    height, width = size
    values = torch.empty(table.COLUMNS, dtype=torch.float64)
    values[table.MAP] = torch.tensor(matrix, dtype=torch.float64)
    values[table.SOURCE] = torch.tensor(box, dtype=torch.float64)
    values[table.OUTPUT] = torch.tensor(out_box or (0, 0, width, height), dtype=torch.float64)
    values[table.BORDER], values[table.NEAREST] = border, rule
    return values


def resized_crop(top, left, height, width, size, flip_x=False, flip_y=False) -> Tensor:
    a, c, e, f = width / size[1], left, height / size[0], top
    if flip_x:
        a, c = -a, left + width
    if flip_y:
        e, f = -e, top + height
    box = (left, top, left + width, top + height)
    return row((a, 0, c, 0, e, f), box, size, CLAMP, RESIZE)


def crop(top, left, size, image_size) -> Tensor:
    """A crop that may go beyond the image, where it is fill."""
    box = (0, 0, image_size[1], image_size[0])
    return row((1, 0, left, 0, 1, top), box, size, FILL_BLEND)


def affine(angle, translate, scale, shear, image_size, size=None, center=None, fill=True) -> Tensor:
    """torchvision's affine; rotate(angle) is affine(-angle). ``size`` is rotate's expanded size."""
    h, w = image_size
    oh, ow = size or image_size
    offset = [0.0, 0.0] if center is None else [center[0] - w / 2, center[1] - h / 2]
    a, b, c, d, e, f = _get_inverse_affine_matrix(offset, angle, translate, scale, shear)
    matrix = (
        a, b, c - a * ow / 2 - b * oh / 2 + w / 2,
        d, e, f - d * ow / 2 - e * oh / 2 + h / 2,
    )  # fmt: skip
    border = FILL_BLEND if fill else FILL_OVER
    return row(matrix, (0, 0, w, h), (oh, ow), border, WARP)


def chain(*pairs, whole=False) -> Tensor:
    """One sample's colours [1, K, 2] from ("hue", 0.1)-like pairs."""
    codes = [[CODES[name] + WHOLE * whole, factor] for name, factor in pairs]
    return torch.tensor([codes], dtype=torch.float32)
