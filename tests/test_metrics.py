"""Figures of models: what is not covered by the command's own tests (test_cli.py).

ROC-AUC of all classes, of some, of none -> test_macro_roc_auc_*; among several processes ->
test_ranks.py, test_every_figure_is_that_of_one_process
"""

import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_auroc

from bigkernel.recipes.metrics import ImageMetrics, TextMetrics, text_metrics

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


def test_forward_leaves_the_bytes_as_they_are() -> None:
    metrics = TextMetrics(10)
    logits, labels = torch.zeros(1, 6, 4), torch.arange(6)[None] % 4
    metrics(logits, labels)
    assert metrics.compute()["bytes"] == 10
    metrics.reset()
    metrics.update(logits, labels)
    assert metrics.compute() == {**metrics.compute(), "bytes": 10, "tokens": 5}


def test_text_figures_are_those_written_out():
    """Token t is measured by the logits before it; -100 and a first token are not measured."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    labels = torch.randint(11, (3, 7), generator=generator)
    labels[0, 2:4] = labels[2, 0] = -100
    losses = [
        -logits[b, t - 1].double().log_softmax(-1)[labels[b, t]]
        for b in range(3)
        for t in range(1, 7)
        if labels[b, t] != -100
    ]
    metrics = TextMetrics(num_bytes=50)
    metrics.update(logits[:1], labels[:1])
    metrics.update(logits[1:], labels[1:])
    figures = metrics.compute()
    nats = float(sum(losses))
    assert figures["tokens"] == len(losses) == 16
    assert figures["loss"] == pytest.approx(nats / 16, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / 16), rel=1e-6)
    assert figures["nats_per_byte"] == pytest.approx(nats / 50, rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(nats / 50 / math.log(2), rel=1e-6)
    assert text_metrics(1e4, 2, 8)["perplexity"] == math.inf
