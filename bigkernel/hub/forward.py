"""The attention function of a kernel of the hub, for transformers."""

from typing import Any

from torch import Tensor, nn

from bigkernel.integrations.transformers import attention_forward


def flash_attn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attention_forward`, with the masks that transformers makes for kernels: those of sdpa.

    Args, Returns, Raises: as `bigkernel.integrations.transformers.attention_forward`. Without a
    mask the first of several causal queries sees the first key, as in sdpa: there are more keys
    than queries then where a static cache is filled for the first time.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries = query.shape[2]
    if attention_mask is None and causal and 1 < queries < key.shape[2]:
        key, value = key[:, :, :queries], value[:, :, :queries]
    return attention_forward(
        module, query, key, value, attention_mask, is_causal=is_causal, **kwargs
    )
