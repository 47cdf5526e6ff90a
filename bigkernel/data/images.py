"""Labelled images as uint8: scikit-learn's digits, or a folder with one folder a class.

A folder may hold its own split, ``train/<class>`` and ``val/<class>``; see :func:`find_parts`.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bigkernel.data.errors import DataError
from bigkernel.extras import needs
from bigkernel.files import MAX_PIXELS, is_regular

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# Only these readers of PIL's: others start programs (EPS) or have known little use.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
# A pixel of four channels of 16 bits, not compressed.
_MOST_BYTES_A_PIXEL = 8
_MOST_OTHER_BYTES = 1 << 20  # a camera's notes, a small picture of the picture

# How the folders of a split are called, and what each is for.
_ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


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
        held_back: bool [N], the images that the data itself sets apart for validation; None where
            it does not, and :meth:`split` draws them.
        notes: sentences about how the data was read that a person should see.
    """

    images: Tensor | Sequence[Tensor]
    labels: Tensor
    label_names: list[str]
    name: str
    sha256: str
    skipped: list[tuple[str, str]] = field(default_factory=list)
    held_back: Tensor | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, fraction: float = 0.2, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
        """(training part, held-back part): of every class about ``fraction`` is held back.

        A class with a single image keeps it for training. The same seed gives the same parts.
        Where the data sets its own part apart (``held_back``), that is the one, whatever the
        arguments.
        """
        if not 0.0 < fraction < 1.0:
            raise DataError(f"the validation fraction must lie between 0 and 1, got {fraction}.")
        if self.held_back is not None:
            parts = (~self.held_back, self.held_back)
            train_set, held_set = (
                ImageDataset(self, part.nonzero().flatten().tolist()) for part in parts
            )
            return train_set, held_set
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
            "the digits come with scikit-learn, which is not installed: "
            "pip install 'bigkernel[images]', or give a folder of images."
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


@dataclass(frozen=True)
class Parts:
    """Where the classes of an image folder are.

    Attributes:
        train: the folder that holds the class folders to train on.
        held_back: the one that holds those to measure on; None where the root has no split.
        notes: sentences about what was decided.
    """

    train: Path
    held_back: Path | None = None
    notes: tuple[str, ...] = ()


def find_parts(root: Path) -> Parts:
    """Whether the folders in ``root`` are classes, or a split whose folders hold the classes.

    A split is a folder train (or training) with class folders in it, beside val (valid, validation)
    or test (testing) with class folders too; upper case counts as lower. val is then held back, or
    test where there is no val; a test beside a val is left for ``bigkernel evaluate``. A folder
    train alone is a split without a held-back part, unless there are other classes beside it.

    Raises:
        DataError: the folders can be read in several ways, or the split lacks its train folder.
    """
    folders = [folder for folder in _folders(root) if _holds_images(folder)]
    for folder in folders:
        inner = {_ROLES.get(f.name.lower()) for f in _folders(folder) if _holds_images(f)}
        if "train" in inner and inner & {"val", "test"}:
            whole = "; give that folder" if len(folders) == 1 else ""
            raise DataError(
                f"{folder} holds a split of its own (train beside val or test){whole}; "
                f"expected {root}/<class>/<image> or {root}/train/<class>/<image>."
            )
    by_role: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    others: list[Path] = []
    flat: list[Path] = []  # named like a part, with images and no classes in it
    for folder in folders:
        role = _ROLES.get(folder.name.lower())
        if role is None:
            others.append(folder)
        elif any(_holds_images(inner) for inner in _folders(folder)):
            by_role[role].append(folder)
        else:
            flat.append(folder)
    named = [folder for role in by_role.values() for folder in role]

    def names(some: Sequence[Path]) -> str:
        return " and ".join(folder.name for folder in some)

    if not named and not flat:
        return Parts(root)
    fix = f"expected {root}/train/<class>/<image>, and val/<class>/<image> beside it"
    if not named:
        if not others:
            raise DataError(
                f"{root} holds {names(flat)} with images and no class folders in them; {fix}. "
                "Where these are the classes, rename one of them."
            )
        note = f"{names(flat)}: taken for a class, having images and no class folders in it."
        return Parts(root, notes=(note,))
    train, held = by_role["train"], by_role["val"] or by_role["test"]
    if others and not (train and held):
        # A class that is really called "train", with folders in it.
        note = (
            f"{names([*named, *flat])}: taken for a class like {others[0].name} beside it, and not "
            "for a part of a split."
        )
        return Parts(root, notes=(note,))
    if others:
        raise DataError(
            f"{root} holds a split ({names(named)}) and other folders with images beside it "
            f"({', '.join(folder.name for folder in others)}); {fix}, and nothing else."
        )
    twice = next((role for role in by_role.values() if len(role) > 1), None)
    if twice is not None:
        raise DataError(f"{root} holds {names(twice)}, which are for the same part; keep one.")
    if not train:
        raise DataError(
            f"{root} holds {names(named)} and no train folder; {fix}. To measure a model on it: "
            f"bigkernel evaluate RUN --data {held[0]}"
        )
    rest = [folder for folder in by_role["test"] if folder not in held]
    later = f" {names(rest)} is left for `evaluate --data`." if rest else ""
    if flat:
        later += f" {names(flat)} has images and no class folders: not used."
    if not held:
        note = (
            f"{train[0].name} is the part to train on, not a class; no val or test folder with "
            f"classes is beside it, so the held-back part is drawn from it.{later}"
        )
        return Parts(train[0], notes=(note,))
    note = f"the split of the folder: {train[0].name} to train, {held[0].name} held back.{later}"
    return Parts(train[0], held[0], (note,))


def _folders(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def _holds_images(folder: Path) -> bool:
    return any(map(_is_image_file, folder.rglob("*")))


def load_image_folder(
    path: str | Path,
    *,
    keep_bytes: int = 1 << 30,
    threads: int = 4,
    max_pixels: int = MAX_PIXELS,
) -> ImageData:
    """Images in class folders: ``path/<class>/**/<image>``, classes in the order of their names.

    ``path/train/<class>`` and ``path/val/<class>`` are taken as the split that they are
    (:func:`find_parts`); ``notes`` says so.

    Every file is decoded once here, so that a damaged one is found before training and not in the
    middle of it. Images become RGB, uint8 [3, H, W], turned upright where the file says how.

    Args:
        path: the folder that holds the class folders.
        keep_bytes: pixels to keep in memory; images beyond that are decoded again when asked for.
        threads: threads to decode with.
        max_pixels: larger images are left out undecoded, and so are files of more than 8 bytes for
            each of so many pixels and 1 MiB: a small file can hold an image that fills the memory.

    Raises:
        DataError: no such folder, fewer than two classes, no readable image, or a split that can
            be read in several ways. Files that cannot be read are left out, named and counted in
            one warning and listed in ``skipped``; so are pipes and devices.
    """
    if max_pixels < 1:
        raise DataError(f"max_pixels must be 1 or more, got {max_pixels}.")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give a folder that holds one folder a class.")
    parts = find_parts(root)
    sides = [side for side in (parts.train, parts.held_back) if side is not None]
    folders = [(folder, side == parts.held_back) for side in sides for folder in _folders(side)]
    files = [(file, folder.name, held) for folder, held in folders for file in _image_files(folder)]
    if not files:
        raise DataError(
            f"{root} holds no images in class folders; expected {root}/<class>/<image> with files "
            f"ending in {', '.join(IMAGE_SUFFIXES)}."
        )
    for folder, _ in folders:
        if re.search("[\ud800-\udfff]", folder.name):
            raise DataError(
                f"the class folder {str(folder)!r} has a name that is not UTF-8, which no label "
                "file can hold; rename it."
            )
    digest = hashlib.sha256()
    kept: list[Path] = []
    classes: list[str] = []
    held_back: list[bool] = []
    pixels: list[Tensor | None] = []
    skipped: list[tuple[str, str]] = []
    with ThreadPoolExecutor(threads) as pool:
        read = partial(_read, max_pixels=max_pixels)
        for (file, label, held), (image, raw_digest, reason) in zip(
            files, pool.map(read, (file for file, _, _ in files)), strict=True
        ):
            if image is None:
                skipped.append((str(file), reason))
                continue
            # Names that are not UTF-8 come as the bytes that they are.
            digest.update(os.fsencode(f"{file.relative_to(root).as_posix()}\0{raw_digest}\n"))
            keep_bytes -= image.numel()
            kept.append(file)
            classes.append(label)
            held_back.append(held)
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
    names = sorted({label for label, held in zip(classes, held_back, strict=True) if not held})
    notes = list(parts.notes)
    if parts.held_back is not None:
        measured = {label for label, held in zip(classes, held_back, strict=True) if held}
        if not measured or not names:
            lacking = parts.train if measured else parts.held_back
            raise DataError(f"none of the images in {lacking} can be read.")
        unknown = sorted(measured - set(names))
        if unknown:
            raise DataError(
                f"{parts.held_back} holds the class {unknown[0]}, of which {parts.train} has no "
                "readable image to learn from; the classes to measure on must be among those to "
                "train on."
            )
        unseen = [name for name in names if name not in measured]
        if unseen:
            shown = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
            notes.append(
                f"{parts.held_back.name} has no images of {len(unseen)} of the {len(names)} "
                f"classes ({shown}): no figure will be about them."
            )
    if len(names) < 2:
        raise DataError(
            f"{parts.train} has readable images of one class only ({names[0]}); classification "
            "needs two or more class folders."
        )
    return ImageData(
        images=_Folder(kept, pixels, max_pixels),
        labels=_int64(names.index(label) for label in classes),
        label_names=names,
        name=root.resolve().name,
        sha256=digest.hexdigest(),
        skipped=skipped,
        held_back=None if parts.held_back is None else torch.tensor(held_back, device="cpu"),
        notes=tuple(notes),
    )


class _Folder(Sequence[Tensor]):
    """Images of a folder, decoded when asked for unless kept in memory."""

    def __init__(self, files: list[Path], pixels: list[Tensor | None], max_pixels: int) -> None:
        self.files = files
        self.max_pixels = max_pixels
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        kept = self._pixels[index]
        if kept is not None:
            return kept
        image, _, reason = _read(self.files[index], self.max_pixels)
        if image is None:
            raise DataError(f"{self.files[index]} could be read before and no longer can: {reason}")
        return image


def _image_files(folder: Path) -> list[Path]:
    return sorted(filter(_is_image_file, folder.rglob("*")))


def _is_image_file(file: Path) -> bool:
    """By its name; a pipe called so is left out later, with a word."""
    named = file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    return named and not file.is_dir()


# PIL's own limit is one number for the whole process: held while a file's header is read.
_PIL_LIMIT = threading.Lock()


def _read(file: Path, max_pixels: int) -> tuple[Tensor | None, str, str]:
    """(uint8 [3, H, W] or None, sha256 of the file, why it cannot be read)."""
    import io

    with needs("images", "reading images"):
        from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if not is_regular(file):
            return None, "", "not a regular file"
        size, most = file.stat().st_size, _MOST_BYTES_A_PIXEL * max_pixels + _MOST_OTHER_BYTES
        if size > most:
            reason = f"{size:,} bytes, more than the {most:,} that {max_pixels:,} pixels may take"
            return None, "", f"{reason} (--max-pixels)"
        raw = file.read_bytes()
        if not raw:
            return None, "", "empty file"
        with _PIL_LIMIT:
            usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                opened = Image.open(io.BytesIO(raw), formats=_FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = usual
        with opened as image:
            width, height = image.size
            if width * height > max_pixels:
                limit = f"more than {max_pixels:,} (--max-pixels)"
                return None, "", f"{width:,} x {height:,} pixels, {limit}"
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
