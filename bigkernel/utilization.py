"""What training reaches: items a second, memory, and the share of the matrix rate (MFU)."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigkernel import precision
from bigkernel.extras import needs

with needs("train", "bigkernel.utilization"):
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

# What a model's main input holds, of which its speed is told.
_UNITS = {"input_ids": "tokens", "pixel_values": "images"}
# A speed is a mean over this many seconds, or since it was told last: it shows what happens now.
WINDOW_SECONDS = 10.0


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the device where it has its own, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Work:
    """What a model multiplies in training.

    weights: that every token is multiplied by. once: that one vector of a sequence is. pair: layers
    times width, for which each pair of tokens is multiplied in attention.
    """

    weights: int
    once: int
    pair: int

    def flops(self, sequences: float, tokens: float, pairs: float) -> float:
        """Floating-point operations, forward and backward, of so many of each in all."""
        return 6.0 * (self.weights * tokens + self.once * sequences) + 12.0 * self.pair * pairs


def work_of(model: nn.Module) -> Work | None:
    """What a training step of ``model`` multiplies.

    Counted as PaLM does (arXiv:2204.02311, appendix B): six operations for every weight that a
    token is multiplied by, and twelve for each pair of tokens, head dimension and layer of
    attention. The half that a causal mask leaves out is counted, what checkpointing computes again
    is not.

    Returns:
        None for a model that is not one of transformers', that consists of several, that trains
        some of its weights alone, or with weights that are multiplied by another number of vectors
        than there are tokens, such as those of experts, decoders of two sequences and convolutions.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    config = model.config
    layers, width = (getattr(config, n, None) for n in ("num_hidden_layers", "hidden_size"))
    heads, dim = (getattr(config, n, None) for n in ("num_attention_heads", "head_dim"))
    several = getattr(config, "is_encoder_decoder", False) or getattr(config, "sub_configs", None)
    if several or not isinstance(layers, int) or not isinstance(width, int) or _has_experts(config):
        return None
    if isinstance(heads, int) and isinstance(dim, int):
        width = heads * dim
    weights = once = 0
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        # By their sizes: where they are sharded, a weight does not have them.
        if isinstance(module, nn.Linear):
            count = module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            count = module.nx * module.nf
        elif isinstance(module, nn.Conv2d) and module.stride == module.kernel_size:
            count = module.weight.numel()  # patches
        elif isinstance(module, nn.Embedding):
            continue
        elif any(p.ndim > 1 and p.shape[0] > 1 for p in own):
            return None
        else:
            continue
        if not all(p.requires_grad and p.is_floating_point() for p in own):
            return None
        if module is getattr(model, "classifier", None):
            once += count
        else:
            weights += count
    return Work(weights, once, layers * width)


def training_flops(model: nn.Module, tokens: int) -> float | None:
    """Operations of a step on one sequence of so many tokens; None as :func:`work_of`."""
    work = work_of(model)
    return None if work is None else work.flops(1, tokens, tokens**2)


def tokens_of_an_image(model: nn.Module) -> int | None:
    """Its patches and the class token; None where the config does not say."""
    config = getattr(model, "config", None)
    side, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    whole = isinstance(side, int) and isinstance(patch, int) and patch > 0
    return (side // patch) ** 2 + 1 if whole else None  # type: ignore[operator]


def _has_experts(config: object) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any(getattr(config, name, None) for name in names)


class Meter:
    """What the training steps of this process reach: `count` each batch, then ask for `figures`.

    Padding does not count, nor do pairs of tokens of different documents. Nothing is read from a
    GPU before the figures are asked for. ``devices`` are those of one process among which a batch
    is dealt out.
    """

    def __init__(self, model: nn.Module, device: torch.device, devices: int = 1) -> None:
        self._device, self._devices = device, devices
        self._input = str(getattr(model, "main_input_name", ""))
        self._unit = _UNITS.get(self._input)
        self._work = work_of(model)
        self._tokens_of_an_image = tokens_of_an_image(model)
        # Images or tokens; sequences, tokens and pairs of tokens.
        self._items: Any = 0
        self._counted: list[Any] = [0, 0, 0]
        # When, and what there was until then: items, operations.
        self._marks: list[tuple[float, float, float]] = [(time.monotonic(), 0.0, 0.0)]

    def count(self, inputs: Any) -> None:
        """A batch that is about to be trained on."""
        given = inputs.get(self._input) if isinstance(inputs, Mapping) else None
        if self._unit is None or given is None:
            return
        if self._unit == "images":
            length = self._tokens_of_an_image or 0
            sums: tuple[Any, ...] = (len(given), len(given) * length, len(given) * length**2)
            self._items += len(given)
        else:
            sums = _sums(inputs, given)
            self._items += sums[1]
        self._counted = [sum(pair) for pair in zip(self._counted, sums, strict=True)]

    def leave_out(self, since: float) -> None:
        """What came after `since`, by time.monotonic(), and the last figures was no training."""
        seconds = time.monotonic() - max(since, self._marks[-1][0])
        self._marks = [(when + seconds, *rest) for when, *rest in self._marks]  # type: ignore[misc]

    def figures(self, dtype: torch.dtype) -> dict[str, float]:
        """By name: tokens or images a second, the peak of memory, and ``mfu`` where it is known.

        Args:
            dtype: what the products of training steps are computed in. The rate of the machine in
                it is measured at the first call of a process.
        """
        found: dict[str, float] = {}
        work = self._work
        known = work is not None and not (self._unit == "images" and not self._tokens_of_an_image)
        flops = work.flops(*map(float, self._counted)) if known else 0.0  # type: ignore[union-attr]
        self._marks.append((time.monotonic(), float(self._items), flops))
        # Two must stay, however long it is between them.
        while len(self._marks) > 2 and self._marks[-1][0] - self._marks[1][0] >= WINDOW_SECONDS:
            self._marks.pop(0)
        seconds, items, flops = (
            b - a for a, b in zip(self._marks[0], self._marks[-1], strict=True)
        )
        if items > 0 and seconds > 0:
            speed = items / seconds
            # A log of four digits has no room for more of a large number that is not whole.
            found[f"{self._unit}_per_second"] = round(speed) if speed >= 100 else round(speed, 1)
        found["memory_bytes"] = memory_bytes(self._device)
        if flops > 0 and seconds > 0:
            rate = precision.matrix_rate(self._device, dtype)
            if rate is not None:
                found["mfu"] = round(flops / seconds / (rate * self._devices), 4)
        return found


def _sums(inputs: Mapping[str, Any], ids: Tensor) -> tuple[Any, Any, Any]:
    """Sequences, tokens, and the squares of their numbers, of a batch of texts."""
    offsets, mask = inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
    if isinstance(offsets, Tensor):
        lengths = offsets.diff().long()
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        lengths = mask.long().sum(-1)
    else:
        rows, length = ids.shape[0], ids.shape[-1]
        return rows, rows * length, rows * length**2
    return len(lengths), lengths.sum(), lengths.square().sum()
