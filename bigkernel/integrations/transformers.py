"""bigkernel's attention under the names ``bigkernel`` and ``bigkernel_compact`` in transformers.

``model.set_attn_implementation("bigkernel")`` is right for every model that goes through
transformers' AttentionInterface; ``"bigkernel_compact"`` avoids the [B, 1, Sq, Sk] mask, for models
of the kind described in :mod:`bigkernel.integrations.masks`. ``bigkernel.patch`` chooses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from bigkernel import _library
from bigkernel.documents import document_starts
from bigkernel.integrations.eager import asks_for_weights, eager_function, eager_mask
from bigkernel.integrations.masks import (
    compact_mask,
    dense_mask,
    packed_offsets,
    with_documents,
)
from bigkernel.ops.attention import attention, attention_varlen

logger: Any = logging.get_logger(__name__)

# The name of the package, which is another one where it is a kernel of the hub (bigkernel.hub).
NAME = _library.NAMESPACE
COMPACT_NAME = f"{NAME}_compact"

# Arguments that some models pass on and that change the result in a way not supported here.
_UNSUPPORTED = {
    "cache": "paged caches (continuous batching)",
    "indices": "sparse attention by key indices",
    "block_indices": "sparse attention by key blocks",
    "sinks": "attention sinks passed as `sinks`",
    "alibi": "ALiBi tensors",
    "attention_bias": "an attention bias",
    "head_mask": "head masks",
    "layer_head_mask": "head masks",
}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers' models call.

    Args:
        module: the attention layer; its ``is_causal`` counts where ``is_causal`` is None.
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Sk, D], not repeated.
        value: [B, Hkv, Sk, Dv].
        attention_mask: None, or one of the forms of :mod:`bigkernel.integrations.masks`, or a
            float mask [B, 1 or H, Sq, Sk] to add. A 4-D mask is taken as complete.
        dropout: probability; models pass 0 in evaluation.
        scaling: factor of the scores; None: 1 / sqrt(D).
        is_causal: None: as the module says.
        sliding_window: a query sees this many keys, itself included, to the left (and to the right
            where it is not causal).
        softcap: as in Gemma 2.
        position_bias: [1 or B, H, Sq, Sk], added to the scores (T5).
        s_aux: [H], one more logit in every softmax that no value belongs to (GPT-OSS).
        position_ids: [B, Sq]; returns to 0 mark packed documents where no mask was made.
        cu_seq_lens_q: int32 [documents + 1], offsets of packed documents in the B * Sq queries.
        cu_seq_lens_k: the same for the keys.
        max_length_q: upper bound of the documents' lengths.
        max_length_k: the same for the keys.

    Returns:
        ([B, Sq, Hq, Dv], None), or, where ``output_attentions`` asks for them in the call or in the
        config, with the weights [B, Hq, Sq, Sk]: then the layer's own eager function computes both.

    Raises:
        ValueError: the model asks for something that would be lost.
    """
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"bigkernel attention: {type(module).__name__} passes {name}, and {what} are not "
                "supported. Use attn_implementation='eager' for this model (bigkernel.unpatch)."
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "scale": scaling,
        "softcap": softcap or 0.0,
        "return_lse": s_aux is not None,
    }
    if attention_mask is None or attention_mask.ndim == 2:
        options["causal"] = bool(causal)
        options["align"] = "bottom_right"
        if sliding_window is not None:
            options["window"] = (sliding_window - 1, None if causal else sliding_window - 1)

    config = getattr(module, "config", None)
    if cu_seq_lens_q is not None and getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"bigkernel attention: {type(module).__name__} is of a model with an encoder and a "
            "decoder, and packed documents (cu_seq_lens_q) of two sequences are for T5, mT5 and "
            "umT5. Use padding."
        )
    offsets = _document_offsets(
        query, key, attention_mask, position_ids, position_bias, cu_seq_lens_q, cu_seq_lens_k
    )
    if offsets is None and position_ids is not None and _may_be_packed(query, key, position_ids):
        if is_tracing(position_ids):
            _refuse_packing_unseen(position_ids, attention_mask)
        elif attention_mask is not None:
            attention_mask = with_documents(attention_mask, position_ids)

    if asks_for_weights(module, kwargs):
        eager = eager_function(module)
        if eager is not None:
            mask = eager_mask(
                query,
                key,
                attention_mask,
                options.get("causal", False),
                options.get("window", (None, None)),
                offsets,
            )
            for name, given in (
                ("softcap", softcap),
                ("position_bias", position_bias),
                ("s_aux", s_aux),
                ("sliding_window", sliding_window),
                ("position_ids", position_ids),
            ):
                if given is not None:
                    kwargs[name] = given
            if scaling is not None:
                kwargs["scaling"] = scaling
            return eager(module, query, key, value, mask, dropout=dropout, **kwargs)
        logger.warning_once(
            f"bigkernel attention does not support `output_attentions=True` in "
            f"{type(module).__name__}. Please set your attention to `eager` if you want it."
        )

    if offsets is None:
        mask = _dense(attention_mask, position_bias)
        result: Any = attention(query, key, value, mask=mask, **options)
    else:
        for name, length in (("max_seqlen_q", max_length_q), ("max_seqlen_k", max_length_k)):
            options[name] = None if length is None else int(length)
        result = attention_varlen(_pack(query), _pack(key), _pack(value), *offsets, **options)

    out = result[0] if isinstance(result, tuple) else result
    if offsets is None:
        out = out.transpose(1, 2)
    if s_aux is not None:
        # exp(lse) / (exp(lse) + exp(s_aux)) is what the extra logit leaves to the keys.
        lse = result[1]
        share = torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None])
        share = share.transpose(-1, -2)
        out = (out * share[..., None]).to(out.dtype)
    if offsets is not None:
        out = out.reshape(query.shape[0], query.shape[2], *out.shape[1:])
    return out.contiguous(), None


def _document_offsets(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    position_bias: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """(offsets of queries, of keys) where the rows hold packed documents, else None."""
    packed = mask is not None and mask.ndim == 2 and mask.dtype == torch.int32
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
        raise ValueError(
            "bigkernel attention: cu_seq_lens_q and cu_seq_lens_k must be given together, got one."
        )
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None and (mask is None or packed):
        offsets = cu_seq_lens_q, cu_seq_lens_k
    elif cu_seq_lens_q is not None and mask is not None and mask.ndim == 2:
        raise ValueError(
            "bigkernel attention: packed documents (cu_seq_lens_q) and padding (attention_mask) "
            "exclude each other. Leave out attention_mask, as DataCollatorWithFlattening does."
        )
    elif packed and mask is not None:
        offsets = mask[0], mask[0]
    elif (
        mask is None
        and position_ids is not None
        and _may_be_packed(query, key, position_ids)
        and not is_tracing(position_ids)
    ):
        found = packed_offsets(position_ids, query.shape[0])
        if found is None:
            return None
        offsets = found, found
    else:
        return None
    if position_bias is not None:
        raise ValueError(
            "bigkernel attention: a position bias cannot be combined with packed documents. Use "
            "padding instead, or attn_implementation='eager'."
        )
    q_offsets, k_offsets = (o.to(query.device, torch.int32) for o in offsets)
    return q_offsets, k_offsets


def _may_be_packed(query: Tensor, key: Tensor, position_ids: Tensor) -> bool:
    """Whether positions that return to 0 would mean packed documents.

    transformers looks for them itself, but not where a cache or an attention mask of ones is there,
    and then documents would see each other.
    """
    return (
        position_ids.ndim == 2
        and query.shape[2] == key.shape[2] == position_ids.shape[1] > 1
        and position_ids.shape[0] in (1, query.shape[0])
    )


def _refuse_packing_unseen(position_ids: Tensor, mask: Tensor | None) -> None:
    """Compiled code cannot go another way where positions return to 0: it fails there instead.

    Of a complete mask nobody knows here whether it was made by the user.
    """
    if mask is not None and mask.ndim != 2:
        return
    packed = document_starts(position_ids)[:, 1:].any()
    if mask is not None:
        packed = packed & (mask != 0).all()
    torch._assert_async(
        ~packed,
        "bigkernel attention: position_ids return to 0 within a row, which marks packed documents, "
        "but an attention_mask of ones or a cache hides them from compiled code, where they would "
        "see each other. Leave attention_mask out and pass use_cache=False, or do not compile.",
    )


def _dense(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The mask for a dense call: broadcastable to [B, H, Sq, Sk]."""
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :].to(torch.bool)
    if bias is None:
        return mask
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return mask + bias


def _pack(states: Tensor) -> Tensor:
    """[B, H, S, D] -> [B * S, H, D], without a copy for what models compute."""
    return states.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(NAME, attention_forward)
AttentionInterface.register(COMPACT_NAME, attention_forward)
AttentionMaskInterface.register(NAME, dense_mask)
AttentionMaskInterface.register(COMPACT_NAME, compact_mask)
