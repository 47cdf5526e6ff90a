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
layout = ptx.Structures(ROOT / "csrc", "adam/cuda.h")
TYPE_CODES = {
    F32: layout.DType.kFloat32,
    BF16: layout.DType.kBFloat16,
    F16: layout.DType.kFloat16,
}
I64 = ctypes.c_int64


@functools.cache
def host():
    """The launchers, compiled against the emulator."""
    sources = [ROOT / "csrc/adam/sm80_adam.cu", ROOT / "tests/ops/adam_shim.cpp"]
    host = ptx.HostLibrary(sources, flags=["-std=c++20", "-I", str(ROOT / "csrc")])
    host.library.adam_partials.restype = I64
    host.library.adam_run.restype = ctypes.c_char_p
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


def step(host, lists, groups=None, only_norm=False, device="A100", **options):
    """One step by the kernels; returns the norm and the launches."""
    memory, kept = ptx.Memory(), []

    def at(tensor, name=None):
        return memory.register(tensor, name)

    def scalar(value):
        if value is None:
            return layout.DeviceScalar(None, 0)
        kept.append(value)
        return layout.DeviceScalar(at(value), value.dtype == torch.float64)

    groups = groups or [(len(lists["params"]), HYPER | options)]
    group_of = [k for k, (n, _) in enumerate(groups) for _ in range(n)]
    maxima, masters = iter(lists["max_exp_avg_sqs"]), iter(lists["masters"])
    entries = []
    for i, param in enumerate(lists["params"]):
        entry = layout.AdamTensor(numel=param.numel(), group=group_of[i], index=i)
        for name in ("param", "grad", "exp_avg", "exp_avg_sq", "step"):
            setattr(entry, name, at(lists[f"{name}s"][i], f"{name}s[{i}]"))
        if groups[group_of[i]][1].get("amsgrad", False):
            entry.max_exp_avg_sq = at(next(maxima), f"maxima[{i}]")
        if lists["masters"] and param.dtype != F32:
            entry.master = at(next(masters), f"masters[{i}]")
        entry.param_type = TYPE_CODES[param.dtype]
        entry.grad_type = TYPE_CODES[lists["grads"][i].dtype]
        entry.moment_type = TYPE_CODES[lists["exp_avgs"][i].dtype]
        entries.append(entry)
    tensors = (layout.AdamTensor * len(entries))(*entries)
    device_groups = (layout.AdamDeviceGroup * len(groups))()
    for group, (_, given) in zip(device_groups, groups, strict=True):
        group.host.flags, group.host.lr = flags_of(given), float(given["lr"])
        for name in ("beta1", "beta2", "eps", "weight_decay"):
            setattr(group.host, name, given[name])
        group.lr = scalar(given["lr"] if torch.is_tensor(given["lr"]) else None)
    measure = options.get("max_norm") is not None and options.get("total_norm") is None
    measure = 2 if only_norm else int(measure)
    partials = host.library.adam_partials(tensors, I64(len(entries))) if measure else 0
    norm = torch.full((), torch.nan)
    sizes = (
        ctypes.sizeof(layout.AdamControl),
        8 * partials,
        ctypes.sizeof(layout.AdamScalars) * len(entries),
    )
    control, partial_sums, scalars = (np.full(n, 255, np.uint8) for n in sizes)
    seed, max_norm = options.get("seed"), options.get("max_norm")
    call = layout.AdamDeviceCall(
        **{n: scalar(options.get(n)) for n in ("grad_scale", "found_inf", "total_norm")},
        seed=None if seed is None else at(seed),
        max_norm=-1.0 if max_norm is None else max_norm,
        norm=at(norm),
        control=at(control),
        partials=at(partial_sums),
        partial_count=partials,
        scalars=at(scalars),
    )
    with host.running(memory) as launches:
        run = host.library.adam_run
        error = run(tensors, I64(len(entries)), device_groups, I64(len(groups)),
                    ctypes.byref(call), measure, [*ptx.DEVICES].index(device))  # fmt: skip
    if error:
        raise RuntimeError(error.decode())
    return norm, launches
