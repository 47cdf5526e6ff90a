"""The argument checks that the public attention functions share."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_gradtrackingtensor
from torch._subclasses import FakeTensor

from bigkernel.errors import check, has_tangent
from bigkernel.ops.attention.blocks import accumulate_dtype, sequence_cuts

Align = Literal["top_left", "bottom_right"]
Window = tuple[int | None, int | None] | None  # (left, right), None or -1: no limit

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OPTIONAL = ("mask", "attn_mask", "alibi_slopes")
_MAX_WINDOW = 2**31 - 1  # wider than any sequence that a kernel takes


def check_plain(op: str, **arguments: object) -> None:
    """Each is a dense tensor (or None, if its name says optional), and carries no tangent."""
    for name, x in arguments.items():
        if x is None and name in _OPTIONAL:
            continue
        check(isinstance(x, Tensor), op, name, "a tensor", type(x).__name__, cls=TypeError)
        assert isinstance(x, Tensor)
        check(
            not x.is_nested,
            op,
            name,
            "a plain tensor",
            "a nested one",
            "Pack the sequences and call bigkernel.ops.attention_varlen",
            TypeError,
        )
        check(
            x.layout is torch.strided,
            op,
            name,
            "a dense tensor",
            x.layout,
            "Convert it with .to_dense()",
            TypeError,
        )
        check(
            torch.compiler.is_compiling() or not has_tangent(x),  # there the operator looks
            op,
            name,
            "without a forward-mode tangent",
            "a dual tensor",
            "Attention has a backward only: use torch.autograd.grad instead of jvp",
            NotImplementedError,
        )
        check(
            torch.compiler.is_compiling() or not is_gradtrackingtensor(x),
            op,
            name,
            "outside of torch.func.grad and vjp, which custom ops do not support",
            "a tensor inside",
            "Use torch.autograd.grad or .backward()",
            NotImplementedError,
        )


def readable(x: Tensor) -> bool:
    """Whether values can be looked at: there are some, and no device has to be waited for."""
    return not (
        torch.compiler.is_compiling()
        or x.device.type != "cpu"
        or isinstance(x, FakeTensor)
        or is_batchedtensor(x)
        or torch._is_functional_tensor(x)
    )


def autocast(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Inside torch.autocast, the inputs in its dtype, as torch's own attention gets them."""
    kind = q.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return q, k, v, mask
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: Tensor) -> Tensor:
        eligible = x.is_floating_point() and x.dtype != torch.float64 and x.device.type == kind
        return x.to(dtype) if eligible else x

    return cast(q), cast(k), cast(v), None if mask is None else cast(mask)


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, rank: int, shape: str) -> None:
    """Ranks, dtypes, devices, heads, head dims and lengths of q, k and v [.., H, .., D]."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(x.dim() == rank, op, name, f"a tensor {shape}", f"shape {tuple(x.shape)}")
    check(
        q.dtype in DTYPES,
        op,
        "q",
        "float16, bfloat16, float32 or float64",
        q.dtype,
        "Convert it with .to(torch.float32)",
        TypeError,
    )
    for name, x in (("k", k), ("v", v)):
        check(x.dtype == q.dtype, op, name, f"of q's dtype, {q.dtype}", x.dtype, "", TypeError)
        check(x.device == q.device, op, name, f"on q's device, {q.device}", x.device)
    check(
        k.shape[-1] == q.shape[-1] and q.shape[-1] > 0,
        op,
        "k's head dim",
        f"q's, {q.shape[-1]}, and positive",
        k.shape[-1],
    )
    check(v.shape[-1] > 0, op, "v's head dim", "positive", v.shape[-1])
    check(
        v.shape[:-1] == k.shape[:-1],
        op,
        "v",
        f"of k's shape {tuple(k.shape)} up to the last dimension",
        tuple(v.shape),
    )
    kv_heads = k.shape[1]
    check(
        q.shape[1] % kv_heads == 0 if kv_heads else q.shape[1] == 0,
        op,
        "q's number of heads",
        f"a multiple of k's, {kv_heads}",
        q.shape[1],
    )


def check_mask(op: str, mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask as a view [1|B, 1|Hq, 1|Sq, 1|Sk]."""
    check(
        mask.dtype in (torch.bool, torch.float32, q.dtype),
        op,
        "mask",
        f"bool, float32 or of q's dtype, {q.dtype}",
        mask.dtype,
        "A mask of 0 and 1 becomes boolean with mask.bool()",
        TypeError,
    )
    check(mask.device == q.device, op, "mask", f"on q's device, {q.device}", mask.device)
    full = (*q.shape[:3], k.shape[2])
    fits = mask.dim() <= 4 and all(
        size in (1, whole) for size, whole in zip(mask.shape[::-1], full[::-1], strict=False)
    )
    check(fits, op, "mask", f"broadcastable to {full}", f"shape {tuple(mask.shape)}")
    return mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]


def check_tensors(
    op: str,
    q: Tensor,
    alibi_slopes: Tensor | None,
    batch: int,
    dropout_p: float,
    seed: Tensor | int | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(alibi_slopes in float32, seed as a tensor), None where there is none."""
    if alibi_slopes is not None:
        heads = q.shape[1]
        check(
            alibi_slopes.shape in ((heads,), (batch, heads)),
            op,
            "alibi_slopes",
            f"of shape {(heads,)} or {(batch, heads)}",
            tuple(alibi_slopes.shape),
        )
        check(
            alibi_slopes.is_floating_point(),
            op,
            "alibi_slopes",
            "floating",
            alibi_slopes.dtype,
            cls=TypeError,
        )
        check(
            alibi_slopes.device == q.device,
            op,
            "alibi_slopes",
            f"on q's device, {q.device}",
            alibi_slopes.device,
        )
        check(
            not alibi_slopes.requires_grad,
            op,
            "alibi_slopes",
            "without requires_grad",
            "a tensor that requires a gradient",
            "Learned slopes can enter as a floating mask, which gets one",
        )
        alibi_slopes = alibi_slopes.to(torch.float32).contiguous()
        if readable(alibi_slopes):
            finite = bool(alibi_slopes.isfinite().all())
            check(finite, op, "alibi_slopes", "finite in float32", alibi_slopes.tolist())
    _check_number(op, "dropout_p", dropout_p)
    check(0 <= dropout_p <= 1, op, "dropout_p", "between 0 and 1", dropout_p)
    return alibi_slopes, _seed(op, q.device, seed) if dropout_p > 0 else None


def _seed(op: str, device: torch.device, seed: Tensor | int | None) -> Tensor:
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        check(seed.dtype == torch.int64, op, "seed", "an int or int64", seed.dtype, cls=TypeError)
        check(seed.numel() == 1, op, "seed", "one number", f"shape {tuple(seed.shape)}")
        check(seed.device == device, op, "seed", f"on q's device, {device}", seed.device)
        return seed.reshape(1)
    check(_has(seed, "__index__"), op, "seed", "a whole number", seed, cls=TypeError)
    check(-(2**63) <= seed < 2**63, op, "seed", "a signed 64-bit integer", seed)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _check_number(op: str, name: str, value: object) -> None:
    """Python's, NumPy's and torch's numbers, so that they can be compared."""
    if not _has(value, "__float__"):
        check(False, op, name, "a number", repr(value), cls=TypeError)


def _has(value: object, method: str) -> bool:
    # What torch.compile traces in place of a number can be asked for nothing, not even its repr.
    return torch.compiler.is_compiling() or hasattr(value, method)


def check_cu_seqlens(op: str, name: str, cu_seqlens: Tensor, x: Tensor, longest: int) -> None:
    """Dtype, rank and device; the values too, where reading them waits for no device."""
    check(
        cu_seqlens.dtype == torch.int32,
        op,
        name,
        "int32",
        cu_seqlens.dtype,
        "Convert it with .to(torch.int32)",
        TypeError,
    )
    check(
        cu_seqlens.dim() == 1 and cu_seqlens.shape[0] > 0,
        op,
        name,
        "of shape [B + 1]",
        f"shape {tuple(cu_seqlens.shape)}",
    )
    check(cu_seqlens.device == x.device, op, name, f"on q's device, {x.device}", cu_seqlens.device)
    bound = f"max_seqlen_{name[-1]}"
    check(_has(longest, "__index__"), op, bound, "a whole number", longest, cls=TypeError)
    if readable(cu_seqlens):
        sequence_cuts(name, cu_seqlens, x.shape[0], longest)


def check_scalars(
    op: str,
    q: Tensor,
    causal: bool,
    align: Align,
    window: Window,
    softcap: float | None,
    dropout_p: float,
    scale: float | None,
) -> tuple[float, bool, bool, int, int, float, float]:
    """The scalar arguments of the ops, in the order of the schema."""
    check(align in ("top_left", "bottom_right"), op, "align", "'top_left' or 'bottom_right'", align)
    check(not isinstance(causal, str), op, "causal", "True or False", repr(causal), cls=TypeError)
    window = (None, None) if window is None else window
    pair = isinstance(window, (tuple, list)) and len(window) == 2
    check(pair, op, "window", "a pair (left, right)", window)
    check(
        all(side is None or _has(side, "__index__") for side in window),
        op,
        "window",
        "two whole numbers, or None for no limit",
        window,
        cls=TypeError,
    )
    sides = [-1 if side is None else side for side in window]
    check(
        min(sides) >= -1,
        op,
        "window",
        "two numbers of keys, each at least 0, or None for no limit",
        window,
    )
    left, right = (min(side, _MAX_WINDOW) for side in sides)
    softcap = 0.0 if softcap is None else softcap
    _check_number(op, "softcap", softcap)
    # float32, in which scores are kept, must hold softcap and 1 / softcap with room to spare.
    check(
        softcap == 0 or 1e-30 <= softcap <= 1e30,
        op,
        "softcap",
        "0 (off) or a positive number from 1e-30 to 1e30",
        softcap,
    )
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    else:
        _check_number(op, "scale", scale)
        largest = torch.finfo(accumulate_dtype(q.dtype)).max
        check(-largest <= scale <= largest, op, "scale", "finite in the dtype of sums", scale)
    return scale, causal, align == "bottom_right", left, right, softcap, dropout_p
