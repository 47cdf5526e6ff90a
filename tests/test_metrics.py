"""Figures of image classifiers: what is not covered by the command's own tests (test_cli.py).

ROC-AUC of all classes, of some, of none -> test_macro_roc_auc_*
"""

import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_auroc

from bigkernel.metrics import ImageMetrics

LOGITS = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


def figures(labels: torch.Tensor) -> dict[str, float]:
    metrics = ImageMetrics(4)
    metrics.update(LOGITS, labels)
    return metrics.compute()


def test_macro_roc_auc_of_all_classes_is_torchmetrics() -> None:
    labels = torch.arange(40) % 4
    expected = multiclass_auroc(LOGITS.softmax(-1), labels, num_classes=4, average="macro")
    found = figures(labels)
    assert found["roc_auc"] == pytest.approx(float(expected))
    assert "classes_with_roc_auc" not in found


def test_macro_roc_auc_leaves_absent_classes_out_and_says_so() -> None:
    """torchmetrics counts a class without images as 0, which drags the mean down."""
    labels = torch.arange(40) % 3
    each = multiclass_auroc(LOGITS.softmax(-1), labels, num_classes=4, average="none")
    found = figures(labels)
    assert found["roc_auc"] == pytest.approx(float(each[:3].mean()))
    assert found["classes_with_roc_auc"] == 3


def test_macro_roc_auc_of_one_class_alone_does_not_exist() -> None:
    found = figures(torch.zeros(40, dtype=torch.long))
    assert "roc_auc" not in found
    assert found["classes_with_roc_auc"] == 0
    assert math.isfinite(found["loss"])
