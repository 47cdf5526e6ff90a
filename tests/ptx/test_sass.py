"""tools/sass.py on small kernels: resources, blocks, loops, occupancy."""

import ctypes
import subprocess

import pytest

from bigkernel.testing import ptx
from tools import sass

SOURCE = """
#include <mma.h>
extern "C" __global__ void stream(float4* y, const float4* x, const int* table, int n) {
  int skip = 0;
  for (int k = 0; table[k] < n; ++k) skip += table[k];  // narrow loads
  for (int i = skip + threadIdx.x; i < n; i += blockDim.x) {
    float4 v = x[i];
    v.x = sqrtf(v.x) / v.y;  // both call a slow path
    y[i] = v;
  }
}
extern "C" __global__ void product(half* c, const half* a, const half* b, int n, int again) {
  using namespace nvcuda::wmma;
  fragment<accumulator, 16, 16, 16, half> sum;
  fill_fragment(sum, half(0));
  for (int r = 0; r < again; ++r)
#pragma unroll 1
    for (int k = 0; k < n; k += 16) {
      fragment<matrix_a, 16, 16, 16, half, row_major> x;
      fragment<matrix_b, 16, 16, 16, half, row_major> y;
      load_matrix_sync(x, a + k, n);
      load_matrix_sync(y, b + k * 16, 16);
      mma_sync(sum, x, y, sum);
    }
  store_matrix_sync(c, sum, 16, mem_row_major);
}
extern "C" __global__ void multiply(float* c, const float4* a, int n) {
  extern __shared__ float4 s[];
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = a[i];
  __syncthreads();
  float sum = 0;
#pragma unroll 4
  for (int i = 0; i < n; ++i) sum = fmaf(s[i].x, s[i].y, sum);
  c[threadIdx.x] = sum;
}
extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* x, int n) {
  float v[64];
#pragma unroll
  for (int k = 0; k < 64; ++k) v[k] = x[k * 1024 + threadIdx.x];
#pragma unroll 1
  for (int i = 0; i < n; ++i)
#pragma unroll
    for (int k = 0; k < 64; ++k) v[k] = v[k] * v[(k + 7) % 64] + x[i];
#pragma unroll
  for (int k = 0; k < 64; ++k) x[k * 1024 + threadIdx.x] = v[k];
}
extern "C" __global__ void choose(int* x, int which) {
  __shared__ int s[100];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  switch (which) {
    case 0: x[0] = s[1] * 3; break;
    case 1: x[1] = s[2] + 7; for (int i = 0; i < s[0]; ++i) x[i * s[1]] = i; break;
    case 2: x[2] = s[3] ^ s[4]; break;
    case 3: x[3] = atomicAdd(x, 5); break;
    case 4: x[4] = s[7] / s[8]; break;
    case 5: x[5] = __popc(s[9]); break;
    default: x[6] = 1;
  }
}
"""


@pytest.fixture(scope="module")
def built():
    """(cubin, resources) of the kernels above."""
    return sass.assemble(ptx.compile(SOURCE).text, "sm_80")


@pytest.fixture(scope="module")
def kernels(built):
    return sass.disassemble(built[0])


def test_resources_are_read_from_ptxas_and_from_the_cubin(built):
    cubin, from_log = built
    assert set(from_log) == {"stream", "product", "multiply", "spill", "choose"}
    assert from_log["choose"].shared == 400
    assert from_log["spill"].registers == 32
    assert from_log["spill"].spill_stores > 0
    assert from_log["spill"].spill_loads > 0
    assert from_log["stream"].spill_loads == 0
    for name, theirs in sass.resources(cubin).items():
        mine = from_log[name]
        assert (theirs.registers, theirs.stack) == (mine.registers, mine.stack)
        assert theirs.shared == mine.shared


def test_one_entry_can_be_assembled_alone():
    cubin, resources = sass.assemble(ptx.compile(SOURCE).text, "sm_86", entry="choose")
    assert set(resources) == {"choose"}
    assert "choose" in sass.disassemble(cubin)


def test_ptxas_message_comes_through():
    with pytest.raises(RuntimeError, match="ptxas failed"):
        sass.assemble(".version 8.0\n.target sm_80\nnonsense\n", "sm_80")


def test_streaming_main_loop_is_the_one_with_wide_loads(kernels):
    loop = kernels["stream"].main_loop
    assert len(kernels["stream"].loops) == 2
    assert (loop.widest, loop.loaded, loop.matrix, loop.local) == (16, 16, 0, 0)
    assert loop.names["STG"] == 1
    assert loop.names["MUFU"] >= 2
    assert 20 < len(loop) < len(kernels["stream"].code)


def test_main_loop_without_products_is_the_one_that_computes(kernels):
    loop = kernels["multiply"].main_loop
    assert len(kernels["multiply"].loops) >= 2
    assert (loop.arithmetic, loop.names["FFMA"], loop.loaded) == (4, 4, 0)


def test_matrix_main_loop_is_the_innermost(kernels):
    kernel = kernels["product"]
    nested = sorted(kernel.loops, key=len)
    assert nested[0] < nested[-1]
    assert kernel.main_loop.instructions == kernel.part(nested[0]).instructions
    assert kernel.main_loop.matrix == kernel.code.matrix == 2
    assert kernel.main_loop.names["HMMA"] == 2


def test_spills_inside_the_loop_are_seen(kernels):
    assert kernels["spill"].main_loop.local > 10
    assert kernels["stream"].code.local == 0


def test_a_jump_table_reaches_its_cases(kernels):
    kernel = kernels["choose"]
    assert kernel.code.names["BRX"] >= 1
    assert kernel.code.names["ATOMG"] == 1
    assert len(kernel.loops) == 3  # the loop of case 1, unrolled, and what is left over twice
    for blocks in (k.blocks for k in kernels.values()):
        for block in blocks:
            ends = [i for i in block if i.name in ("EXIT", "BRX", "RET") and not i.conditional]
            assert ends in ([], block[-1:])


def test_natural_loops():
    # 0 -> 1 <-> 2, 2 -> 3 -> 1 (same head), 3 -> 4 -> 4, 4 -> 5
    loops = sass.natural_loops([[1], [2], [1, 3], [1, 4], [4, 5], []])
    assert set(loops) == {frozenset({1, 2, 3}), frozenset({4})}
    assert sass.natural_loops([[]]) == []


def test_width_of_an_access():
    for opcode, width in [("LDG.E.128", 16), ("LDG.E.U16.CONSTANT", 2), ("LDG.E", 4),
                          ("LDGSTS.E.BYPASS.LTC128B.128", 16), ("LDG.E.64.CONSTANT", 8),
                          ("LDG.E.U8", 1)]:  # fmt: skip
        assert sass.width(sass.Instruction(opcode, "")) == width


def test_a_missing_tool_is_named():
    with pytest.raises(FileNotFoundError, match="nvnothing is neither in the CUDA toolkit"):
        sass.find_tool("nvnothing")


OCCUPANCY = """
#include <cuda_occupancy.h>
extern "C" int blocks(int major, int minor, int warps, int per_sm, int per_block, int registers,
                      int threads, int shared) {
  cudaOccDeviceProp p;
  p.computeMajor = major; p.computeMinor = minor; p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiprocessor = warps * 32; p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.warpSize = 32; p.sharedMemPerBlock = 49152; p.sharedMemPerMultiprocessor = per_sm;
  p.numSms = 100; p.sharedMemPerBlockOptin = per_block; p.reservedSharedMemPerBlock = 1024;
  cudaOccFuncAttributes f;
  f.maxThreadsPerBlock = 1024; f.numRegs = registers; f.sharedSizeBytes = 0;
  f.maxDynamicSharedSizeBytes = per_block; f.numBlockBarriers = 1;
  f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  cudaOccDeviceState state;
  state.carveoutConfig = 100;  // percent
  cudaOccResult result;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &f, &state, threads, shared)) return -1;
  return result.activeBlocksPerMultiprocessor;
}
"""


@pytest.fixture(scope="module")
def nvidia(tmp_path_factory):
    """NVIDIA's own calculation, from the toolkit's header."""
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "occupancy.cpp").write_text(OCCUPANCY)
    command = [ptx.nvcc(), "-shared", "-cudart", "none", "-Xcompiler", "-fPIC", "occupancy.cpp"]
    subprocess.run([*command, "-o", "occupancy.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "occupancy.so"))


@pytest.mark.parametrize("arch", sass.LIMITS)
def test_occupancy_is_nvidias(nvidia, arch):
    limits = sass.LIMITS[arch]
    capability = divmod(int(arch[3:]), 10)
    for threads in (32, 96, 128, 256, 384, 1024):
        for registers in (16, 40, 48, 61, 64, 128, 168, 255):
            for shared in (0, 1000, 16384, 33000, 49152, 66000, 99 << 10, 100 << 10, 163 << 10):
                given = (registers, threads, shared)
                there = (limits.warps, limits.shared, limits.shared_per_block)
                theirs = nvidia.blocks(*capability, *there, *given)
                blocks, share = sass.occupancy(arch, *given)
                assert blocks == theirs, (arch, given)
                assert share == blocks * -(-threads // 32) / limits.warps


def test_devices_of_the_emulator_have_the_limits_of_their_architecture():
    assert {f"sm_{device.capability}" for device in ptx.DEVICES.values()} >= {*sass.LIMITS}
    for device in ptx.DEVICES.values():
        if limits := sass.LIMITS.get(f"sm_{device.capability}"):
            assert device.shared_per_block == limits.shared_per_block
