"""Training and measuring image classifiers."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, set_seed

from bigkernel.data import (
    DataError,
    ImageData,
    ImageDataset,
    collate_images,
    load_digits,
    load_image_folder,
)
from bigkernel.escape import code_span, markdown, printable
from bigkernel.files import MAX_PIXELS
from bigkernel.recipes import augmentation, models, presets, report, run_folder
from bigkernel.recipes.errors import Failure, UsageError, option, say
from bigkernel.recipes.metrics import ImageMetrics
from bigkernel.recipes.settings import ImageSettings
from bigkernel.recipes.training import Task, check_same_data
from bigkernel.transforms import Compose

COMMAND = "train images"
SAMPLE = "sample.png"
CONFUSION = "confusion_matrix.png"
ROC = "roc_curves.png"
LABELS = "labels.json"
PREPROCESSOR = "preprocessor_config.json"


@dataclass
class ImageRun:
    """A trained image classifier and what its run folder holds.

    Attributes:
        folder: the run folder; ``from_pretrained`` of transformers loads it too.
        model: in evaluation mode; ``model.config.id2label`` names the classes.
        transform: from uint8 images to the model's ``pixel_values``.
        settings: what it was trained with.
        recorded: facts about the data and the versions, as in ``config.yaml``.
        figures: accuracy, F1, ROC-AUC and the others on the part held back, from the training;
            None if the run was loaded (:meth:`evaluate` measures).
    """

    folder: Path
    model: PreTrainedModel
    transform: Compose
    settings: ImageSettings
    recorded: dict[str, Any]
    figures: dict[str, float] | None = None

    @torch.inference_mode()
    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities [N, classes] of uint8 images [N, C, H, W], on the model's device."""
        pixels = self.transform(images.to(self.model.device))
        logits: torch.Tensor = self.model(pixel_values=pixels).logits
        return logits.softmax(-1)

    def evaluate(self, data: str | os.PathLike[str] | None = None) -> dict[str, float]:
        """Figures on the part held back of the run's own images, or on those of ``data``.

        Of data that brings its own split, on the part that it holds back. The figures are also
        written to ``evaluation.json`` in the folder, and the pictures beside it.

        Raises:
            Failure: the run's images are no longer those that it was trained on.
            DataError: the data cannot be used, or has other classes.
        """
        with models.quiet_transformers():
            return evaluate(self, None if data is None else os.fspath(data))


# Pixels in 0..1 become -1..1, as ViT's own image processor does.
MEAN = STD = 0.5


def read(source: str | None, max_pixels: int = MAX_PIXELS) -> ImageData:
    """The digits, or a folder of class folders; with lines on what is read and how."""
    what = "scikit-learn's digits" if source is None else f"the images in {printable(source)}"
    say(f"reading {what}")
    data = load_digits() if source is None else load_image_folder(source, max_pixels=max_pixels)
    for note in data.notes:
        say(printable(note))
    if int(data.labels.unique().numel()) < 2:
        raise DataError(f"{data.name} has images of one class only; a classifier needs two.")
    return data


def prepare(
    settings: ImageSettings, run: Path, recorded: dict[str, Any], trust_remote_code: bool = False
) -> Task:
    """Read the data and build the model; every complaint about the input comes from here."""
    set_seed(settings.seed)
    data = read(settings.data, settings.max_pixels)
    check_same_data(recorded.get("sha256"), data.sha256, run, "images")
    train_set, held_back = data.split(settings.validation, settings.seed)
    channels = int(data.images[0].shape[0])
    if settings.init_from is not None:
        model = models.load(
            presets.IMAGES,
            settings.init_from,
            trust_remote_code=trust_remote_code,
            num_labels=len(data.label_names),
            id2label=dict(enumerate(data.label_names)),
            label2id={name: index for index, name in enumerate(data.label_names)},
            ignore_mismatched_sizes=True,  # the last layer, where the classes are others
        )
        size = _own_size(model, settings)
    else:
        shape = settings.model or presets.IMAGE_RECIPES["demo"]["model"]
        size = models.image_size(shape, settings.image_size, data.images)
        model = models.new_image_model(shape, data.label_names, channels, size)
    wanted = int(getattr(model.config, "num_channels", channels))
    fit = Channels(channels, wanted)
    recipe = augmentation.read_recipe(settings.augment if settings.augment is not None else "none")
    mean, std = [MEAN] * wanted, [STD] * wanted
    augment, plain = augmentation.pipelines(recipe, size, mean, std)
    # Now, not at the first step: a recipe may ask for more pixels than an image has.
    grid = sample_images(augment, train_set, fit, settings.seed)
    say(
        f"images {printable(data.name)}: {len(data):,} of {len(data.label_names)} classes, "
        f"sha256 {data.sha256[:12]}; {wanted}x{size}x{size} into the model"
        + (f"; {len(data.skipped)} unreadable ones left out" if data.skipped else "")
    )

    def finish(model: PreTrainedModel, folder: Path) -> tuple[dict[str, float], str]:
        metrics = measure(model, held_back, plain, fit, settings.batch_size)
        save_pictures(metrics, data.label_names, folder)
        report.save_image_grid(grid * STD + MEAN, folder / SAMPLE)
        say(f"sample: {printable(run / SAMPLE)} shows {len(grid)} augmented training images")
        pictures = f"![augmented images]({SAMPLE})\n\n![confusion]({CONFUSION})\n\n![ROC]({ROC})"
        return metrics.compute(), pictures

    def save_inputs(folder: Path) -> None:
        names = json.dumps(data.label_names, ensure_ascii=False, indent=2)
        (folder / LABELS).write_text(names + "\n", encoding="utf-8")
        (folder / PREPROCESSOR).write_text(_preprocessor(size, mean, std), encoding="utf-8")

    return Task(
        command=COMMAND,
        settings=settings,
        run=run,
        model=model,
        train=train_set,
        held_back=held_back,
        collate=fit.collate,
        unit="images",
        look_at=256,
        data={
            "images": data.name,
            "sha256": data.sha256,
            "count": len(data),
            "classes": len(data.label_names),
            "skipped": len(data.skipped),
            "held_back": len(held_back),
        },
        save_inputs=save_inputs,
        finish=finish,
        card=lambda run: _card(run, data),
        opened=lambda model, record, figures: ImageRun(
            run, model, plain, settings, record, figures
        ),
        trainer_options={
            "augmentation": augment,
            "eval_augmentation": plain,
            "compute_metrics": accuracy,
        },
    )


def accuracy(predictions: EvalPrediction) -> dict[str, float]:
    """The share of images whose class was named, for the line that is shown while training."""
    logits, labels = predictions.predictions, predictions.label_ids
    scores = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((scores.argmax(-1) == labels).mean())}


class Channels:
    """Collates images and gives them the channels that the model takes."""

    def __init__(self, have: int, want: int) -> None:
        if have != want and not (have == 1 and want == 3):
            raise UsageError(
                f"the images have {have} channels and the model takes {want}. "
                f"Use a model with num_channels: {have}."
            )
        self.grey_to_colour = have != want

    def collate(self, batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """``collate_images``, grey images repeated into three channels where need be."""
        inputs = collate_images(batch)
        if self.grey_to_colour:
            images = inputs["pixel_values"]
            one = torch.is_tensor(images)
            inputs["pixel_values"] = (
                images.expand(-1, 3, -1, -1).contiguous()
                if one
                else [image.expand(3, -1, -1).contiguous() for image in images]
            )
        return inputs


def _own_size(model: PreTrainedModel, settings: ImageSettings) -> int:
    own = int(getattr(model.config, "image_size", None) or settings.image_size or 224)
    if settings.image_size not in (None, own):
        raise UsageError(
            f"{option('image_size', settings.image_size)}: {settings.init_from} takes images of "
            f"{own}."
        )
    return own


def _batch(dataset: ImageDataset, fit: Channels, indices: Sequence[int]) -> dict[str, Any]:
    return fit.collate([dataset[i] for i in indices])


def sample_images(
    augment: Compose, dataset: ImageDataset, fit: Channels, seed: int, count: int = 32
) -> torch.Tensor:
    """The first images of the training part as one epoch would see them, [N, C, H, W]."""
    batch = _batch(dataset, fit, range(min(count, len(dataset))))
    generator = torch.Generator().manual_seed(seed)
    images = augment(batch["pixel_values"], generator=generator, ids=batch["sample_ids"])
    if not torch.is_tensor(images):
        raise UsageError("the augmentation recipe leaves images of different sizes.")
    return images


@torch.inference_mode()
def measure(
    model: PreTrainedModel, dataset: Any, plain: Compose, fit: Channels, batch_size: int
) -> ImageMetrics:
    """``ImageMetrics`` of a model over uint8 images, all of which this process measures."""
    device = model.device
    metrics = ImageMetrics(len(model.config.id2label or {}), sync_on_compute=False)
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=fit.collate):
        images = batch["pixel_values"]
        moved = (
            images.to(device) if torch.is_tensor(images) else [image.to(device) for image in images]
        )
        pixels = plain(moved)
        metrics.update(model(pixel_values=pixels).logits, batch["labels"])
    return metrics


def save_pictures(metrics: ImageMetrics, names: Sequence[str], folder: Path) -> None:
    """Confusion matrix and ROC curves."""
    report.save_confusion_matrix(metrics.confusion_matrix(), names, folder / CONFUSION)
    report.save_roc_curves(metrics.roc_curves(), names, folder / ROC)


def load_run(
    run: Path, settings: ImageSettings, recorded: dict[str, Any], trust_remote_code: bool = False
) -> ImageRun:
    """What an image run left."""
    if not (run / LABELS).is_file():
        raise Failure(
            f"{run} holds no finished model. Go on with it: "
            f"bigkernel train images --resume auto --out {run}"
        )
    model = models.load(presets.IMAGES, str(run), trust_remote_code=trust_remote_code).eval()
    channels = len(json.loads((run / PREPROCESSOR).read_text())["image_mean"])
    size = int(json.loads((run / PREPROCESSOR).read_text())["size"]["height"])
    _, plain = augmentation.pipelines([], size, [MEAN] * channels, [STD] * channels)
    return ImageRun(run, model, plain, settings, recorded)


def evaluate(run: ImageRun, data: str | None) -> dict[str, float]:
    """As :meth:`ImageRun.evaluate`."""
    settings, folder = run.settings, run.folder
    names = json.loads((folder / LABELS).read_text(encoding="utf-8"))
    images = read(data if data is not None else settings.data, settings.max_pixels)
    if data is None:
        check_same_data(run.recorded.get("sha256"), images.sha256, folder, "images")
        _, dataset = images.split(settings.validation, settings.seed)
    else:
        if images.label_names != names:
            raise DataError(
                f"{data} has the classes {', '.join(images.label_names)}, but the model knows "
                f"{', '.join(names)}."
            )
        whole = images.held_back is None
        dataset = ImageDataset(images) if whole else images.split()[1]
    channels = int(images.images[0].shape[0])
    wanted = int(getattr(run.model.config, "num_channels", channels))
    fit = Channels(channels, wanted)
    metrics = measure(run.model, dataset, run.transform, fit, settings.batch_size)
    figures = metrics.compute()
    with run_folder.files_moved_into(folder) as aside:
        save_pictures(metrics, names, aside)
    run_folder.write_evaluation(folder, figures)
    return figures


def _preprocessor(size: int, mean: Sequence[float], std: Sequence[float]) -> str:
    content = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    return json.dumps(content, indent=2) + "\n"


def _card(run: Path, data: ImageData) -> dict[str, str]:
    return {
        "title": markdown(run.resolve().name),
        "task": "image-classification",
        "intended": (
            f"An image classifier trained on {code_span(data.name)} ({len(data):,} images of "
            f"{len(data.label_names)} classes). It names one of these classes whatever it is shown."
        ),
        "usage": (
            "from transformers import AutoModelForImageClassification\n\n"
            'model = AutoModelForImageClassification.from_pretrained(".").eval()\n'
            "size, channels = model.config.image_size, model.config.num_channels\n"
            f"# images: uint8 [N, channels, size, size]\n"
            f"logits = model(pixel_values=(images / 255 - {MEAN}) / {STD}).logits\n"
            "print([model.config.id2label[i] for i in logits.argmax(-1).tolist()])"
        ),
    }
