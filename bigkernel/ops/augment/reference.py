"""What the augment op computes, in plain PyTorch: the definition, and the ``torch`` backend.

The tables are explained in ``table.py``. Sampling goes image by image (sizes and
maps differ), vectorised over pixels; colour and normalisation go over the whole batch. Positions
are computed in float64, pixel values in float32 (uint8, float32 and shorter) or float64 (others).
Autograd can follow it from the images to the result.

Sources of the arithmetic: torchvision.transforms.v2.functional (adjust_*, rotate, affine) and
torch.nn.functional.interpolate, which it calls to resize.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigkernel.ops.augment.table import (
    BORDER,
    BRIGHTNESS,
    CLAMP,
    CODES,
    CONTRAST,
    FAR,
    FILL_BLEND,
    GREYSCALE,
    HUE,
    MAP,
    NATIVE_DTYPES,
    NEAREST,
    NEAREST_EVEN,
    NEAREST_RESIZE,
    NEAREST_WARP,
    OUTPUT,
    SATURATION,
    SOURCE,
    WHOLE_NUMBERS,
    Color,
)

GREY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue

OUT_DTYPES = (
    *(getattr(torch, name) for name in NATIVE_DTYPES),
    *(torch.float64, torch.bool, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)


def bound(dtype: torch.dtype) -> float:
    """The value of white: a whole-number dtype's largest, 1 for floats and bool."""
    whole = not dtype.is_floating_point and dtype != torch.bool
    return float(torch.iinfo(dtype).max) if whole else 1.0


class Arguments(NamedTuple):
    """Of the op, in the schema's order; they are explained in ``op.py``."""

    images: list[Tensor]
    geometry: Tensor
    color: Tensor
    fill: Tensor
    mean: Tensor | None
    std: Tensor | None
    out_h: int
    out_w: int
    channels_last_in: bool
    channels_last_out: bool
    interpolation: int  # an index into INTERPOLATIONS
    antialias: bool
    in_scale: float
    out_dtype: int  # an index into OUT_DTYPES


def augment(
    images: list[Tensor],
    geometry: Tensor,
    color: Tensor,
    fill: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    out_h: int,
    out_w: int,
    channels_last_in: bool,
    channels_last_out: bool,
    interpolation: int,
    antialias: bool,
    in_scale: float,
    out_dtype: int,
) -> Tensor:
    """The op; the arguments are `Arguments`."""
    device = images[0].device if images else geometry.device
    source_dtype = images[0].dtype if images else torch.uint8
    target_dtype = OUT_DTYPES[out_dtype]
    whole = not source_dtype.is_floating_point
    dtype = torch.float32 if source_dtype in OUT_DTYPES[: len(NATIVE_DTYPES)] else torch.float64
    unscaled = in_scale == 1.0 and mean is None and std is None
    plain = not bool(color[:, :, 0].any())
    moved = whole and plain and unscaled and interpolation == 0 and target_dtype == source_dtype
    if moved and dtype == torch.float64:
        dtype = source_dtype  # nothing is computed: all of 64 bits are kept
    samples = list(images[0]) if len(images) == 1 and images[0].dim() == 4 else list(images)
    n, channels = geometry.shape[0], fill.shape[1]
    fill = _in_dtype(fill.to(device), dtype).expand(n, channels)

    value = torch.empty(n, channels, out_h, out_w, dtype=dtype, device=device)
    for i, (image, row) in enumerate(zip(samples, geometry.tolist(), strict=True)):
        planes = image.movedim(-1, 0) if channels_last_in else image
        planes = planes.to(dtype) if dtype == torch.float64 else planes
        value[i] = sample(planes, row, fill[i], out_h, out_w, interpolation, antialias, dtype)

    if not plain:
        value = recolor(value, color, source_dtype)
    if in_scale != 1.0:
        value = value * in_scale
    if mean is not None:
        value = value - mean.to(device, dtype).view(-1, 1, 1)
    if std is not None:
        value = value / std.to(device, dtype).view(-1, 1, 1)
    if channels_last_out:
        value = value.movedim(1, -1).contiguous()
    if target_dtype == torch.bool != source_dtype:
        return value != 0
    if whole and unscaled and not target_dtype.is_floating_point and target_dtype != source_dtype:
        return value.round().to(torch.int64).to(target_dtype)  # the bits that fit, as Tensor.to
    return _in_dtype(value, target_dtype)


def _in_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype``; in whole numbers, rounded and within its range."""
    if dtype.is_floating_point or value.dtype == dtype:
        return value.to(dtype)
    value = value.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).round()
    if dtype == torch.bool:
        return value > 0
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if dtype.itemsize < 4:
        return value.clamp(low, high).to(dtype)
    # The largest numbers are none of value's dtype, or of float64; the one below them is.
    value = value.double()
    below = float(np.nextafter(float(high), 0.0)) if float(high) > high else float(high)
    result = value.clamp(low, below).to(dtype)
    return result.where(value <= below, torch.full_like(result, high))


def sample(
    image: Tensor,
    row: list[float],
    fill: Tensor,
    out_h: int,
    out_w: int,
    interpolation: int,
    antialias: bool,
    dtype: torch.dtype,
) -> Tensor:
    """One image [C, H, W] through its row of ``geometry``: [C, out_h, out_w] in ``dtype``."""
    device = image.device
    a, b, c, d, e, f = row[MAP]
    border, rule = row[BORDER], row[NEAREST]
    origin_x, origin_y, end_x, end_y = row[SOURCE]
    x0, x1 = _box(origin_x, end_x, image.shape[2])
    y0, y1 = _box(origin_y, end_y, image.shape[1])
    fill = fill.view(-1, 1, 1)
    out = fill.expand(-1, out_h, out_w).clone()
    out_x0, out_y0, out_x1, out_y1 = row[OUTPUT]
    left, right = _box(out_x0, out_x1, out_w)
    top, bottom = _box(out_y0, out_y1, out_h)
    if x0 >= x1 or y0 >= y1 or left >= right or top >= bottom:
        return out

    x = torch.arange(left, right, device=device, dtype=torch.float64) + 0.5
    y = (torch.arange(top, bottom, device=device, dtype=torch.float64) + 0.5).view(-1, 1)
    # An axis-aligned map keeps [1, W] and [H, 1]: everything below broadcasts.
    sx = (a * x + c).view(1, -1) if b == 0 else a * x + (b * y + c)
    sy = e * y + f if d == 0 else d * x + (e * y + f)
    reachable = (sx.abs() <= FAR) & (sy.abs() <= FAR)
    sx, sy = (s.where(s.abs() <= FAR, torch.zeros_like(s)) for s in (sx, sy))

    if interpolation == 0:
        if rule == NEAREST_WARP:
            warped_x = _warped(x, y, a, b, c, out_w, out_h, x0, x1)
            warped_y = _warped(x, y, d, e, f, out_w, out_h, y0, y1)
            reachable = (warped_x.abs() <= FAR) & (warped_y.abs() <= FAR)
            column = torch.where(reachable, warped_x, 0).round().long() + x0
            line = torch.where(reachable, warped_y, 0).round().long() + y0
        else:
            straight = b == 0 and d == 0
            column = _nearest(sx, rule, a, straight, origin_x)
            line = _nearest(sy, rule, e, straight, origin_y)
        inside = reachable & (border == CLAMP)
        inside = inside | (reachable & (column >= x0) & (column < x1) & (line >= y0) & (line < y1))
        taken = image[:, line.clamp(y0, y1 - 1), column.clamp(x0, x1 - 1)].to(dtype)
        out[:, top:bottom, left:right] = torch.where(inside, taken, fill)
        return out

    reach_x = min(max(1.0, math.hypot(a, b)), FAR) if antialias else 1.0
    reach_y = min(max(1.0, math.hypot(d, e)), FAR) if antialias else 1.0
    taps_x = _taps(sx, reach_x, x0, x1, border, dtype)
    taps_y = _taps(sy, reach_y, y0, y1, border, dtype)
    if b == 0 and d == 0:
        weighted, cover = _separable(image[:, y0:y1], taps_x, taps_y, y0, dtype)
    else:
        weighted, cover = _gather(image, taps_x, taps_y, dtype)
    if border == FILL_BLEND:
        blended = cover * (weighted - fill) + fill
    else:
        blended = weighted + (1 - cover) * fill
    if not bool(fill.isfinite().all()):  # 0 times it would be NaN, wherever it is not seen
        blended = torch.where(cover > 1 - 1e-6, weighted, blended)
        blended = torch.where(cover == 0, fill, blended)
    out[:, top:bottom, left:right] = torch.where(reachable, blended, fill)
    return out


def _box(start: float, stop: float, size: int) -> tuple[int, int]:
    """One side of a box, cut to 0..size; NaN makes it empty."""
    if not start < stop:
        return 0, 0
    return int(max(min(start, size), 0)), int(max(min(stop, size), 0))


def _nearest(s: Tensor, rule: float, step: float, straight: bool, origin: float) -> Tensor:
    """Index of the pixel nearest to the pixel-edge coordinate ``s``, by the wanted rule."""
    usable = straight and 1 / FAR <= abs(step) <= FAR and abs(origin) <= FAR
    if rule == NEAREST_RESIZE and usable:
        # interpolate(mode="nearest") multiplies the output index by the scale in float32, and so
        # lands on either side of a whole number; the same product gives the same pixel.
        scale = torch.tensor(abs(step), dtype=torch.float64, device=s.device).float()
        k = ((s - origin) / abs(step) - 0.5).round()
        return (k.float() * scale).floor().long() + int(origin)
    # What is a tie in exact arithmetic is to be one here: drop the noise of sines and products.
    if rule == NEAREST_EVEN:
        return (((s - 0.5) * 65536).round() / 65536).round().long()
    return ((s * 65536).round() / 65536).floor().long()


def _warped(
    x: Tensor,
    y: Tensor,
    by_x: float,
    by_y: float,
    shift: float,
    out_w: int,
    out_h: int,
    start: int,
    stop: int,
) -> Tensor:
    """float32 [H, W] positions in start..stop, where rint gives the pixel, as torchvision has them.

    Its rotate and affine take (x, y, 1) from the middle of the output to -1..1 across the source by
    a matrix product, and grid_sample takes that to pixels, all in float32. The product fuses y into
    its sum, but for the smallest images, which torch.bmm takes through plain loops.
    """
    half = torch.tensor((stop - start) * 0.5, dtype=torch.float32, device=x.device)
    middle = by_x * (out_w * 0.5) + by_y * (out_h * 0.5) + shift - start - (stop - start) * 0.5
    theta = torch.tensor([by_x, by_y, middle], dtype=torch.float64, device=x.device).float() / half
    along = (x - out_w * 0.5).float() * theta[0]
    across = (y - out_h * 0.5).float()
    if 6 * out_w * out_h >= 400:
        product = _fused(across, theta[1], along)
    else:
        product = along + across * theta[1]
    return ((product + theta[2]) + 1.0) * half - 0.5


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32, rounded once."""
    product, c = a.double() * b.double(), c.double()  # exact
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    # To odd: what float64 has rounded to even might otherwise look like a tie to float32.
    even = total.view(torch.int64) & 1 == 0
    beyond = torch.nextafter(total, torch.where(error > 0, math.inf, -math.inf).to(total))
    return torch.where((error != 0) & even, beyond, total).float()


Taps = list[tuple[Tensor, Tensor]]  # (index, weight) of each tap; shaped like the positions


def _taps(
    s: Tensor, reach: float, start: int, stop: int, border: float, dtype: torch.dtype
) -> Taps:
    """Taps of a triangle filter of half-width ``reach`` around ``s``, none outside start..stop.

    Weights sum to 1 before taps outside are dropped. Under CLAMP a dropped tap's weight goes to
    the edge pixel (reach 1), or to all taps that are left (reach > 1, as antialiasing does).
    """
    first = (s - 0.5 - reach).floor().long() + 1
    count = 2 if reach == 1.0 else int(2 * reach) + 1
    # A window much wider than the box still only meets the box's pixels.
    if count > stop - start + 2:
        first, count = torch.full_like(first, start), stop - start
    index = [first + t for t in range(count)]
    weight = [(1 - (i + 0.5 - s).abs() / reach).clamp(min=0) for i in index]
    inside = [(i >= start) & (i < stop) for i in index]
    if border == CLAMP and reach == 1.0:
        return [(i.clamp(start, stop - 1), w.to(dtype)) for i, w in zip(index, weight, strict=True)]
    kept = [w.where(ok, torch.zeros_like(w)) for w, ok in zip(weight, inside, strict=True)]
    if reach > 1.0:
        total = torch.stack(kept).sum(0) if border == CLAMP else _window_sum(s, reach)
        kept = [torch.where(total > 0, w / total, torch.zeros_like(w)) for w in kept]
    return [(i.clamp(start, stop - 1), w.to(dtype)) for i, w in zip(index, kept, strict=True)]


def _window_sum(s: Tensor, reach: float) -> Tensor:
    """Sum of the triangle filter over every whole pixel, inside the image or not."""
    # Pixels left of the centre lie at distances u, u + 1, ..., right of it at 1 - u, 2 - u, ...
    right = (s - 0.5).ceil() + 0.5 - s  # 0 <= right < 1
    total = torch.zeros_like(s)
    for distance in (right, 1 - right):
        n = (reach - distance).ceil().clamp(min=0)  # distances below reach
        total = total + n - (n * distance + n * (n - 1) / 2) / reach
    return total


def _separable(
    lines: Tensor, taps_x: Taps, taps_y: Taps, y0: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As ``_gather`` for an axis-aligned map; ``lines`` is the image from line ``y0`` on."""
    shape = (lines.shape[0], lines.shape[1], taps_x[0][0].numel())
    narrow = torch.zeros(shape, dtype=dtype, device=lines.device)
    for column, weight in taps_x:
        narrow += _weigh(lines[:, :, column.view(-1)].to(dtype), weight.view(-1))
    shape = (lines.shape[0], taps_y[0][0].numel(), shape[2])
    weighted = torch.zeros(shape, dtype=dtype, device=lines.device)
    for line, weight in taps_y:
        weighted += _weigh(narrow[:, line.view(-1) - y0], weight.view(-1, 1))
    return weighted, _total(taps_y).view(-1, 1) * _total(taps_x).view(-1)


def _total(taps: Taps) -> Tensor:
    return torch.stack([weight for _, weight in taps]).sum(0)


def _gather(image: Tensor, taps_x: Taps, taps_y: Taps, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weighted sum and sum of weights over the taps of every output pixel."""
    shape = torch.broadcast_shapes(taps_x[0][0].shape, taps_y[0][0].shape)
    weighted = torch.zeros(image.shape[0], *shape, dtype=dtype, device=image.device)
    cover = torch.zeros(shape, dtype=dtype, device=image.device)
    for line, weight_y in taps_y:
        for column, weight_x in taps_x:
            weight = weight_y * weight_x
            weighted += _weigh(image[:, line, column].to(dtype), weight)
            cover += weight
    return weighted, cover


def _weigh(tap: Tensor, weight: Tensor) -> Tensor:
    # Not tap * 0: a NaN or infinity beside the wanted pixel must not reach it.
    return torch.where(weight != 0, tap * weight, torch.zeros_like(tap))


def recolor(value: Tensor, color: Tensor, source: torch.dtype) -> Tensor:
    """Apply each sample's list of (code, factor) pairs to [N, C, H, W].

    The values are of dtype ``source``, held in floats.
    """
    table = color.tolist()
    for k in range(color.shape[1]):
        codes = [pairs[k][0] for pairs in table]
        for code in set(codes) - {0.0}:
            if code not in CODES:
                raise ValueError(
                    f"bigkernel.augment: color codes must be 0 to {len(Color)}, or "
                    f"{WHOLE_NUMBERS + 1} to {WHOLE_NUMBERS + len(Color)}, got {code}."
                )
            rows = [i for i, c in enumerate(codes) if c == code]
            numbers = [table[i][k][1] for i in rows]
            factor = torch.tensor(numbers, dtype=value.dtype, device=value.device)
            value[rows] = _adjust(value[rows], int(code), factor, source)
    return value


def _adjust(value: Tensor, code: int, factor: Tensor, source: torch.dtype) -> Tensor:
    """One colour operation on [M, C, H, W] with a factor for each sample."""
    whole, operation = code >= WHOLE_NUMBERS and not source.is_floating_point, code % WHOLE_NUMBERS
    white = bound(source)
    colored = value.shape[1] == 3
    if not colored and operation in (SATURATION, HUE, GREYSCALE):
        return value
    if whole:
        value = _in_dtype(value, source).to(value.dtype)
    f = factor.view(-1, 1, 1, 1)
    if operation == BRIGHTNESS:
        result = (value * f).clamp(0, white)
    elif operation == HUE:
        result = _turn_hue(value / white, f) * (white + 0.999 if whole else white)
    else:
        grey = value
        if colored:
            red, green, blue = value.unbind(1)
            grey = red * GREY[0]
            grey = torch.add(grey, green, alpha=GREY[1])
            grey = torch.add(grey, blue, alpha=GREY[2]).unsqueeze(1)
        if operation == GREYSCALE:
            return (_cut(grey, source) if whole else grey).expand_as(value)
        grey = grey.floor() if whole and colored else grey
        if operation == CONTRAST:
            grey = grey.mean((1, 2, 3), keepdim=True)
        if whole and value.dtype == torch.float32:
            # The last bit decides where values are cut, so this sum is fused where torch's add is.
            shape = torch.broadcast_shapes(value.shape, grey.shape)
            result = _fused(grey.expand(shape), 1 - f, value * f).clamp(0, white)
        else:
            result = (value * f + grey * (1 - f)).clamp(0, white)
    return _cut(result, source) if whole else result


def _cut(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers as Tensor.to makes them: cut towards 0, but of bool whatever is not 0."""
    return (value != 0).to(value.dtype) if dtype == torch.bool else value.trunc()


def _turn_hue(rgb: Tensor, factor: Tensor) -> Tensor:
    """Shift the hue of [M, 3, H, W] in 0..1 by ``factor`` turns of the colour circle.

    HSV after A. R. Smith, "Color gamut transform pairs" (SIGGRAPH 1978). With k = 5, 3, 1 + 6 h
    modulo 6, a channel is v - v s * clamp(min(k, 4 - k), 0, 1), and v s is just max - min.
    """
    red, green, blue = rgb.unbind(1)
    low, high = rgb.aminmax(dim=1)
    chroma = high - low
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sector = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = sector + 6 * factor.view(-1, 1, 1)
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (hue + offset).remainder(6)
        channels.append(high - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)
