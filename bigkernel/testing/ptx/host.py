"""Runs a launcher's own host code, with the launches going to the emulator.

The .cu file is compiled as for a GPU, its host part linked to a stand-in for the CUDA runtime that
hands each ``kernel<<<grid, block, shared>>>(arguments)`` to Python. So grid, shared memory,
template choice and argument structs are those that a GPU launch would use.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bigkernel.testing.ptx.compiler import compiled, run_nvcc
from bigkernel.testing.ptx.counters import Counters
from bigkernel.testing.ptx.launch import Module, load
from bigkernel.testing.ptx.memory import Memory


class Device(NamedTuple):
    """What the stand-in for the runtime says of a GPU.

    Its compute capability, as 80 for 8.0; the bytes of shared memory that a block may ask for; its
    multiprocessors; the bytes of its L2 cache.
    """

    capability: int
    shared_per_block: int
    multiprocessors: int
    l2_bytes: int


# Their places are the numbers of the devices that launchers see: 0 is the A100. The CUDA C++
# Programming Guide has the shared memory, the vendor's white papers multiprocessors and L2.
DEVICES = {
    "A100": Device(80, 163 << 10, 108, 40 << 20),
    "one SM": Device(86, 99 << 10, 1, 1 << 20),  # none that is sold: small calls fill it
    "RTX 3090": Device(86, 99 << 10, 82, 6 << 20),
    "RTX 4090": Device(89, 99 << 10, 128, 72 << 20),
    "H100": Device(90, 227 << 10, 132, 50 << 20),
    "B200": Device(100, 227 << 10, 148, 126 << 20),
    "RTX 5090": Device(120, 99 << 10, 170, 96 << 20),
    "T4": Device(75, 64 << 10, 40, 4 << 20),
}

_RUNTIME = r"""
#include <cuda_runtime_api.h>
#include <map>
#include <string>
typedef int (*Launch)(const char*, const unsigned*, size_t, void**);
static Launch on_launch;
static std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}
static struct { dim3 grid, block; size_t shared; } next_launch;
static cudaError_t last_error;
static const int devices[][4] = DEVICES;
extern "C" {
void ptx_on_launch(Launch f) { on_launch = f; }
void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*,
                            uint3*, dim3*, dim3*, int*) { names()[host] = device; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st*) {
  next_launch.grid = grid; next_launch.block = block; next_launch.shared = shared;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void*) {
  *grid = next_launch.grid; *block = next_launch.block; *shared = next_launch.shared;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** args, size_t shared,
                             cudaStream_t) {
  const unsigned extents[] = {g.x, g.y, g.z, b.x, b.y, b.z};
  if (!on_launch || on_launch(names()[f].c_str(), extents, shared, args))
    last_error = cudaErrorLaunchFailure;
  return last_error;
}
cudaError_t __cudaGetKernel(void** kernel, const void* f) {
  *kernel = const_cast<void*>(f);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(void* f, dim3 g, dim3 b, void** args, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(f, g, b, args, shared, stream);
}
cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorLaunchFailure"; }
const char* cudaGetErrorString(cudaError_t) { return "the emulator stopped the launch"; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = 0;
  if (device < 0 || device >= int(sizeof(devices) / sizeof(devices[0])))
    return last_error = cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = devices[device][0] / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = devices[device][0] % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = devices[device][1]; break;
    case cudaDevAttrMultiProcessorCount: *value = devices[device][2]; break;
    case cudaDevAttrL2CacheSize: *value = devices[device][3]; break;
    default: return last_error = cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
}
"""
_ROWS = ", ".join(f"{{{', '.join(map(str, device))}}}" for device in DEVICES.values())
_RUNTIME = _RUNTIME.replace("DEVICES", "{" + _ROWS + "}")
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


@dataclass(frozen=True)
class Launch:
    """One launch that the host code made."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    counters: Counters


class HostLibrary:
    """Sources (.cu, .cpp) as a shared library whose launches run in the emulator.

    ``library`` is the ctypes.CDLL: call its ``extern "C"`` functions within ``running(memory)``,
    with addresses from that memory for device pointers. Raises RuntimeError with nvcc's message.
    """

    def __init__(
        self, sources: Sequence[str | Path], arch: str = "sm_80", flags: Sequence[str] = ()
    ) -> None:
        virtual = arch.replace("sm_", "compute_")
        options = ["-c", "-Xcompiler", "-fPIC", "-keep", "-keep-dir", "{folder}", "-lineinfo"]
        options += [f"-gencode=arch={virtual},code={virtual}", *flags]

        def build(source: str | Path) -> Path:
            return compiled(source, options, "HostLibrary", "runtime.cpp")

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            made = list(pool.map(build, [*sources, _RUNTIME]))
        with tempfile.TemporaryDirectory() as folder:
            target = f"{folder}/library.so"
            objects = []
            for k, of_source in enumerate(made):
                objects.append(f"{folder}/{k}.o")
                os.symlink(of_source / "out", objects[-1])
            # -Bsymbolic: torch may have loaded the real runtime.
            link = ["-shared", "-cudart", "none", "-Xlinker", "-Bsymbolic", *objects, "-o", target]
            run_nvcc(link, "HostLibrary")
            self.library = ctypes.CDLL(target)
        texts = [path for of_source in made for path in sorted(of_source.glob("*.ptx"))]
        self.modules: list[Module] = [load(path.read_text()) for path in texts]

    @contextmanager
    def running(self, memory: Memory) -> Iterator[list[Launch]]:
        """Within, launches run at once, on ``memory``; gives the list that they are added to.

        What the emulator raises comes out at the end of the block; launches after it do nothing.
        """
        launches: list[Launch] = []
        errors: list[BaseException] = []

        def launch(name: bytes, extents: Any, shared: int, arguments: Any) -> int:
            if errors:
                return 1
            try:
                kernel = next(m for m in self.modules if name.decode() in m.kernels)[name.decode()]
                params = kernel.function.params
                values = [ctypes.string_at(arguments[i], p.size) for i, p in enumerate(params)]
                grid, block = tuple(extents[:3]), tuple(extents[3:6])
                counters = kernel.launch(grid, block, values, memory, shared)
                launches.append(Launch(kernel.name, grid, block, shared, counters))
            except BaseException as error:
                errors.append(error)  # C++ frames lie between: raised below
                return 1
            return 0

        callback = _CALLBACK(launch)
        self.library.ptx_on_launch(callback)
        try:
            yield launches
        finally:
            self.library.ptx_on_launch(_CALLBACK(0))
        if errors:
            raise errors[0]
