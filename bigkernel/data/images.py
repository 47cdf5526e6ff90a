"""Labelled images as uint8: scikit-learn's digits, or a folder with one folder a class."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bigkernel.data.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True)
class ImageData:
    """Images and their labels.

    Attributes:
        images: uint8 [N, C, H, W], or a sequence of N uint8 tensors [C, H, W] of any sizes.
        labels: int64 [N], indices into ``label_names``.
        label_names: name of each class.
        name: what to call this data.
        sha256: of the pixels (digits) or of the files' names and bytes (folder).
        skipped: (file, reason) of each image that could not be read.
    """

    images: Tensor | Sequence[Tensor]
    labels: Tensor
    label_names: list[str]
    name: str
    sha256: str
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, fraction: float = 0.2, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
        """(training part, held-back part): of every class about ``fraction`` is held back.

        A class with a single image keeps it for training. The same seed gives the same parts.
        """
        if not 0.0 < fraction < 1.0:
            raise DataError(f"the validation fraction must lie between 0 and 1, got {fraction}.")
        generator = torch.Generator().manual_seed(seed)
        train: list[int] = []
        held: list[int] = []
        for label in range(len(self.label_names)):
            members = (self.labels == label).nonzero().flatten()
            members = members[torch.randperm(len(members), generator=generator, device="cpu")]
            count = min(len(members) - 1, max(1, round(len(members) * fraction)))
            held += members[:count].tolist() if count > 0 else []
            train += members[max(count, 0) :].tolist()
        if not held:
            raise DataError(f"{self.name} has one image a class: none can be held back.")
        return ImageDataset(self, sorted(train)), ImageDataset(self, sorted(held))


class ImageDataset(Dataset[dict[str, Any]]):
    """Some of the images of an :class:`ImageData`, untouched: decoding only, no augmentation.

    Item: ``pixel_values`` uint8 [C, H, W], ``labels`` int, ``sample_ids`` int: the image's number
    in the whole data, the same in every epoch, order and split; augmentation is keyed by it.
    """

    def __init__(self, data: ImageData, indices: Sequence[int] | None = None) -> None:
        self.data = data
        self.indices = list(range(len(data))) if indices is None else list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.indices[index]
        return {
            "pixel_values": self.data.images[sample],
            "labels": int(self.data.labels[sample]),
            "sample_ids": sample,
        }

    @property
    def labels(self) -> Tensor:
        """int64 [len(self)], labels in the order of the items."""
        return self.data.labels[self.indices]


def _int64(numbers: Iterable[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64, device="cpu")


def collate_images(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items: ``labels`` and ``sample_ids`` int64 [N], ``pixel_values`` uint8.

    ``pixel_values`` is [N, C, H, W] where all images have one size, else the list of [C, H, W].
    Sample ids are left out where the items have none.
    """
    # Labels first: transformers takes the batch size from the first entry, and the images may be a
    # list, whose first tensor's first dimension is channels.
    collated: dict[str, Any] = {"labels": _int64(int(item["labels"]) for item in batch)}
    if batch and "sample_ids" in batch[0]:
        collated["sample_ids"] = _int64(int(item["sample_ids"]) for item in batch)
    pixels = [item["pixel_values"] for item in batch]
    images = [p if isinstance(p, Tensor) else torch.as_tensor(p, device="cpu") for p in pixels]
    same = len({image.shape for image in images}) == 1
    collated["pixel_values"] = torch.stack(images) if same else images
    return collated


def load_digits() -> ImageData:
    """scikit-learn's 1,797 handwritten digits: uint8 [1797, 1, 8, 8], grey levels spread to 0..255.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed; "
            "run `pip install scikit-learn` or give a folder of images."
        ) from error
    digits = sklearn_digits()
    # The source has 17 grey levels, 0..16.
    pixels = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    return ImageData(
        images=torch.from_numpy(pixels)[:, None],
        labels=torch.from_numpy(digits.target.astype(np.int64)),
        label_names=[str(name) for name in digits.target_names],
        name="digits",
        sha256=digest,
    )


def load_image_folder(
    path: str | Path, *, keep_bytes: int = 1 << 30, threads: int = 4
) -> ImageData:
    """Images in class folders: ``path/<class>/**/<image>``, classes in the order of their names.

    Every file is decoded once here, so that a damaged one is found before training and not in the
    middle of it. Images become RGB, uint8 [3, H, W], turned upright where the file says how.

    Args:
        path: the folder that holds the class folders.
        keep_bytes: pixels to keep in memory; images beyond that are decoded again when asked for.
        threads: threads to decode with.

    Raises:
        DataError: no such folder, fewer than two classes, or no readable image. Files that cannot
            be read are left out, named and counted in one warning and listed in ``skipped``.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give a folder that holds one folder a class.")
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    files = [(file, folder.name) for folder in folders for file in _image_files(folder)]
    if not files:
        raise DataError(
            f"{root} holds no images in class folders; expected {root}/<class>/<image> with files "
            f"ending in {', '.join(IMAGE_SUFFIXES)}."
        )
    for folder in folders:
        if re.search("[\ud800-\udfff]", folder.name):
            raise DataError(
                f"the class folder {str(folder)!r} has a name that is not UTF-8, which no label "
                "file can hold; rename it."
            )
    digest = hashlib.sha256()
    kept: list[Path] = []
    classes: list[str] = []
    pixels: list[Tensor | None] = []
    skipped: list[tuple[str, str]] = []
    with ThreadPoolExecutor(threads) as pool:
        for (file, label), (image, raw_digest, reason) in zip(
            files, pool.map(_read, (file for file, _ in files)), strict=True
        ):
            if image is None:
                skipped.append((str(file), reason))
                continue
            # Names that are not UTF-8 come as the bytes that they are.
            digest.update(os.fsencode(f"{file.relative_to(root).as_posix()}\0{raw_digest}\n"))
            keep_bytes -= image.numel()
            kept.append(file)
            classes.append(label)
            pixels.append(image if keep_bytes >= 0 else None)
    if skipped:
        named = "; ".join(f"{file} ({reason})" for file, reason in skipped[:5])
        more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        warnings.warn(
            f"{len(skipped)} of {len(files)} images cannot be read and are left out: {named}{more}",
            stacklevel=2,
        )
    if not kept:
        raise DataError(f"none of the {len(files)} images in {root} can be read.")
    names = sorted(set(classes))
    if len(names) < 2:
        raise DataError(
            f"{root} has readable images of one class only ({names[0]}); classification needs two "
            "or more class folders."
        )
    return ImageData(
        images=_Folder(kept, pixels),
        labels=_int64(names.index(label) for label in classes),
        label_names=names,
        name=root.resolve().name,
        sha256=digest.hexdigest(),
        skipped=skipped,
    )


class _Folder(Sequence[Tensor]):
    """Images of a folder, decoded when asked for unless kept in memory."""

    def __init__(self, files: list[Path], pixels: list[Tensor | None]) -> None:
        self.files = files
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        kept = self._pixels[index]
        if kept is not None:
            return kept
        image, _, reason = _read(self.files[index])
        if image is None:
            raise DataError(f"{self.files[index]} could be read before and no longer can: {reason}")
        return image


def _image_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        named = file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        if named and not file.is_dir():
            yield file


def _read(file: Path) -> tuple[Tensor | None, str, str]:
    """(uint8 [3, H, W] or None, sha256 of the file, why it cannot be read)."""
    import io

    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        raw = file.read_bytes()
        if not raw:
            return None, "", "empty file"
        with Image.open(io.BytesIO(raw)) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("I", "F"):
                reason = f"{upright.mode} pixels of 32 bits, whose range is not known"
                return None, "", f"{reason}; convert it to 8 or 16 bits"
            if upright.mode.startswith("I;16"):  # convert("RGB") would cut it off at 255
                grey = np.rint(np.array(upright, dtype=np.float64) / 257).astype(np.uint8)
                upright = Image.fromarray(grey)
            array = np.array(upright.convert("RGB"), dtype=np.uint8)
    except UnidentifiedImageError:
        return None, "", "not an image"  # PIL's own words name a buffer, not the file
    # PIL answers damaged files with these, and a decompression bomb with its own error.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        text = getattr(error, "strerror", None) or str(error).strip()  # without the path again
        return None, "", text.splitlines()[0] if text else "damaged"
    return (
        torch.from_numpy(array).permute(2, 0, 1).contiguous(),
        hashlib.sha256(raw).hexdigest(),
        "",
    )
