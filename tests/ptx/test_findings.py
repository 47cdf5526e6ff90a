"""Deliberately broken kernels, and what the emulator must say about each."""

import numpy as np
import pytest

from bigkernel.testing import ptx

SOURCE = r"""
#include <cuda_pipeline.h>
#define K extern "C" __global__ void

K past_end(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i] = x[i];  // <= is the mistake
}
K before_start(const float* x, float* y) { y[threadIdx.x] = x[(int)threadIdx.x - 1]; }
K wild_pointer(float* y) { y[threadIdx.x + (1LL << 40)] = 1.f; }
K past_shared(float* y) {
  extern __shared__ float s[];
  s[threadIdx.x + 1] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + 1];
}
K misaligned_global(const float* x, float4* y) {
  y[threadIdx.x] = *reinterpret_cast<const float4*>(x + threadIdx.x);
}
K misaligned_shared(float4* y) {
  extern __shared__ float s[];
  for (int j = 0; j < 4; j++) s[4 * threadIdx.x + j] = j;
  __syncthreads();
  y[threadIdx.x] = *reinterpret_cast<float4*>(s + threadIdx.x);
}
K race_read_after_write(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[63 - threadIdx.x];  // no __syncthreads()
}
K race_write_after_read(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  float v = s[63 - threadIdx.x];
  s[threadIdx.x] = v;  // others may not have read yet
  y[threadIdx.x] = v;
}
K race_write_write(float* y) {
  __shared__ float s[64];
  s[threadIdx.x / 2] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x / 2];
}
K race_within_warp(float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[31 - threadIdx.x];  // no __syncwarp()
}
K race_behind_named_barrier(float* y) {
  __shared__ float s[128];
  s[threadIdx.x] = threadIdx.x;
  asm volatile("bar.sync %0, 64;" ::"r"(1 + (int)threadIdx.x / 64) : "memory");
  y[threadIdx.x] = s[127 - threadIdx.x];  // written by the other half
}
K never_written(float* y) {
  __shared__ float s[64];
  if (threadIdx.x < 63) s[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
K barrier_in_branch(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  if (threadIdx.x < 40) __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
K barrier_after_return(float* y, int n) {
  if ((int)threadIdx.x >= n) return;
  __syncthreads();
  y[threadIdx.x] = 1.f;
}
K barrier_in_two_places(float* y) {
  if (threadIdx.x % 2) { __syncthreads(); y[threadIdx.x] = 1.f; }
  else { y[threadIdx.x] = 2.f; __syncthreads(); y[threadIdx.x] += 2.f; }
}
K shuffle_in_branch(float* y) {
  float v = y[threadIdx.x];
  if (threadIdx.x < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  y[threadIdx.x] = v;
}
K missing_wait(const float4* x, float4* y) {
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);
  __pipeline_commit();
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}
K wait_for_too_few(const float4* x, float4* y) {
  __shared__ float4 s[2][64];
  for (int j = 0; j < 2; j++) {
    __pipeline_memcpy_async(&s[j][threadIdx.x], &x[64 * j + threadIdx.x], 16);
    __pipeline_commit();
  }
  __pipeline_wait_prior(1);  // the second group is still under way
  __syncthreads();
  y[threadIdx.x] = s[1][63 - threadIdx.x];
}
K wait_without_barrier(const float4* x, float4* y) {
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[threadIdx.x] = s[63 - threadIdx.x];
}
K refill_too_early(const float4* x, float4* y) {
  __shared__ float4 s[64];
  for (int j = 0; j < 2; j++) {
    __pipeline_memcpy_async(&s[threadIdx.x], &x[64 * j + threadIdx.x], 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    y[64 * j + threadIdx.x] = s[63 - threadIdx.x];  // then the next copy overwrites it
  }
}
K copy_past_end(const float4* x, float4* y) {
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x + 1], 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[threadIdx.x] = s[threadIdx.x];
}
K gives_up(float* y) { if (y[threadIdx.x] > 0.f) __trap(); }
K endless(volatile float* y) { while (y[threadIdx.x] == 0.f) {} }
"""


@pytest.fixture(scope="module")
def module():
    return ptx.compile(SOURCE, arch="sm_80")


CASES = [
    # kernel, threads, arguments, dynamic shared memory, finding, words, thread
    ("past_end", 64, "x y 63", 0, ptx.OutOfBounds, "'x'.*", 63),
    ("before_start", 64, "x y", 0, ptx.OutOfBounds, "4 bytes before|no registered", 0),
    ("wild_pointer", 32, "y", 0, ptx.OutOfBounds, "no registered array", 0),
    ("past_shared", 64, "y", 256, ptx.OutOfBounds, "shared address 256, of 256 bytes", 63),
    ("misaligned_global", 8, "x y", 0, ptx.Misaligned, "16-byte access", 1),
    ("misaligned_shared", 8, "y", 256, ptx.Misaligned, "16-byte access at shared address 4", 1),
    ("race_read_after_write", 64, "y", 0, ptx.SharedRace, r"reads what thread \(63,0,0\) wrote", 0),
    ("race_write_after_read", 64, "y", 0, ptx.SharedRace, r"writes what thread \(63,0,0\) read", 0),
    ("race_write_write", 64, "y", 0, ptx.SharedRace, "writes another value", None),
    ("race_within_warp", 32, "y", 0, ptx.SharedRace, "reads what thread", 0),
    ("race_behind_named_barrier", 128, "y", 0, ptx.SharedRace, "reads what thread", None),
    ("never_written", 64, "y", 0, ptx.UninitializedRead, "shared address 252", 63),
    ("barrier_in_branch", 64, "y", 0, ptx.BarrierError, r"40 of 64.*\(40,0,0\) has returned", 0),
    ("barrier_after_return", 64, "y 50", 0, ptx.BarrierError, "50 of 64 threads", 0),
    ("barrier_in_two_places", 64, "y", 0, ptx.BarrierError, "in two places", None),
    ("shuffle_in_branch", 32, "y", 0, ptx.BarrierError, "0xffff0000", 0),
    ("missing_wait", 64, "x y", 0, ptx.MissingWait, r"cp.async of thread \(63,0,0\)", 0),
    ("wait_for_too_few", 64, "x y", 0, ptx.MissingWait, "not waited for", 0),
    ("wait_without_barrier", 64, "x y", 0, ptx.SharedRace, "no barrier between", 0),
    ("refill_too_early", 64, "x y", 0, ptx.SharedRace, "read, shared address", 0),
    ("copy_past_end", 64, "x y", 0, ptx.OutOfBounds, "'x'", 63),
    ("gives_up", 32, "ones", 0, ptx.Trap, "trap", 0),
    ("endless", 32, "y", 0, ptx.NoProgress, "max_steps", 0),
]


@pytest.mark.parametrize(("name", "threads", "args", "shared", "finding", "words", "thread"),
                         CASES, ids=[c[0] for c in CASES])  # fmt: skip
def test_finding(module, name, threads, args, shared, finding, words, thread):
    memory = ptx.Memory()
    length = {"past_end": 63, "copy_past_end": 256}.get(name, 1024)
    arrays = {
        "x": np.arange(length, dtype=np.float32),
        "y": np.zeros(1024, np.float32),
        "ones": np.ones(1024, np.float32),
    }
    given = [memory.register(arrays[a], a) if a in arrays else int(a) for a in args.split()]
    with pytest.raises(finding, match=words) as caught:
        module[name].launch((1,), (threads,), given, memory, shared=shared, max_steps=1000)
    message = str(caught.value)
    assert message.startswith(f"kernel {name}, block (0,0,0), thread (")
    assert "PTX line" in message
    assert "kernel.cu:" in message
    if thread is not None:
        assert f"thread ({thread},0,0), PTX line" in message


def test_launch_arguments_are_checked(module):
    memory = ptx.Memory()
    y = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="past_end takes 3 arguments, got 1"):
        module["past_end"].launch((1,), (32,), [1], memory)
    with pytest.raises(TypeError, match=r"argument 0 must be a number.*memory\.register"):
        module["gives_up"].launch((1,), (32,), [y], memory)
    with pytest.raises(ValueError, match="argument 2 must have 4 bytes, got 8"):
        module["past_end"].launch((1,), (32,), [1, 1, np.int64(1)], memory)
    with pytest.raises(ValueError, match="1024 threads, got 2048"):
        module["gives_up"].launch((1,), (2048,), [1], memory)
    with pytest.raises(ValueError, match="grid must be one to three positive numbers"):
        module["gives_up"].launch((0,), (32,), [1], memory)
    with pytest.raises(KeyError, match="kernel 'absent' is not there; kernels: past_end"):
        module["absent"]


def test_nvcc_error_is_shown():
    with pytest.raises(RuntimeError, match=r"(?s)could not compile.*undefined_name"):
        ptx.compile("__global__ void k() { undefined_name(); }\n")


def test_readonly_array(module):
    memory = ptx.Memory()
    y = memory.register(np.zeros(64, np.float32), "weights", readonly=True)
    with pytest.raises(ptx.OutOfBounds, match=r"writes 'weights' \(float32 \[64\]\), which is"):
        module["barrier_after_return"].launch((1,), (32,), [y, 32], memory)
