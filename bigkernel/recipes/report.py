"""Pictures and the model card that a run leaves in its folder."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from bigkernel.escape import markdown, printable
from bigkernel.recipes.metrics import RocCurve

# Beyond this many classes the cells of a confusion matrix are too small for a number or a name.
CELLS_WITH_NUMBERS = 20


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Not pyplot: that would pick a display and keep every figure alive.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _printable(name: str) -> str:
    """A class name that matplotlib can draw: its font has no Chinese, and $ starts a formula."""
    shown = printable(name).encode("ascii", "backslashreplace").decode("ascii")
    return (shown if len(shown) <= 40 else shown[:37] + "...").replace("$", r"\$")


def save_loss_curve(
    records: Sequence[Mapping[str, Any]],
    path: Path,
    looked_at: str = "",
    final: tuple[int, float] | None = None,
) -> None:
    """Training and held-back loss against the step, from the records of metrics.jsonl.

    ``looked_at`` says what of the held-back part the curve is about; ``final`` is (step, loss) of
    the trained model on all of it.
    """
    figure, axes = _figure(7, 4)
    for key, label, style in (
        ("loss", "training", {"linewidth": 1.0}),
        ("eval_loss", looked_at and f"held back, {looked_at}", {"marker": "o", "markersize": 4}),
    ):
        points = [(r["step"], r[key]) for r in records if math.isfinite(r.get(key, math.nan))]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=label or "held back", **style)
    if final is not None and math.isfinite(final[1]):
        label = f"held back, all: {final[1]:.4f}"
        axes.plot([final[0]], [final[1]], label=label, marker="D", linestyle="", color="black")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


# A held-back loss this much above that of training, in nats: less than a third of the probability.
_GAP = 1.2


def memorized(records: Sequence[Mapping[str, Any]], held_back: float) -> str:
    """A sentence for a model that knows its training part far better than the rest, or nothing."""
    losses = [r["loss"] for r in records if math.isfinite(r.get("loss", math.nan))]
    last = losses[-max(1, len(losses) // 20) :]
    if not last or held_back - sum(last) / len(last) < _GAP:
        return ""
    return (
        f"The loss on the training part ended at {sum(last) / len(last):.2f} nats, on the part "
        f"held back it is {held_back:.2f}: the model has memorized its training part, and figures "
        "on the rest, such as the perplexity, say little except that there was too little to learn "
        "from."
    )


def without_folders(value: object) -> str:
    """A setting as the card shows it: a path on this machine by its last part alone."""
    if isinstance(value, dict):
        return str({k: without_folders(v) if isinstance(v, str) else v for k, v in value.items()})
    text = str(value)
    return Path(text).name if isinstance(value, str) and Path(text).is_absolute() else text


def save_confusion_matrix(matrix: Tensor, names: Sequence[str], path: Path) -> None:
    """``matrix`` [K, K] (rows true, columns predicted), coloured by the share of each row."""
    count = len(names)
    side = min(max(4.0, 0.45 * count + 2.0), 16.0)
    figure, axes = _figure(side, side)
    counts = matrix.double()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if count <= CELLS_WITH_NUMBERS:
        labels = [_printable(n) for n in names]
        axes.set_xticks(range(count), labels, rotation=45 if max(map(len, labels)) > 3 else 0)
        axes.set_yticks(range(count), labels)
        for row in range(count):
            for column in range(count):
                colour = "white" if share[row, column] > 0.5 else "black"
                text = str(int(matrix[row, column]))
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, dpi=120)


def save_roc_curves(curves: Sequence[RocCurve | None], names: Sequence[str], path: Path) -> None:
    """Each class against the rest; the legend gives the area under each curve."""
    figure, axes = _figure(6, 6)
    for curve, name in zip(curves, names, strict=True):
        if curve is not None:
            axes.plot(
                curve.false_positive_rate.numpy(),
                curve.true_positive_rate.numpy(),
                label=f"{_printable(name)} ({curve.area:.3f})",
                linewidth=1.2,
            )
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.grid(alpha=0.3)
    if 1 < len(axes.lines) <= CELLS_WITH_NUMBERS + 1:
        axes.legend(fontsize=8, title="class (area)")
    figure.savefig(path, dpi=120)


def save_image_grid(images: Tensor, path: Path, columns: int = 8, height: int = 96) -> None:
    """Images [N, C, H, W] in 0..1 as one PNG, each about ``height`` pixels high, unsmoothed."""
    from PIL import Image

    count, channels, rows, cols = images.shape
    if channels not in (1, 3):
        raise ValueError(f"a grid shows images of 1 or 3 channels, got {channels}.")
    scale = max(1, round(height / rows))
    gap = 2
    columns = min(columns, count)
    lines = math.ceil(count / columns)
    cell_h, cell_w = rows * scale + gap, cols * scale + gap
    canvas = torch.full(
        (3, lines * cell_h + gap, columns * cell_w + gap), 255, dtype=torch.uint8, device="cpu"
    )
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3).expand(-1, 3, -1, -1)
    for index in range(count):
        top = (index // columns) * cell_h + gap
        left = (index % columns) * cell_w + gap
        canvas[:, top : top + rows * scale, left : left + cols * scale] = pixels[index]
    Image.fromarray(canvas.permute(1, 2, 0).contiguous().numpy()).save(path)


def table(rows: Sequence[tuple[str, str]], head: tuple[str, str]) -> str:
    """A Markdown table of two columns, whose cells show their text as it is."""
    cells = [head, *rows]
    lines = ["| " + " | ".join(map(markdown, row)) + " |" for row in cells]
    return "\n".join([lines[0], "| --- | --- |", *lines[1:]])


def figures(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Names and values of metrics as they are printed: counts whole, measures to four places."""
    return [
        (name.replace("_", " "), f"{value:,d}" if isinstance(value, int) else f"{value:.4f}")
        for name, value in metrics.items()
    ]


def model_card(
    *,
    title: str,
    task: str,
    intended: str,
    usage: str,
    data: Sequence[tuple[str, str]],
    run: Sequence[tuple[str, str]],
    recipe: Sequence[tuple[str, str]],
    metrics: Mapping[str, float],
    about: str,
    sample: str,
    repeat: str,
) -> str:
    """The README.md of a run: what the model is, what it learnt from, and how to use it.

    ``run`` are facts such as parameters, versions and time; ``about`` is a sentence on the metrics,
    or nothing. ``title``, ``intended``, ``usage`` and ``sample`` are Markdown, all else plain text.
    """
    remark = f"{about}\n\n" if about else ""
    tags = "\n".join(f"- {tag}" for tag in ("bigkernel", task))
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags:
{tags}
---

# {title}

{intended}

## Use

```python
{usage}
```

## Results on data held back from training

{table(figures(metrics), ("measure", "value"))}

{remark}![loss](loss.png)

## Sample

{sample}

## Data

{table(data, ("what", "value"))}

## Training

{table(run, ("what", "value"))}

{table(recipe, ("setting", "value"))}

Repeat it:

```sh
{repeat}
```
"""
