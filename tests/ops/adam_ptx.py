"""The CUDA kernels of Adam without a GPU: csrc/adam's launchers, compiled against the emulator."""

import ctypes
import functools
from pathlib import Path

import numpy as np
import torch

from bigkernel.ops.adam import reference
from bigkernel.testing import ptx

ROOT = Path(__file__).resolve().parents[2]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [(0,), (), (1,), (7,), (15, 3), (512,), (1030,), (33, 131)]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.05}
TYPE_CODES = {F32: 0, BF16: 1, F16: 2}  # DType in csrc/common/dtypes.h
P, I32, I64, F64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double


class AdamTensor(ctypes.Structure):
    _fields_ = (
        *((name, P) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "largest", "master")),
        *(("step", P), ("numel", I64), ("param_type", I32), ("grad_type", I32)),
        *(("moment_type", I32), ("group", I32), ("index", I32)),
    )


class DeviceScalar(ctypes.Structure):
    _fields_ = (("data", P), ("is_double", I32))


class AdamGroup(ctypes.Structure):
    _fields_ = (("flags", I32), *((n, F64) for n in ("lr", "beta1", "beta2", "eps", "decay")),
                ("lr_tensor", DeviceScalar))  # fmt: skip


class AdamCall(ctypes.Structure):
    _fields_ = (
        *((name, DeviceScalar) for name in ("grad_scale", "found_inf", "total_norm")),
        *(("seed", P), ("max_norm", F64), ("norm", P), ("control", P), ("partials", P)),
        *(("partial_count", I32), ("scalars", P)),
    )


@functools.cache
def host():
    """The launchers, compiled against the emulator."""
    sources = [ROOT / "csrc/adam/adam.cu", ROOT / "tests/ops/adam_shim.cpp"]
    host = ptx.HostLibrary(sources, flags=["-std=c++20", "-I", str(ROOT / "csrc")])
    host.library.adam_partials.restype = I64
    host.library.adam_run.restype = ctypes.c_char_p
    sizes = (I64 * 4)()
    host.library.adam_sizes(sizes)
    mine = [ctypes.sizeof(s) for s in (AdamTensor, AdamGroup, AdamCall)]
    assert list(sizes)[:3] == mine, "the structures in csrc/adam have changed"
    host.scalars_size = sizes[3]
    return host


def make(dtypes, sizes=SIZES, amsgrad=False, seed=0, steps=3.0):
    """The lists of one group, as after some steps."""
    param, grad, moment, masters = dtypes
    g = torch.Generator().manual_seed(seed)
    normal = [torch.randn(s, generator=g) for s in sizes]
    return {
        "params": [x.to(param, copy=True) for x in normal],
        "grads": [torch.randn(s, generator=g).to(grad) for s in sizes],
        "exp_avgs": [(torch.randn(s, generator=g) * 0.1).to(moment) for s in sizes],
        "exp_avg_sqs": [(torch.rand(s, generator=g) * 0.1).to(moment) for s in sizes],
        "steps": [torch.tensor(steps) for _ in sizes],
        "max_exp_avg_sqs": [(torch.rand(s, generator=g) * 0.1).to(moment) for s in sizes]
        if amsgrad
        else [],
        "masters": list(normal) if masters else [],
    }


def flags_of(options):
    return (
        reference.AMSGRAD * options.get("amsgrad", False)
        + reference.MAXIMIZE * options.get("maximize", False)
        + reference.DECOUPLED * options.get("decoupled", True)
    )


def step(host, lists, groups=None, only_norm=False, **options):
    """One step by the kernels; returns the norm and the launches."""
    memory, kept = ptx.Memory(), []

    def at(tensor, name=None):
        return memory.register(tensor, name)

    def scalar(value):
        if value is None:
            return DeviceScalar(None, 0)
        kept.append(value)
        return DeviceScalar(at(value), value.dtype == torch.float64)

    groups = groups or [(len(lists["params"]), HYPER | options)]
    group_of = [k for k, (n, _) in enumerate(groups) for _ in range(n)]
    maxima, masters = iter(lists["max_exp_avg_sqs"]), iter(lists["masters"])
    entries = []
    for i, param in enumerate(lists["params"]):
        names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
        arrays = [at(lists[n][i], f"{n}[{i}]") for n in names]
        amsgrad = groups[group_of[i]][1].get("amsgrad", False)
        arrays.append(at(next(maxima), f"maxima[{i}]") if amsgrad else None)
        narrow = lists["masters"] and param.dtype != F32
        arrays.append(at(next(masters), f"masters[{i}]") if narrow else None)
        types = [TYPE_CODES[lists[n][i].dtype] for n in ("params", "grads", "exp_avgs")]
        step_at = at(lists["steps"][i], f"steps[{i}]")
        entries.append(AdamTensor(*arrays, step_at, param.numel(), *types, group_of[i], i))
    tensors = (AdamTensor * len(entries))(*entries)
    device_groups = (AdamGroup * len(groups))(
        *(
            AdamGroup(
                *(flags_of(g), float(g["lr"]), g["beta1"], g["beta2"], g["eps"]),
                *(g["weight_decay"], scalar(g["lr"] if torch.is_tensor(g["lr"]) else None)),
            )
            for _, g in groups
        )
    )
    measure = options.get("max_norm") is not None and options.get("total_norm") is None
    measure = 2 if only_norm else int(measure)
    partials = host.library.adam_partials(tensors, I64(len(entries))) if measure else 0
    norm = torch.full((), torch.nan)
    scratch = [
        np.full(n, 255, np.uint8) for n in (4, 8 * partials, host.scalars_size * len(entries))
    ]
    seed, max_norm = options.get("seed"), options.get("max_norm")
    call = AdamCall(
        *(scalar(options.get(n)) for n in ("grad_scale", "found_inf", "total_norm")),
        *(None if seed is None else at(seed), -1.0 if max_norm is None else max_norm),
        *(at(norm), at(scratch[0]), at(scratch[1]), partials, at(scratch[2])),
    )
    with host.running(memory) as launches:
        run = host.library.adam_run
        error = run(tensors, I64(len(entries)), device_groups, I64(len(groups)),
                    ctypes.byref(call), measure)  # fmt: skip
    assert error == b""
    return norm, launches
