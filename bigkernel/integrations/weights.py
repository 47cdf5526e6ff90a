"""Loading saved weights back into a model that exists."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from bigkernel.checkpoint import CheckpointError
from bigkernel.integrations.sharding import copy_whole, is_sharded


def has_other_names(model: nn.Module, folder: str | Path) -> bool:
    """Whether the weights in ``folder`` are saved under names that the model does not have.

    transformers saves some models (ViT, for one) under the names of an older layout, which
    ``from_pretrained`` translates and ``load_state_dict(strict=False)`` silently passes over.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    own = set(model.state_dict())
    return any(name not in own for name in _saved_names(Path(folder)))


def load_weights(model: Any, folder: str | Path) -> None:
    """Copy the weights of ``folder`` into ``model`` as ``from_pretrained`` would read them.

    Args:
        model: a PreTrainedModel, sharded or not; its parameters keep their identity, dtype and
            device.
        folder: what ``save_pretrained`` wrote.

    Raises:
        CheckpointError: a weight is missing or has another shape.
    """
    # The widest dtype holds every value of the others exactly; copying narrows it back.
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    loaded, info = type(model).from_pretrained(
        folder,
        config=copy.deepcopy(model.config),
        dtype=functools.reduce(torch.promote_types, dtypes),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, with those that are missing
    )
    wrong = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    if wrong:
        raise CheckpointError(
            f"the weights in {folder} do not fit a {type(model).__name__}: {len(wrong)} are "
            f"missing or have another shape, such as {sorted(wrong)[0]}."
        )
    if is_sharded(model):
        copy_whole(model, loaded.state_dict())
    else:
        model.load_state_dict(loaded.state_dict())


def _saved_names(folder: Path) -> list[str]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return list(json.loads(index.read_text())["weight_map"])
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            return list(file.keys())
    return []
