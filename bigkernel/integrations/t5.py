"""T5's attention on packed documents, of which each is two sequences.

`bigkernel.data.PackingCollator` says where the documents begin in both: ``cu_seq_lens_k`` in what
the encoder reads, ``cu_seq_lens_q`` in what the decoder does, as these are the keys and the queries
of cross attention. By itself a layer of T5 would see all documents of a row, and make its position
bias for every pair of tokens of it. The bias depends on the distance of two tokens alone, so that
of the longest document, counted from the start of each, is that of all: [1, H, L, L].

A layer that is called without offsets runs its own code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigkernel.integrations import contract
from bigkernel.integrations.eager import asks_for_weights
from bigkernel.integrations.subclass import Swapped, give_subclass, original_class, why_no_subclass
from bigkernel.ops.attention import attention_varlen


class _Names(NamedTuple):
    """What the forward of a class calls its arguments, and whether it returns the bias."""

    mask: str
    states: str  # what the encoder made
    returns_bias: bool


_T5 = _Names("mask", "key_value_states", returns_bias=True)
# By module and name of the class.
_KNOWN = {
    ("transformers.models.t5.modeling_t5", "T5Attention"): _T5,
    ("transformers.models.mt5.modeling_mt5", "MT5Attention"): _T5,
    ("transformers.models.umt5.modeling_umt5", "UMT5Attention"): _Names(
        "attention_mask", "encoder_hidden_states", returns_bias=False
    ),
}


def apply(model: nn.Module) -> list[Swapped]:
    """Have the attention layers of T5 in ``model`` keep packed documents apart."""
    undo = []
    for module in model.modules():
        cls = original_class(module)
        names = _KNOWN.get((cls.__module__, cls.__qualname__))
        if names is not None and why_no_subclass(module) is None:
            contract.check(cls.__qualname__)
            undo += give_subclass(module, _packing, names)
    return undo


def _packing(base: Any, names: _Names) -> dict[str, Any]:
    def forward(self: Any, hidden_states: Tensor, *positional: Any, **keywords: Any) -> Any:
        if keywords.get("cu_seq_lens_q") is None:
            return base.forward(self, hidden_states, *positional, **keywords)
        if asks_for_weights(self, keywords):
            raise ValueError(
                f"bigkernel attention: {base.__name__} gives no attention weights of packed "
                "documents. Ask for none (output_attentions=False), or use padding."
            )
        if keywords.get(names.mask) is not None:
            raise ValueError(
                "bigkernel attention: packed documents (cu_seq_lens_q) and padding "
                "(attention_mask, decoder_attention_mask) exclude each other. Leave out the masks, "
                "as bigkernel.data.PackingCollator does."
            )
        if keywords.get("cu_seq_lens_k") is None:
            raise ValueError(
                "bigkernel attention: cu_seq_lens_q and cu_seq_lens_k must be given together, got "
                "one."
            )
        states = keywords.get(names.states)
        # In self attention the queries and keys are the decoder's or the encoder's, both.
        rows = "q" if self.is_decoder else "k"
        keys = rows if states is None else "k"
        offsets = [
            keywords[f"cu_seq_lens_{side}"].to(hidden_states.device, torch.int32)
            for side in (rows, keys)
        ]
        longest = [
            keywords.get(f"max_length_{side}") or int(bounds.diff().max())
            for side, bounds in zip((rows, keys), offsets, strict=True)
        ]
        bias = keywords.get("position_bias") if states is None else None
        if bias is None and self.has_relative_attention_bias:
            bias = self.compute_bias(*longest, device=hidden_states.device)
            bias = bias.contiguous()  # each document reads it
        shape = (-1, self.n_heads, self.key_value_proj_dim)
        source = hidden_states if states is None else states
        out = attention_varlen(
            self.q(hidden_states).view(shape),
            self.k(source).view(shape),
            self.v(source).view(shape),
            *offsets,
            max_seqlen_q=longest[0],
            max_seqlen_k=longest[1],
            mask=bias,
            causal=self.is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scaling,
        )
        out = self.o(out.reshape(*hidden_states.shape[:-1], -1))
        return (out, bias, None) if names.returns_bias else (out, None)

    return {"forward": forward}
