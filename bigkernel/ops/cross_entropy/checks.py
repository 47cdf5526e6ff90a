"""What the ops with a cross-entropy look for in their arguments."""

from typing import Any

from torch import Tensor

from bigkernel.expect import Expect


def check_options(
    expect: Expect, reduction: Any, label_smoothing: Any, z_loss: Any, softcap: float
) -> None:
    """The options that the loss of logits and that of a linear layer share."""
    expect.one_of("reduction", reduction, "mean", "sum", "none")
    numbers = (
        ("label_smoothing", label_smoothing, 1.0, "a number from 0 to 1"),
        ("z_loss", z_loss, 1e30, "a finite number of at least 0"),
        ("softcap", softcap, 1e30, "0 (off), None or a positive number"),
    )
    for name, value, most, expected in numbers:
        fits = isinstance(value, (int, float)) and 0 <= value <= most
        expect(fits, name, expected, value)


def check_labels(
    expect: Expect, name: str, labels: Tensor, ignore_index: int, classes: int
) -> None:
    """Labels [N] are classes or ignore_index. Reads them all."""
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        expected = f"0 to {classes - 1} or ignore_index, {ignore_index}"
        raise expect.error(name, expected, f"{int(labels[row])} at row {row}")
