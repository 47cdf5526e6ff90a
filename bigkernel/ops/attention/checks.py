"""The argument checks that the public attention functions share."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_gradtrackingtensor
from torch._subclasses import FakeTensor

from bigkernel import precision
from bigkernel.errors import has_tangent
from bigkernel.expect import FLOATING, FLOATING_NAMES, TO_FLOAT, Expect, shape_of
from bigkernel.ops.attention.blocks import accumulate_dtype, sequence_cuts
from bigkernel.ops.attention.reference import Rule

Align = Literal["top_left", "bottom_right"]
Window = tuple[int | None, int | None] | None  # (left, right), None or -1: no limit

MAX_NATIVE_HEAD_DIM = 256
_OPTIONAL = ("mask", "attn_mask", "alibi_slopes")
_MAX_WINDOW = 2**31 - 1  # wider than any sequence that a kernel takes
_PACK = "Pack the sequences and call bigkernel.ops.attention_varlen"
_NO_JVP = "Attention has a backward only: use torch.autograd.grad instead of jvp"
_NO_FUNC = "outside of torch.func.grad and vjp, which custom ops do not support"


def check_plain(expect: Expect, **arguments: object) -> None:
    """Each is a dense tensor (or None, if its name says optional), and carries no tangent."""
    compiling = torch.compiler.is_compiling()  # there the operator looks
    for name, x in arguments.items():
        if x is None and name in _OPTIONAL:
            continue
        x = expect.tensor(name, x)
        expect(not x.is_nested, name, "a plain tensor", "a nested one", _PACK, TypeError)
        expect.dense(name, x)
        if not compiling and has_tangent(x):
            expected = "without a forward-mode tangent"
            raise expect.error(name, expected, "a dual tensor", _NO_JVP, NotImplementedError)
        if not compiling and is_gradtrackingtensor(x):
            fix = "Use torch.autograd.grad or .backward()"
            raise expect.error(name, _NO_FUNC, "a tensor inside", fix, NotImplementedError)


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
    dtype = precision.autocast_dtype(kind)
    if dtype is None:
        return q, k, v, mask

    def cast(x: Tensor) -> Tensor:
        eligible = x.is_floating_point() and x.dtype != torch.float64 and x.device.type == kind
        return x.to(dtype) if eligible else x

    return cast(q), cast(k), cast(v), None if mask is None else cast(mask)


def check_qkv(expect: Expect, q: Tensor, k: Tensor, v: Tensor, rank: int, shape: str) -> None:
    """Ranks, dtypes, devices, heads, head dims and lengths of q, k and v [.., H, .., D]."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect.rank(name, x, rank, shape)
    expect.dtype("q", q, FLOATING, FLOATING_NAMES, TO_FLOAT)
    expect.like("k", k, "q", q)
    expect.like("v", v, "q", q)
    dim, heads, kv_heads = q.shape[-1], q.shape[1], k.shape[1]
    if k.shape[-1] != dim or dim <= 0:
        raise expect.error("k's head dim", f"q's, {dim}, and positive", k.shape[-1])
    expect(v.shape[-1] > 0, "v's head dim", "positive", v.shape[-1])
    if v.shape[:-1] != k.shape[:-1]:
        expected = f"of k's shape {tuple(k.shape)} up to the last dimension"
        raise expect.error("v", expected, tuple(v.shape))
    if heads % kv_heads != 0 if kv_heads else heads != 0:
        raise expect.error("q's number of heads", f"a multiple of k's, {kv_heads}", heads)


def check_mask(expect: Expect, mask: Tensor, q: Tensor, full: tuple[int, ...]) -> Tensor:
    """The mask as a view of four dimensions, each that of ``full`` or 1."""
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        expected = f"bool, float32 or of q's dtype, {q.dtype}"
        fix = "A mask of 0 and 1 becomes boolean with mask.bool()"
        raise expect.error("mask", expected, mask.dtype, fix, TypeError)
    expect.device("mask", mask, q.device, "q")
    expect.broadcastable("mask", mask, full)
    return mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]


def check_tensors(
    expect: Expect,
    q: Tensor,
    alibi_slopes: Tensor | None,
    batch: int,
    dropout_p: float,
    seed: Tensor | int | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(alibi_slopes in float32, seed as a tensor), None where there is none."""
    if alibi_slopes is not None:
        name, heads, slopes = "alibi_slopes", q.shape[1], alibi_slopes
        expect.shape(name, slopes, (heads,), (batch, heads))
        expect(slopes.is_floating_point(), name, "floating", slopes.dtype, cls=TypeError)
        expect.device(name, slopes, q.device, "q")
        if slopes.requires_grad:
            fix = "Learned slopes can enter as a floating mask, which gets one"
            got = "a tensor that requires a gradient"
            raise expect.error(name, "without requires_grad", got, fix)
        alibi_slopes = slopes.to(torch.float32).contiguous()
        if readable(alibi_slopes) and not alibi_slopes.isfinite().all():
            raise expect.error(name, "finite in float32", alibi_slopes.tolist())
    _number(expect, "dropout_p", dropout_p)
    expect(0 <= dropout_p <= 1, "dropout_p", "between 0 and 1", dropout_p)
    return alibi_slopes, _seed(expect, q.device, seed) if dropout_p > 0 else None


def _seed(expect: Expect, device: torch.device, seed: Tensor | int | None) -> Tensor:
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        expect.dtype("seed", seed, (torch.int64,), "an int or int64")
        if seed.numel() != 1:
            raise expect.error("seed", "one number", shape_of(seed))
        expect.device("seed", seed, device, "q")
        return seed.reshape(1)
    expect(_has(seed, "__index__"), "seed", "a whole number", seed, cls=TypeError)
    expect(-(2**63) <= seed < 2**63, "seed", "a signed 64-bit integer", seed)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _number(expect: Expect, name: str, value: object) -> None:
    """Python's, NumPy's and torch's numbers, so that they can be compared."""
    if not _has(value, "__float__"):
        raise expect.error(name, "a number", repr(value), cls=TypeError)


def _has(value: object, method: str) -> bool:
    # What torch.compile traces in place of a number can be asked for nothing, not even its repr.
    return torch.compiler.is_compiling() or hasattr(value, method)


def offsets(
    expect: Expect, name: str, cu: Tensor, x: Tensor, longest: int | None, tight: bool
) -> tuple[Tensor, int]:
    """cu_seqlens checked and where x is, and a bound of the lengths where ``longest`` is None.

    tight: the bound is the longest sequence, if the values can be read; else all of x.
    """
    most = x.shape[0] if longest is None else longest
    check_cu_seqlens(expect, name, cu, x, most)
    if cu.device == x.device:
        return cu.contiguous(), most
    if longest is None and tight and readable(cu):
        most = max(cu.diff().tolist(), default=0)
    # Of a clone: pinned memory would be read later, when the caller may have written the next.
    return cu.clone().to(x.device, non_blocking=True), most


def check_cu_seqlens(expect: Expect, name: str, cu: Tensor, x: Tensor, longest: int) -> None:
    """Dtype, rank and device; the values too, where reading them waits for no device."""
    expect.dtype(name, cu, (torch.int32,), "int32", "Convert it with .to(torch.int32)")
    if cu.dim() != 1 or cu.shape[0] <= 0:
        raise expect.error(name, "of shape [B + 1]", shape_of(cu))
    if cu.device.type != "cpu":
        expect.device(name, cu, x.device, "q")
    whole = _has(longest, "__index__")
    expect(whole, f"max_seqlen_{name[-1]}", "a whole number", longest, cls=TypeError)
    if readable(cu):
        sequence_cuts(name, cu, x.shape[0], longest)


def check_rule(
    expect: Expect,
    dim: int,
    dtype: torch.dtype,
    causal: bool,
    align: Align,
    window: Window,
    softcap: float | None,
    dropout_p: float,
    scale: float | None,
) -> Rule:
    """The numbers among the arguments, as the ops take them, for a head dim and dtype of q."""
    expect(align in ("top_left", "bottom_right"), "align", "'top_left' or 'bottom_right'", align)
    if isinstance(causal, str):
        raise expect.error("causal", "True or False", repr(causal), cls=TypeError)
    window = (None, None) if window is None else window
    pair = isinstance(window, (tuple, list)) and len(window) == 2
    expect(pair, "window", "a pair (left, right)", window)
    whole = all(side is None or _has(side, "__index__") for side in window)
    expected = "two whole numbers, or None for no limit"
    expect(whole, "window", expected, window, cls=TypeError)
    sides = [-1 if side is None else side for side in window]
    expected = "two numbers of keys, each at least 0, or None for no limit"
    expect(min(sides) >= -1, "window", expected, window)
    left, right = (min(side, _MAX_WINDOW) for side in sides)
    softcap = 0.0 if softcap is None else softcap
    _number(expect, "softcap", softcap)
    # float32, in which scores are kept, must hold softcap and 1 / softcap with room to spare.
    expected = "0 (off) or a positive number from 1e-30 to 1e30"
    expect(softcap == 0 or 1e-30 <= softcap <= 1e30, "softcap", expected, softcap)
    if scale is None:
        scale = 1 / math.sqrt(dim)
    else:
        _number(expect, "scale", scale)
        largest = torch.finfo(accumulate_dtype(dtype)).max
        finite = -largest <= scale <= largest
        expect(finite, "scale", "finite in the dtype of sums", scale)
    return Rule(scale, causal, align == "bottom_right", left, right, softcap, dropout_p)
