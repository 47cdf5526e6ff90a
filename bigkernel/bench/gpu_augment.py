"""Augmentation on a GPU, against torchvision image by image, and Kornia."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigkernel.bench import augment
from bigkernel.bench.case import LIMIT, OURS, REFERENCE, Bar, on_torch, strict
from bigkernel.bench.gpu import Cases, Clock, Row, copy_of, measure


def cases(device: str, clock: Clock, small: bool = False) -> Cases:
    """Batches of uint8 images on the device; the limit is a copy on the device."""
    shape: dict[str, Any] = (
        {"count": 2, "size": (40, 32), "output": 24} if small else {"count": 256}
    )
    peers: dict[str, Any] = {
        augment.TORCHVISION: augment.Torchvision,
        augment.KORNIA: augment.Kornia,
    }

    def row(spec: augment.Spec) -> Row:
        skipped = dict[str, str]()
        images = [image.to(device) for image in augment.photographs(spec)]
        batch, chain = torch.stack(images), augment.our_chain(spec)
        runs: dict[str, Callable[[], object]] = {OURS: partial(chain, batch)}
        runs[REFERENCE] = on_torch(runs[OURS])
        for name, make in peers.items():
            try:
                runs[name] = make(spec).run(images)
            except Exception as error:  # one built for another torch fails in ways of its own
                skipped[name] = f"{type(error).__name__}: {error}"
        runs[LIMIT], _ = copy_of(batch.numel() + 4 * 3 * spec.count * spec.output**2, device)
        with strict():
            bars = (Bar(10.0, augment.TORCHVISION), Bar(2.0, augment.KORNIA))
            work = ("images", spec.count, spec.count)
            return measure(spec.name, runs, skipped, clock, work, bars)

    simple = "crop + flip + normalise"
    full = "crop + flip + rotate + jitter + normalise"
    for spec in (augment.Spec(simple, **shape), augment.Spec(full, full=True, **shape)):
        yield spec.name, partial(row, spec)


def repeated(device: str) -> Callable[[], list[Tensor]]:
    """What has to give the same bits each time."""
    spec = augment.Spec("", 4, (100, 90), 64, full=True)
    batch, chain = torch.stack(augment.photographs(spec)).to(device), augment.our_chain(spec)
    ids = torch.arange(4)  # draws are keyed by them
    return lambda: [chain(batch, torch.Generator().manual_seed(3), ids=ids)]
