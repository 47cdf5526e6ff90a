"""What a trained model is measured by on data that it has not seen."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_roc,
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)


class TextMetrics(Metric):
    """Loss (nats per token), perplexity, nats per byte and bits per byte of a language model.

    ``update(logits [B, S, V], labels [B, S])``: labels are shifted here, as transformers' causal
    models do, and -100 does not count. ``num_bytes`` is the size in UTF-8 of all the text that the
    labels cover; the figures per byte do not depend on the tokenizer.

    Among several processes each is given its own part of the text with that part's ``num_bytes``,
    and ``compute`` gives all of them the figures of the whole. Where one process measures alone, or
    each measures the whole, say ``sync_on_compute=False``.
    """

    # Bytes are no sum over updates, so forward() may not add the state of one batch to the others.
    full_state_update = True
    higher_is_better = False
    loss: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, num_bytes: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_bytes = num_bytes
        for name, start in (("loss", 0.0), ("tokens", 0), ("bytes", num_bytes)):
            dtype = torch.float64 if name == "loss" else torch.int64
            state = torch.full((), start, dtype=dtype, device="cpu")
            self.add_state(name, state, dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        targets = labels[..., 1:].flatten()
        scores = logits[..., :-1, :].flatten(0, -2).float()
        losses = torch.nn.functional.cross_entropy(
            scores, targets, ignore_index=-100, reduction="none"
        )
        self.loss += losses.double().sum()
        self.tokens += (targets != -100).sum()

    def compute(self) -> dict[str, float]:
        tokens, num_bytes = int(self.tokens), int(self.bytes)
        if tokens == 0 or num_bytes == 0:
            raise ValueError("there is no text to measure: it is shorter than two tokens.")
        return text_metrics(float(self.loss) / tokens, tokens, num_bytes)


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


class ImageMetrics(Metric):
    """Accuracy, macro precision, recall, F1 and ROC-AUC, a confusion matrix and ROC curves.

    ``update(logits [N, K], labels [N])``. ROC-AUC is the mean over the classes that have a curve:
    those with images of their own and of others. Where some have none, ``classes_with_roc_auc``
    says over how many the mean was taken.

    Among several processes each is given its own part of the images, and every figure, matrix and
    curve is that of the whole, in all of them. Where one process measures alone, or each measures
    the whole, say ``sync_on_compute=False``.
    """

    full_state_update = False
    loss: Tensor
    probabilities: list[Tensor]
    labels: list[Tensor]

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes = num_classes
        self.add_state(
            "loss", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum"
        )
        self.add_state("probabilities", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [N, K] and labels [N]."""
        logits, labels = logits.detach().float().to(self.device), labels.to(self.device)
        self.probabilities.append(logits.softmax(-1))
        self.labels.append(labels)
        self.loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").double()

    def compute(self) -> dict[str, float]:
        """All single figures; ValueError if no image was seen."""
        probabilities, labels = self._seen()
        if len(labels) == 0:
            raise ValueError("there is no image to measure.")
        scores: dict[str, tuple[Any, str]] = {
            "accuracy": (multiclass_accuracy, "micro"),
            "precision": (multiclass_precision, "macro"),
            "recall": (multiclass_recall, "macro"),
            "f1": (multiclass_f1_score, "macro"),
        }
        figures = {
            name: float(score(probabilities, labels, self.num_classes, average=average))
            for name, (score, average) in scores.items()
        }
        areas = [curve.area for curve in self._curves(probabilities, labels) if curve is not None]
        if areas:
            figures["roc_auc"] = sum(areas) / len(areas)
        if len(areas) < self.num_classes:
            figures["classes_with_roc_auc"] = len(areas)
        return {"loss": float(self.loss) / len(labels), **figures, "images": len(labels)}

    def confusion_matrix(self) -> Tensor:
        """[K, K] counts, a row for each true class and a column for each predicted one."""
        with self.sync_context(should_sync=self.sync_on_compute):
            matrix: Tensor = multiclass_confusion_matrix(*self._seen(), self.num_classes)
        return matrix.cpu()

    def roc_curves(self) -> list[RocCurve | None]:
        """One curve a class; None for a class without images of its own or of others."""
        with self.sync_context(should_sync=self.sync_on_compute):
            return self._curves(*self._seen())

    def _seen(self) -> tuple[Tensor, Tensor]:
        # Lists here, and one tensor each where they come from several processes; a process that saw
        # nothing sends one without columns.
        def whole(state: Any, empty: Tensor) -> Tensor:
            parts = [state] if isinstance(state, Tensor) else state
            return torch.cat([empty, *parts])

        rows = torch.zeros(0, self.num_classes, device=self.device)
        labels = torch.zeros(0, dtype=torch.int64, device=self.device)
        return whole(self.probabilities, rows), whole(self.labels, labels)

    def _curves(self, probabilities: Tensor, labels: Tensor) -> list[RocCurve | None]:
        curves: list[RocCurve | None] = []
        for index in range(self.num_classes):
            target = (labels == index).long()
            if len(target) == 0 or target.min() == target.max():
                curves.append(None)
                continue
            scores = probabilities[:, index]
            fpr, tpr, _ = binary_roc(scores, target)
            curves.append(RocCurve(fpr.cpu(), tpr.cpu(), float(binary_auroc(scores, target))))
        return curves
