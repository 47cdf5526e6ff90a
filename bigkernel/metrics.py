"""What a trained model is measured by on data that it has not seen."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.functional.classification import binary_auroc, binary_roc


class TextMetrics(Metric):
    """Loss (nats per token), perplexity, nats per byte and bits per byte of a language model.

    ``update(logits [B, S, V], labels [B, S])``: labels are shifted here, as transformers' causal
    models do, and -100 does not count. ``num_bytes`` is the size in UTF-8 of all the text that the
    labels cover; the figures per byte do not depend on the tokenizer.
    """

    full_state_update = False
    higher_is_better = False
    loss: Tensor
    tokens: Tensor

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.num_bytes = num_bytes
        self.add_state(
            "loss", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum"
        )
        self.add_state(
            "tokens", torch.zeros((), dtype=torch.int64, device="cpu"), dist_reduce_fx="sum"
        )

    def update(self, logits: Tensor, labels: Tensor) -> None:
        targets = labels[..., 1:].flatten()
        scores = logits[..., :-1, :].flatten(0, -2).float()
        losses = torch.nn.functional.cross_entropy(
            scores, targets, ignore_index=-100, reduction="none"
        )
        self.loss += losses.double().sum()
        self.tokens += (targets != -100).sum()

    def compute(self) -> dict[str, float]:
        tokens = int(self.tokens)
        if tokens == 0 or self.num_bytes == 0:
            raise ValueError("there is no text to measure: it is shorter than two tokens.")
        total = float(self.loss)
        return text_metrics(total / tokens, tokens, self.num_bytes)


def text_metrics(loss: float, tokens: int, num_bytes: int) -> dict[str, float]:
    """The figures of ``TextMetrics`` from a mean loss in nats per token."""
    per_byte = loss * tokens / num_bytes
    return {
        "loss": loss,
        # exp of a loss above 700 does not fit a double; infinity is then the honest answer.
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "nats_per_byte": per_byte,
        "bits_per_byte": per_byte / math.log(2),
        "tokens": tokens,
        "bytes": num_bytes,
    }


@dataclass(frozen=True)
class RocCurve:
    """One class against the rest: rates over falling thresholds, and the area under the curve."""

    false_positive_rate: Tensor
    true_positive_rate: Tensor
    area: float


class ImageMetrics:
    """Accuracy, macro precision, recall, F1 and ROC-AUC, a confusion matrix and ROC curves.

    ROC-AUC is the mean over the classes that have a curve: those with images of their own and of
    others. Where some have none, ``classes_with_roc_auc`` says over how many the mean was taken.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.scores = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "precision": MulticlassPrecision(num_classes, average="macro"),
                "recall": MulticlassRecall(num_classes, average="macro"),
                "f1": MulticlassF1Score(num_classes, average="macro"),
            },
            # Groups are found by comparing values after the first batch; a wrong guess would give
            # one metric's figure for another, and there is little to save here.
            compute_groups=False,
        )
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self._probabilities: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._loss = 0.0
        self._count = 0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [N, K] and labels [N]."""
        logits, labels = logits.detach().float().cpu(), labels.cpu()
        probabilities = logits.softmax(-1)
        self.scores.update(probabilities, labels)
        self.confusion.update(probabilities, labels)
        self._probabilities.append(probabilities)
        self._labels.append(labels)
        self._loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        self._count += len(labels)

    def compute(self) -> dict[str, float]:
        """All single figures; ValueError if no image was seen."""
        if self._count == 0:
            raise ValueError("there is no image to measure.")
        figures = {name: float(value) for name, value in self.scores.compute().items()}
        areas = [curve.area for curve in self.roc_curves() if curve is not None]
        if areas:
            figures["roc_auc"] = sum(areas) / len(areas)
        if len(areas) < self.num_classes:
            figures["classes_with_roc_auc"] = len(areas)
        return {"loss": self._loss / self._count, **figures, "images": self._count}

    def confusion_matrix(self) -> Tensor:
        """[K, K] counts, a row for each true class and a column for each predicted one."""
        matrix: Tensor = self.confusion.compute()
        return matrix

    def roc_curves(self) -> list[RocCurve | None]:
        """One curve a class; None for a class without images of its own or of others."""
        probabilities, labels = torch.cat(self._probabilities), torch.cat(self._labels)
        curves: list[RocCurve | None] = []
        for index in range(self.num_classes):
            target = (labels == index).long()
            if target.min() == target.max():
                curves.append(None)
                continue
            scores = probabilities[:, index]
            fpr, tpr, _ = binary_roc(scores, target)
            curves.append(RocCurve(fpr, tpr, float(binary_auroc(scores, target))))
        return curves
