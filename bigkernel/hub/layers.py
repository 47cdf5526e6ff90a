"""Layers of transformers' models, in the form in which `kernels` takes them over.

`kernels` binds a layer's ``forward`` to the module that is replaced, whose parameters and settings
it then finds in ``self``: a layer has no state of its own, and its ``forward`` the arguments of the
one before. Each runs the op where `bigkernel.patch` would, and else the same in plain PyTorch.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from bigkernel.integrations import native
from bigkernel.integrations.token_loss import is_served, shifted, token_loss
from bigkernel.ops.cross_entropy import cross_entropy
from bigkernel.ops.glu import glu
from bigkernel.ops.norm import reference as norm_reference
from bigkernel.ops.norm import rms_norm
from bigkernel.ops.rope import reference as rope_reference
from bigkernel.ops.rope import rope

__all__ = ["ForCausalLMLoss", "RMSNorm", "RMSNormRoundedOnce", "RotaryPosEmb", "SwiGLUMLP"]

_SILU = frozenset(("SiLU", "SiLUActivation"))  # torch's class, transformers' class


def _rms_norm(x: Tensor, weight: Tensor, eps: float, casting: Any) -> Tensor:
    if native.takes("rms_norm", x, weight):
        return rms_norm(x, weight, eps, casting=casting)
    first = casting == "llama"
    return norm_reference.norm_fwd(x, None, weight, None, eps, 0.0, False, first)[0]


class RMSNorm(nn.Module):
    """LLaMA's, Mistral's, Qwen's and most others': a row is rounded before weight multiplies it."""

    has_backward = True
    can_torch_compile = True

    weight: Tensor  # [D]
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[.., D] normalised, in the dtype that torch promotes it and weight to."""
        return _rms_norm(hidden_states, self.weight, self.variance_epsilon, "llama")


class RMSNormRoundedOnce(nn.Module):
    """GPT-OSS's, OLMo 2's and 3's, Nemotron-H's and DeepSeek-V4's: the product alone is rounded.

    In 16 bits that makes another number than `RMSNorm`; both stand for "RMSNorm" in a mapping.
    """

    has_backward = True
    can_torch_compile = True

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[.., D] normalised, in its dtype."""
        return _rms_norm(hidden_states, self.weight, self.variance_epsilon, "gemma")


class SwiGLUMLP(nn.Module):
    """The gated unit of LLaMA's MLP and those like it; another activation than SiLU runs as it is.

    No class of transformers is marked for it yet (``kernels.replace_kernel_forward_from_hub``).
    """

    has_backward = True
    can_torch_compile = True

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """down_proj(act_fn(gate_proj(x)) * up_proj(x)): [.., D] of [.., D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if type(self.act_fn).__name__ in _SILU and native.takes("glu", gate, up):
            hidden = glu(gate, up)
        else:
            hidden = self.act_fn(gate) * up
        down: Tensor = self.down_proj(hidden)
        return down


class RotaryPosEmb(nn.Module):
    """The function ``apply_rotary_pos_emb`` of LLaMA and those like it, "rotary_pos_emb"."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys, rotated by halves; each in its dtype.

        Args:
            q: [B, Hq, S, D], or [B, S, Hq, D] where ``unsqueeze_dim`` is 2.
            k: the same, of Hkv heads.
            cos: [B or 1, S, D].
            sin: [B or 1, S, D].
            unsqueeze_dim: the dimension of q's heads, 1 or 2.

        Raises:
            ValueError: another layout, or angles for half a head, as GPT-OSS makes them.
        """
        if unsqueeze_dim not in (1, 2) or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]:
            raise ValueError(
                "bigkernel's RotaryPosEmb: cos must be [B or 1, S, D] with D that of q, "
                f"{q.shape[-1]}, and unsqueeze_dim 1 or 2, got {tuple(cos.shape)} and "
                f"{unsqueeze_dim}. Leave 'rotary_pos_emb' out of the kernel mapping of this model."
            )
        if unsqueeze_dim == 2:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        if native.takes("rope", q, k, cos, sin):
            q, k = rope(q, k, cos, sin)
        else:
            q, k = rope_reference.rope_fwd(q, k, cos, sin, False, False)
        return (q, k) if unsqueeze_dim == 1 else (q.transpose(1, 2), k.transpose(1, 2))


class ForCausalLMLoss(nn.Module):
    """The loss of language models: ``model.loss_function = ForCausalLMLoss().forward``.

    From the logits as they are, where transformers makes a float32 copy of them first. A model
    keeps its own loss if it is given the module itself, which torch takes for a part of the model.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The mean loss, or the sum over ``num_items_in_batch``, of logits [B, S, V].

        Args:
            logits: [B, S, V].
            labels: int64 [B, S], of the inputs: shifted here.
            vocab_size: V.
            num_items_in_batch: what the sum is divided by; None: the mean.
            ignore_index: the label that does not count.
            shift_labels: labels that are shifted already, in the place of ``labels``.
            kwargs: more of the model's arguments, which transformers' loss does not read either.
        """
        if shift_labels is None:
            shift_labels = shifted(labels, ignore_index)
        function: Any = cross_entropy
        if not is_served(logits, shift_labels):
            function, logits = F.cross_entropy, logits.float()
        return token_loss(
            function, logits, shift_labels, vocab_size, num_items_in_batch, ignore_index
        )
