"""Figures of models: what is not covered by the command's own tests (test_cli.py).

ROC-AUC of all classes, of some, of none -> test_macro_roc_auc_*; among several processes ->
test_every_figure_is_that_of_one_process
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import image_model, text_model
from torchmetrics.functional.classification import multiclass_auroc

from bigkernel.data import ImageData, ImageDataset, PackedDataset, build_tokenizer
from bigkernel.recipes import report
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


CLASSES, DOCUMENTS = 3, [f"document {i}, of its own length " + "\u72d0 " * i for i in range(9)]


def text_figures(rank: int, world: int) -> dict[str, Any]:
    """Of a part of the text in each process."""
    tokenizer = build_tokenizer("bytes")
    rows = PackedDataset(DOCUMENTS[rank::world], tokenizer, 16)
    metrics = TextMetrics(rows.num_bytes)
    for row in rows:
        generator = torch.Generator().manual_seed(int(row["input_ids"].sum()))
        logits = torch.randn(1, len(row["labels"]), len(tokenizer), generator=generator)
        labels = row["labels"][None]
        # The target's own logit says how well it was foreseen, in whatever row it came to stand.
        logits[:, :-1].scatter_(-1, labels[:, 1:, None].clamp(min=0), 5.0)
        metrics.update(logits, labels)
    found = metrics.compute()
    assert metrics.compute() == found
    return {"tokens": found["tokens"], "bytes": found["bytes"], "all": found}


def image_figures(part: slice) -> dict[str, Any]:
    """Of a part of the images in each process, or of all."""
    labels = torch.arange(40) % CLASSES
    metrics = ImageMetrics(CLASSES)
    for rows in torch.arange(40)[part].split(7):
        metrics.update(LOGITS[rows, :CLASSES], labels[rows])
    curves = [(c.false_positive_rate.tolist(), c.area) for c in metrics.roc_curves() if c]
    return {
        **metrics.compute(),
        "matrix": metrics.confusion_matrix().tolist(),
        "curves": curves,
    }


def command_figures() -> dict[str, Any]:
    """What the commands measure, each process the whole, as printed and written to the card."""
    from bigkernel.recipes import augmentation, images, text

    tokenizer = build_tokenizer("bytes")
    rows = text.held_back_rows(DOCUMENTS, tokenizer, 32)
    words = text.measure(text_model(), rows, 2)
    pixels = torch.randint(0, 256, (13, 1, 8, 8), dtype=torch.uint8)
    data = ImageData(pixels, torch.arange(13) % CLASSES, ["a", "b", "c"], "noise", "")
    _, plain = augmentation.pipelines([], 8, [0.5], [0.5])
    fit = images.Channels(1, 1)
    metrics = images.measure(image_model(), ImageDataset(data), plain, fit, 4)
    return {
        "text": report.figures(words),
        "images": report.figures(metrics.compute()),
        "matrix": metrics.confusion_matrix().tolist(),
    }


def trainer_figures(folder: str) -> dict[str, Any]:
    """The Trainer's, over data that divides evenly (transformers fills up with repeated items)."""
    import test_trainer

    from bigkernel.recipes.images import accuracy

    trainer = test_trainer.image_trainer(
        folder, max_steps=1, save_strategy="no", trainer={"compute_metrics": accuracy}
    )
    even = trainer.evaluate(test_trainer.image_data(32))
    odd = trainer.evaluate(test_trainer.image_data(21))
    return {
        "eval_loss": even["eval_loss"],
        "eval_accuracy": even["eval_accuracy"],
        # Counted without the repeats, however the items divide.
        "odd_accuracy": odd["eval_accuracy"],
    }


RANKS = """
import json, sys
import torch.distributed as dist
import test_metrics

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
found = {
    "text": test_metrics.text_figures(rank, world),
    "images": test_metrics.image_figures(slice(rank, None, world)),
    # The second process has seen nothing.
    "lopsided": test_metrics.image_figures(slice(0, 40 if rank == 0 else 0)),
    "command": test_metrics.command_figures(),
    "trainer": test_metrics.trainer_figures(sys.argv[1] + "/trainer"),
}
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(found, file)
dist.barrier()
dist.destroy_process_group()
"""


def test_every_figure_is_that_of_one_process(tmp_path: Path) -> None:
    """Two gloo processes: parts that are summed, and wholes that are not."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
             "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    parts = [text_figures(rank, 2) for rank in (0, 1)]
    for name in ("tokens", "bytes"):
        assert first["text"][name] == sum(part[name] for part in parts)
    nats = sum(part["all"]["loss"] * part["tokens"] for part in parts)
    assert first["text"]["all"]["nats_per_byte"] == pytest.approx(nats / first["text"]["bytes"])
    assert first["text"]["all"]["loss"] == pytest.approx(nats / first["text"]["tokens"])
    one = json.loads(json.dumps(image_figures(slice(None))))
    for found in (first["images"], first["lopsided"]):
        assert found.keys() == one.keys()
        for name, value in one.items():
            close = value if name in ("matrix", "curves") else pytest.approx(value)
            assert found[name] == close, name
    assert first["command"] == json.loads(json.dumps(command_figures()))
    alone = trainer_figures(str(tmp_path / "alone"))
    assert first["trainer"] == pytest.approx(alone, rel=1e-5)


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
