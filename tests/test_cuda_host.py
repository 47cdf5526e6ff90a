"""What the launch of a CUDA kernel does on the host, with a stand-in for the CUDA runtime."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

RUNTIME = """
#include <cuda_runtime.h>

#include <cstdio>

#include "cuda/launch.h"

static int current = 0;
static cudaError_t next_launch = cudaSuccess, next_attribute = cudaSuccess, left = cudaSuccess;

extern "C" {
cudaError_t cudaGetDevice(int* device) { *device = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { current = device; return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  std::printf("attribute %d on %d\\n", bytes, current);
  return next_attribute;
}
cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3, void** arguments, size_t shared,
                             cudaStream_t) {
  std::printf("launch %u %zu", grid.x, shared);
  if (next_launch == cudaSuccess) std::printf(": %d", *static_cast<int*>(arguments[0]));
  std::printf("\\n");
  return next_launch;
}
cudaError_t cudaGetLastError() { const cudaError_t e = left; left = cudaSuccess; return e; }
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorInvalidDevice; }
const char* cudaGetErrorName(cudaError_t e) { return e == cudaErrorInvalidValue ? "bad" : "other"; }
const char* cudaGetErrorString(cudaError_t) { return "no such thing"; }
}

static void kernel(int, double) {}
static void another(int) {}

int main() {
  using bigkernel::launch_kernel;
  const auto launch = [](int value, size_t shared) {
    try {
      launch_kernel("kernel", kernel, 7, 32, shared, nullptr, value, 2);
    } catch (const std::exception& error) {
      std::printf("%s\\n", error.what());
    }
  };
  launch(1, 48 << 10);  // what every kernel may have
  launch(2, 64 << 10);
  launch(3, 64 << 10);
  launch(4, 60 << 10);  // no more than was asked for
  launch(5, 96 << 10);
  cudaSetDevice(1);
  launch(6, 64 << 10);
  launch(7, 64 << 10);
  int value = 8;
  launch_kernel("another", reinterpret_cast<const void*>(another), 7, 32, 64 << 10, nullptr, value);
  left = cudaErrorInvalidValue;  // of someone else's, and no error of this launch
  launch(9, 0);
  next_launch = cudaErrorInvalidValue;
  launch(10, 0);
  next_attribute = cudaErrorInvalidValue;
  launch(11, 200 << 10);
  next_launch = next_attribute = cudaSuccess;
  launch(12, 200 << 10);  // asked for again after a failure
}
"""
SAID = """\
launch 7 49152: 1
attribute 65536 on 0
launch 7 65536: 2
launch 7 65536: 3
launch 7 61440: 4
attribute 98304 on 0
launch 7 98304: 5
attribute 65536 on 1
launch 7 65536: 6
launch 7 65536: 7
attribute 65536 on 1
launch 7 65536: 8
launch 7 0: 9
launch 7 0
bigkernel: launching CUDA kernel kernel with grid (7, 1, 1), block (32, 1, 1) and 0 bytes of \
shared memory failed: no such thing (bad)
attribute 204800 on 1
bigkernel: asking for 204800 bytes of shared memory for CUDA kernel kernel: no such thing (bad)
attribute 204800 on 1
launch 7 204800: 12
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_launches_are_checked_and_shared_memory_is_asked_for_once_a_device(tmp_path):
    source, program = tmp_path / "launch.cpp", tmp_path / "launch"
    source.write_text(RUNTIME)
    command = ["nvcc", "-std=c++20", "-cudart", "none", f"-I{ROOT}/csrc", source, "-o", program]
    subprocess.run(command, check=True)
    assert subprocess.check_output([program], text=True) == SAID
