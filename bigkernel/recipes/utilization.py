"""What share of the machine's matrix rate training reaches: model FLOPs utilization (MFU)."""

import functools
import time

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bigkernel import precision

# Sides of the matrices whose product is the rate: large enough for all of a device's cores.
_SIDE = {"cpu": 1024, "cuda": 8192}


def sequence_length(model: PreTrainedModel, unit: str, per_item: int) -> int | None:
    """Tokens of an item: of a text ``per_item``, of an image its patches and the class token."""
    if unit == "tokens":
        return per_item
    side, patch = (getattr(model.config, name, None) for name in ("image_size", "patch_size"))
    whole = isinstance(side, int) and isinstance(patch, int) and patch > 0
    return (side // patch) ** 2 + 1 if whole else None  # type: ignore[operator]


def training_flops(model: PreTrainedModel, tokens: int) -> float | None:
    """Floating-point operations of a training step on one sequence of so many tokens.

    Counted as PaLM does (arXiv:2204.02311, appendix B): six for every weight that a token is
    multiplied by, and twelve for each pair of tokens, head dimension and layer of attention. The
    half that a causal mask leaves out is counted, what checkpointing computes again is not.

    Returns:
        The number; None for a model with weights that are multiplied by another number of vectors
        than there are tokens, such as those of experts and convolutions.
    """
    config = model.config
    layers, width = (getattr(config, n, None) for n in ("num_hidden_layers", "hidden_size"))
    heads, dim = (getattr(config, n, None) for n in ("num_attention_heads", "head_dim"))
    if not isinstance(layers, int) or not isinstance(width, int) or _has_experts(config):
        return None
    if isinstance(heads, int) and isinstance(dim, int):
        width = heads * dim
    weights = 0.0
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            # Of the whole sequence one vector is classified.
            once = module is getattr(model, "classifier", None)
            weights += module.weight.numel() / (tokens if once else 1)
        elif isinstance(module, nn.Conv2d) and module.stride == module.kernel_size:
            weights += module.weight.numel()  # patches
        elif not isinstance(module, nn.Embedding):
            own = module.parameters(recurse=False)
            if any(p.ndim > 1 and p.shape[0] > 1 for p in own):
                return None
    return tokens * (6.0 * weights + 12.0 * layers * width * tokens)


def _has_experts(config: object) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any(getattr(config, name, None) for name in names)


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of PyTorch's product of two square matrices: the fastest of some, measured once.

    For bfloat16 that of float32 where it is faster, on processors without AVX-512.
    """
    if dtype == torch.bfloat16 and precision.speedup(device, dtype) < 1:
        dtype = torch.float32
    side = _SIDE.get(device.type, _SIDE["cuda"])
    a, b = (torch.full((side, side), 0.5, dtype=dtype, device=device) for _ in range(2))
    fastest = float("inf")
    with torch.inference_mode():
        for _ in range(4):  # the first warms up
            _wait(device)
            began = time.perf_counter()
            a @ b
            _wait(device)
            fastest = min(fastest, time.perf_counter() - began)
    return 2.0 * side**3 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
