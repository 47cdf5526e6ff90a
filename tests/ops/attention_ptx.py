"""The CUDA kernels of attention without a GPU: ops whose kernels run in bigkernel.testing.ptx.

``torch.ops.bigkernel_ptx.attention_fwd`` is the op of ``bigkernel.ops.attention``, schema, fake and
autograd included, on CPU tensors: the arguments that csrc/attention/cuda.cpp would hand to the
launchers go to those same launchers, compiled against the emulator.
"""

import ctypes
import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bigkernel import _library, registry
from bigkernel.ops.attention.blocks import empty_like_layout
from bigkernel.ops.attention.reference import Params
from bigkernel.testing import ptx

op = importlib.import_module("bigkernel.ops.attention.op")  # whose name is also a function
ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "bigkernel_ptx"
layout = ptx.Structures(ROOT / "csrc", "attention/cuda.h")
Args, Plan = layout.AttentionCudaArgs, layout.AttentionLaunch
TensorView, MaskView = layout.AttentionTensor, layout.AttentionMask
RULE = [name for name, _ in layout.AttentionRule._fields_]
TYPE_CODES = {
    torch.float32: layout.DType.kFloat32,
    torch.bfloat16: layout.DType.kBFloat16,
    torch.float16: layout.DType.kFloat16,
}
MASK_KINDS = {
    torch.bool: layout.MaskKind.kBool,
    torch.float32: layout.MaskKind.kFloat32,
    torch.bfloat16: layout.MaskKind.kBFloat16,
    torch.float16: layout.MaskKind.kFloat16,
    torch.float64: layout.MaskKind.kFloat64,
}


@functools.cache
def host() -> ptx.HostLibrary:
    sources = [
        *sorted((ROOT / "csrc/attention").glob("*.cu")),
        ROOT / "tests/ops/attention_shim.cpp",
    ]
    host = ptx.HostLibrary(
        sources, flags=["-std=c++20", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc")]
    )
    for name in ("fwd_plan", "fwd_run", "few_plan", "few_run", "bwd_plan", "bwd_run"):
        getattr(host.library, f"attention_{name}").restype = ctypes.c_char_p
    host.library.attention_split_bwd.restype = ctypes.c_int64
    host.library.attention_split_fwd.restype = ctypes.c_int64
    return host


current = ptx.DEVICES["A100"]  # the device that calls run on: see `emulated`
launches: list[ptx.Launch] = []  # of the last call
last: Any = None  # its function and arguments


class Call:
    """The arguments of one call, and the memory that its tensors are registered in."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, params: Params) -> None:
        rule, cu_q, cu_k = params.rule, params.cu_seqlens_q, params.cu_seqlens_k
        self.memory, self.packed = ptx.Memory(), cu_q is not None
        self.kept: list[Tensor] = []
        args = self.args = Args()
        args.q, args.k, args.v = self.view(q, "q"), self.view(k, "k"), self.view(v, "v")
        args.dtype = TYPE_CODES[q.dtype]
        args.heads_q, args.heads_kv = q.shape[1], k.shape[1]
        args.group = q.shape[1] // k.shape[1] if k.shape[1] else 1
        args.dim, args.dim_v = q.shape[-1], v.shape[-1]
        if cu_q is not None and cu_k is not None:
            args.cu_q, args.cu_k = self.at(cu_q, "cu_seqlens_q"), self.at(cu_k, "cu_seqlens_k")
            args.batch, args.total_q, args.total_k = len(cu_q) - 1, q.shape[0], k.shape[0]
            args.max_q = min(params.max_seqlen_q, q.shape[0])
            args.max_k = min(params.max_seqlen_k, k.shape[0])
        else:
            args.batch, args.max_q, args.max_k = q.shape[0], q.shape[2], k.shape[2]
        for name in RULE:
            setattr(args, name, getattr(rule, name))
        sides = rule.window_left, rule.reach_right()
        args.left, args.right = (side if side < 1 << 29 else -1 for side in sides)
        if params.mask is not None:
            args.mask = self.mask(params.mask, "mask")
        if params.alibi_slopes is not None:
            slopes = params.alibi_slopes.float()
            args.slopes = self.at(slopes, "slopes")
            args.slopes_batch = slopes.stride(0) if slopes.dim() == 2 else 0
            args.slopes_head = slopes.stride(-1)
        if rule.dropout_p > 0:
            assert params.seed is not None
            args.seed = self.at(params.seed, "seed")
            probability = ctypes.c_double(rule.dropout_p)
            host().library.attention_set_dropout(ctypes.byref(args), probability)

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

    def plan(self, device: ptx.Device | None = None) -> Plan:
        (plan,) = plans("attention_fwd_plan", self.args, device or current) or [Plan()]
        return plan

    def plan_backward(self, device: ptx.Device | None = None) -> list[Plan]:
        return plans("attention_bwd_plan", self.args, device or current)

    def split(self, splits: int | None = None) -> None:
        """`split` and the memory for it, which nothing has been written to."""
        size = split(self.args, splits=splits)
        self.args.parts = self.at(torch.full((size,), torch.nan), "parts")

    def split_keys(self, device: ptx.Device | None = None, splits: int | None = None) -> None:
        """What the binding does where queries are few, or this many splits; 0: nothing."""
        size = split_keys(self.args, device, splits)
        self.args.parts = self.at(torch.full((size,), torch.nan), "parts")

    def run(self, function: str, device: ptx.Device | None = None) -> None:
        number = [*ptx.DEVICES.values()].index(device or current)
        with host().running(self.memory) as made:
            error = getattr(host().library, function)(ctypes.byref(self.args), number)
        global last
        last = function, self.args
        launches[:] = made
        if error:
            raise RuntimeError(error.decode())


def split(args: Args, device: ptx.Device | None = None, splits: int | None = None) -> int:
    """Sets how many blocks share a tile of keys, as the binding does or this many. The floats that
    they leave for the sum."""
    function = host().library.attention_split_bwd
    part = function(ctypes.byref(args), ctypes.byref(layout.DeviceTraits(*(device or current))))
    if splits is not None:
        args.splits, args.members = splits, args.group // splits
    return part * args.splits if args.splits > 1 else 0


def split_keys(args: Args, device: ptx.Device | None = None, splits: int | None = None) -> int:
    """Sets among how many blocks the keys of few queries are split, 0 where that is not done: as
    the binding does or this many. The floats that they leave for the sum."""
    function = host().library.attention_split_fwd
    part = function(ctypes.byref(args), ctypes.byref(layout.DeviceTraits(*(device or current))))
    if splits is not None:
        args.splits = splits
    return int(part * args.splits)


def plans(function: str, args: Args, device: ptx.Device) -> list[Plan]:
    """The launches of a call that have blocks; RuntimeError with what the plan said instead."""
    found, count = (Plan * 8)(), ctypes.c_int64(1)
    arguments = ctypes.byref(args), ctypes.byref(layout.DeviceTraits(*device)), found
    if function == "attention_fwd_plan":
        error = host().library.attention_fwd_plan(*arguments)
    else:
        error = getattr(host().library, function)(*arguments, ctypes.byref(count))
    if error:
        raise RuntimeError(error.decode())
    return [plan for plan in found[: count.value] if plan.blocks]


def tiles() -> list[tuple[int, int]]:
    """(rows of a block, keys or other rows that it takes at a time) of the last call's launches."""
    function, args = last
    found = plans(function.replace("run", "plan"), args, current)
    return [(plan.tile_rows, plan.tile_keys) for plan in found]


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    call = Call(q, k, v, Params.of(options))
    out = empty_like_layout(q, v.shape[-1]).fill_(torch.nan)
    shape = (q.shape[1], q.shape[0]) if call.packed else q.shape[:3]
    lse = torch.full((*shape, 2), torch.nan)
    call.args.out, call.args.lse = call.view(out, "out"), call.view_lse(lse, "lse")
    call.split_keys()
    call.run("attention_few_run" if call.args.splits else "attention_fwd_run")
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
    *given, needs_dmask = options
    params = Params.of(given)
    call = Call(q, k, v, params)
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
        assert params.mask is not None
        # As the binding: zeros where no packed sequence may be long enough.
        fill = torch.nan if params.cu_seqlens_q is None else 0.0
        dmask = torch.full_like(params.mask, fill, memory_format=torch.contiguous_format)
        args.dmask = call.mask(dmask, "dmask")
    call.split()
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
        operator = getattr(namespace, function.name).default
        _library._below[NAMESPACE, function.name] = _library._below_autograd(operator)
    return namespace, library


@contextmanager
def emulated(device: ptx.Device = current) -> Iterator[None]:
    """Within, every call of attention that a native kernel takes runs in the emulator, by the plans
    for this one of `ptx.DEVICES`."""
    namespace, _ = define()

    def select(name: str, device: torch.device, reason: str | None = None) -> Any:
        assert reason is None, reason
        return namespace

    here = sys.modules[__name__]
    with mock.patch.object(op, "select", select), mock.patch.object(here, "current", device):
        yield
