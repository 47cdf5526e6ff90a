"""The CUDA kernels of attention without a GPU: ops whose kernels run in bigkernel.testing.ptx.

``torch.ops.bigkernel_ptx.attention_fwd`` is the op of ``bigkernel.ops.attention``, schema, fake and
autograd included, on CPU tensors: the arguments that csrc/attention/cuda.cpp would hand to the
launchers go to those same launchers, compiled against the emulator.
"""

import ctypes
import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bigkernel import registry
from bigkernel.ops.attention.blocks import empty_like_layout
from bigkernel.testing import ptx

op = importlib.import_module("bigkernel.ops.attention.op")  # whose name is also a function
ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "bigkernel_ptx"
P, I32, I64, F32, U32 = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_uint32,
)
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType
MASK_KINDS = {  # MaskKind
    torch.bool: 1,
    torch.float32: 2,
    torch.bfloat16: 3,
    torch.float16: 4,
    torch.float64: 5,
}


class TensorView(ctypes.Structure):  # AttentionTensor
    _fields_ = (("data", P), ("batch", I64), ("head", I64), ("row", I64))


class MaskView(ctypes.Structure):  # AttentionMask
    _fields_ = (("data", P), ("kind", I32), *((n, I64) for n in ("batch", "head", "row", "col")))


class Args(ctypes.Structure):  # AttentionCudaArgs
    _fields_ = (
        *((n, TensorView) for n in ("q", "k", "v", "out", "lse")),
        *((n, TensorView) for n in ("dout", "dlse", "dq", "dk", "dv", "delta")),
        *((n, MaskView) for n in ("mask", "dmask")),
        *(("slopes", P), ("slopes_batch", I64), ("slopes_head", I64), ("seed", P)),
        *(("cu_q", P), ("cu_k", P), ("total_q", I64), ("total_k", I64), ("dtype", I32)),
        *((n, I32) for n in ("batch", "heads_q", "heads_kv", "group", "max_q", "max_k")),
        *((n, I32) for n in ("dim", "dim_v", "aligned", "bottom_right", "left", "right")),
        *(("scale", F32), ("softcap", F32), ("dropout_scale", F32), ("dropout_threshold", U32)),
    )


class Plan(ctypes.Structure):  # AttentionLaunch
    _fields_ = (
        *(("name", ctypes.c_char_p), ("kernel", P), ("blocks", U32), ("threads", U32)),
        *(("shared", ctypes.c_size_t), ("tile_rows", I32), ("tile_keys", I32)),
        *(("tile_dim", I32), ("aligned", I32), ("general", I32)),
    )


@functools.cache
def host() -> ptx.HostLibrary:
    sources = [
        *sorted((ROOT / "csrc/attention").glob("*.cu")),
        ROOT / "tests/ops/attention_shim.cpp",
    ]
    host = ptx.HostLibrary(
        sources, flags=["-std=c++20", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc")]
    )
    host.library.attention_args_size.restype = I64
    host.library.attention_launch_size.restype = I64
    host.library.attention_fwd_plan.restype = ctypes.c_char_p
    host.library.attention_fwd_run.restype = ctypes.c_char_p
    host.library.attention_bwd_plan.restype = ctypes.c_char_p
    host.library.attention_bwd_run.restype = ctypes.c_char_p
    host.library.attention_bwd_plan.restype = ctypes.c_char_p
    assert host.library.attention_args_size() == ctypes.sizeof(Args), "AttentionCudaArgs changed"
    assert host.library.attention_launch_size() == ctypes.sizeof(Plan), "AttentionLaunch changed"
    return host


launches: list[ptx.Launch] = []  # of the last call
last: Any = None  # its function and arguments


class Call:
    """The arguments of one call, and the memory that its tensors are registered in."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> None:
        (mask, slopes, seed, cu_q, cu_k, max_q, max_k, scale, causal, bottom_right, left, right,
         softcap, dropout_p) = options  # fmt: skip
        self.memory, self.packed = ptx.Memory(), cu_q is not None
        self.kept: list[Tensor] = []
        args = self.args = Args()
        args.q, args.k, args.v = self.view(q, "q"), self.view(k, "k"), self.view(v, "v")
        args.dtype = TYPE_CODES[q.dtype]
        args.heads_q, args.heads_kv = q.shape[1], k.shape[1]
        args.group = q.shape[1] // k.shape[1] if k.shape[1] else 1
        args.dim, args.dim_v = q.shape[-1], v.shape[-1]
        if self.packed:
            args.cu_q, args.cu_k = self.at(cu_q, "cu_seqlens_q"), self.at(cu_k, "cu_seqlens_k")
            args.batch, args.total_q, args.total_k = len(cu_q) - 1, q.shape[0], k.shape[0]
            args.max_q, args.max_k = min(max_q, q.shape[0]), min(max_k, k.shape[0])
        else:
            args.batch, args.max_q, args.max_k = q.shape[0], q.shape[2], k.shape[2]
        args.scale, args.softcap, args.bottom_right = scale, softcap, bottom_right
        args.left, args.right = (side if side < 1 << 29 else -1 for side in (left, right))
        if causal:
            args.right = 0
        if mask is not None:
            args.mask = self.mask(mask, "mask")
        if slopes is not None:
            slopes = slopes.float()
            args.slopes = self.at(slopes, "slopes")
            args.slopes_batch = slopes.stride(0) if slopes.dim() == 2 else 0
            args.slopes_head = slopes.stride(-1)
        if dropout_p > 0:
            args.seed = self.at(seed, "seed")
            host().library.attention_set_dropout(ctypes.byref(args), ctypes.c_double(dropout_p))

    def at(self, x: Tensor, name: str) -> int:
        self.kept.append(x)
        return self.memory.register(x.detach(), name)

    def view(self, x: Tensor, name: str) -> TensorView:
        strides = (0, x.stride(1), x.stride(0)) if self.packed else x.stride()[:3]
        return TensorView(self.at(x, name), *strides)

    def view_lse(self, x: Tensor, name: str, whole: Tensor | None = None) -> TensorView:
        """A view of x [B, H, S(, 2)] or [H, T(, 2)], the first part of `whole`."""
        at = self.at(x if whole is None else whole, name)
        return TensorView(at, *((0, *x.stride()[:2]) if self.packed else x.stride()[:3]))

    def mask(self, x: Tensor, name: str) -> MaskView:
        strides = [0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
        return MaskView(self.at(x, name), MASK_KINDS[x.dtype], *strides)

    def plan(self) -> Plan:
        plan = Plan()
        error = host().library.attention_fwd_plan(ctypes.byref(self.args), ctypes.byref(plan))
        assert error == b"", error.decode()
        return plan

    def plan_backward(self) -> list[Plan]:
        plans, count = (Plan * 8)(), I64()
        arguments = ctypes.byref(self.args), plans, ctypes.byref(count)
        error = host().library.attention_bwd_plan(*arguments)
        assert error == b"", error.decode()
        return list(plans[: count.value])

    def run(self, function: str) -> None:
        with host().running(self.memory) as made:
            error = getattr(host().library, function)(ctypes.byref(self.args))
        global last
        last = function, self.args
        launches[:] = made
        assert error == b"", error.decode()


def tiles() -> list[tuple[int, int]]:
    """(rows of a block, keys or other rows that it takes at a time) of the last call's launches."""
    function, args = last
    plans = (Plan * 8)()
    if function == "attention_fwd_run":
        error = host().library.attention_fwd_plan(ctypes.byref(args), plans)
    else:
        count = I64()
        error = host().library.attention_bwd_plan(ctypes.byref(args), plans, ctypes.byref(count))
    assert error == b"", error.decode()
    return [(plan.tile_rows, plan.tile_keys) for plan in plans if plan.blocks]


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    call = Call(q, k, v, *options)
    out = empty_like_layout(q, v.shape[-1]).fill_(torch.nan)
    shape = (q.shape[1], q.shape[0]) if call.packed else q.shape[:3]
    lse = torch.full((*shape, 2), torch.nan)
    call.args.out, call.args.lse = call.view(out, "out"), call.view_lse(lse, "lse")
    call.run("attention_fwd_run")
    return out, lse


def prepare_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Call, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The call, and (dq, dk, dv, dmask) that it will fill."""
    *options, needs_dmask = options
    call, mask = Call(q, k, v, *options), options[0]
    args = call.args
    dq, dk, dv = (empty_like_layout(x, x.shape[-1]).fill_(torch.nan) for x in (q, k, v))
    args.out, args.dout = call.view(out, "out"), call.view(dout, "dout")
    args.lse = call.view_lse(lse, "lse")
    if dlse is not None:
        args.dlse = call.view_lse(dlse, "dlse")
    args.dq, args.dk, args.dv = call.view(dq, "dq"), call.view(dk, "dk"), call.view(dv, "dv")
    delta = torch.full((3, *lse.shape[:-1]), torch.nan)
    args.delta = call.view_lse(delta[0], "delta", delta)
    dmask = q.new_empty(0)
    if needs_dmask:
        dmask = torch.full_like(mask, torch.nan, memory_format=torch.contiguous_format)
        args.dmask = call.mask(dmask, "dmask")
    return call, (dq, dk, dv, dmask)


def attention_bwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, gradients = prepare_backward(*arguments)
    call.run("attention_bwd_run")
    return gradients


@functools.cache
def define() -> Any:
    """The ops, defined once; kept for as long as the process."""
    library = torch.library.Library(NAMESPACE, "DEF")
    namespace = getattr(torch.ops, NAMESPACE)
    functions = registry.find("attention").functions
    for function, impl in zip(functions, (attention_fwd, attention_bwd), strict=True):
        library.define(function.name + function.schema)
        library.impl(function.name, impl, "CPU")
        qualified = f"{NAMESPACE}::{function.name}"
        torch.library.register_fake(qualified, function.fake, lib=library)
        backward, setup_context = function.autograd(namespace)
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=library
        )
    return namespace, library


@contextmanager
def emulated() -> Iterator[None]:
    """Within, every call of attention that a native kernel takes runs in the emulator."""
    namespace, _ = define()

    def select(name: str, device: torch.device, reason: str | None = None) -> Any:
        assert reason is None, reason
        return namespace

    with mock.patch.object(op, "select", select):
        yield
