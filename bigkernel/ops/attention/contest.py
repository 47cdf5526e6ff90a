"""torch's scaled_dot_product_attention in the place of our kernel, where it is right and faster.

Right it is for a dense call of as many queries as keys, of one head dim, with nothing but causality
or, on the CPU, a boolean mask, and of which the log-sum-exp is not asked for. Its fused kernels
then compute the same, with memory linear in the lengths; rows in which every key is masked are 0
on the CPU (other devices are not relied on there).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bigkernel import _library, backend, registry, tuning
from bigkernel.ops.attention.reference import Params

NAME = "attention"
# Ranges of lengths, each with the one that is timed: its end, or twice its beginning.
_LENGTHS = {"S<=32": 32, "S<=128": 128, "S<=512": 512, "S>512": 1024}
_DIMS = (16, 32, 48, 64, 72, 80, 88, 96, 112, 128, 160, 192, 256)
_RULES = ("full", "causal", "mask")


def runs(q: Tensor, k: Tensor, v: Tensor, params: Params) -> bool:
    """Whether torch's attention is to run a call that asks for no log-sum-exp."""
    device_type = q.device.type
    if backend.is_forced() or not tuning.contested(NAME, device_type):
        return False
    words = class_of(q, k, v, params)
    return words is not None and tuning.takes_torch(NAME, device_type, words)


def class_of(q: Tensor, k: Tensor, v: Tensor, params: Params) -> str | None:
    """The class of a call; None where torch's attention would not be right."""
    rule, mask = params.rule, params.mask
    if (
        params.cu_seqlens_q is not None
        or params.alibi_slopes is not None
        or rule.dropout_p > 0
        or rule.softcap > 0
        or rule.window_left >= 0
        or rule.window_right >= 0
        or q.dtype not in registry.SHORT
        or _library.is_followed()
        or 0 in (q.shape[0], q.shape[1])
    ):
        return None
    if mask is not None and (rule.causal or mask.dtype != torch.bool or q.device.type != "cpu"):
        return None
    size = _size(q.shape[-1], k.shape[2])
    if size is None or q.shape[2] != k.shape[2] or v.shape[-1] != q.shape[-1]:
        return None
    words = "causal" if rule.causal else "full" if mask is None else "mask"
    return f"{registry.SHORT[q.dtype]} {size} {words} {tuning.mode((q, k, v))}"


def _size(dim: int, length: int) -> str | None:
    """Such as "D64 S<=512"; None where a compiled function is to serve all sizes."""
    surely: Callable[[Any], bool] = bool
    if torch.compiler.is_compiling():
        # Which asks, and does not make the code hold for some sizes alone.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        surely = statically_known_true
    if surely(length <= 0):
        return None
    for words, limit in _LENGTHS.items():
        if surely(length <= limit) or (words[1] == ">" and surely(length > 512)):
            break
    else:
        return None
    for known in _DIMS:
        if surely(dim == known):
            return f"D{known} {words}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, params: Params) -> Tensor:
    """The call by torch's attention, its result laid out as ours is."""
    rule = params.rule
    out = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=params.mask,
        is_causal=rule.causal,
        scale=rule.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    if q.stride(1) < q.stride(2):
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous()


def contest(ours: tuning.Function) -> registry.Contest:
    """The contest of the public function, which is given since it calls `runs`."""

    def make(words: str, device: torch.device) -> tuple[Any, Any]:
        dtype, dim, length, rule, mode = words.split()
        causal, size = rule == "causal", _LENGTHS[length]
        # Some tokens, enough for every thread or for a GPU, and not longer than it takes to tell.
        heads, batch = 4, max(1, -(-torch.get_num_threads() // 4), 1024 // size)
        if device.type != "cpu":
            heads, batch = 16, max(1, 8192 // size)
        draw = torch.Generator().manual_seed(0)
        kind = next(d for d, short in registry.SHORT.items() if short == dtype)

        shape = (batch, size, heads, int(dim[1:]))
        drawn = (torch.randn(shape, generator=draw) for _ in range(3))
        inputs = [x.to(kind).transpose(1, 2) for x in drawn]
        mask = None
        if rule == "mask":
            mask = torch.arange(size, device=device).expand(batch, 1, 1, size) < max(1, size - 1)
        functions = (
            lambda q, k, v: ours(q, k, v, causal=causal, mask=mask),
            lambda q, k, v: functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal
            ),
        )
        return tuning.calls(functions, inputs, device, mode)

    every = itertools.product(("fp32", "bf16"), (64, 128), _LENGTHS, _RULES, tuning.MODES)
    return registry.Contest(
        "torch's scaled_dot_product_attention",
        tuple(f"{t} D{d} {s} {rule} {mode}" for t, d, s, rule, mode in every),
        make,
        _classes_of,
    )


def _classes_of(tensors: Sequence[Tensor]) -> list[str]:
    if len(tensors) < 2 or any(x.dim() != 4 or x.dtype not in registry.SHORT for x in tensors[:2]):
        return []
    q, k = tensors[:2]
    size = _size(q.shape[-1], k.shape[2])
    if size is None or q.shape[2] != k.shape[2]:
        return []
    modes = itertools.product(_RULES, tuning.MODES)
    return [f"{registry.SHORT[q.dtype]} {size} {rule} {mode}" for rule, mode in modes]
