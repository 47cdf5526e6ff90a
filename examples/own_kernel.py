"""Run a CUDA kernel of one's own without a GPU: is it right, does it keep to its arrays?

    python examples/own_kernel.py --rows 64 --columns 1000

Needs nvcc. The kernel is a softmax of rows; the second one forgets a barrier, and is caught.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from bigkernel.testing import ptx

SOURCE = """
// out[row, :] = softmax(x[row, :]); one block of 128 threads for each row
template <class Op>
__device__ float reduce(float value, float* shared, Op op) {
  shared[threadIdx.x] = value;
  for (int k = 64; k; k /= 2) {
    BARRIER;
    if (threadIdx.x < k) shared[threadIdx.x] = op(shared[threadIdx.x], shared[threadIdx.x + k]);
  }
  __syncthreads();
  float all = shared[0];
  __syncthreads();
  return all;
}

extern "C" __global__ void softmax(const float* x, float* out, int columns) {
  __shared__ float shared[128];
  x += (long long)blockIdx.x * columns;
  out += (long long)blockIdx.x * columns;
  float high = -INFINITY, sum = 0;
  for (int j = threadIdx.x; j < columns; j += 128) high = fmaxf(high, x[j]);
  high = reduce(high, shared, [](float a, float b) { return fmaxf(a, b); });
  for (int j = threadIdx.x; j < columns; j += 128) sum += expf(x[j] - high);
  sum = reduce(sum, shared, [](float a, float b) { return a + b; });
  for (int j = threadIdx.x; j < columns; j += 128) out[j] = expf(x[j] - high) / sum;
}
"""


def run(source: str, x: np.ndarray, folder: Path) -> tuple[np.ndarray, ptx.Counters]:
    path = folder / "softmax.cu"
    path.write_text(source)
    out = np.zeros_like(x)
    memory = ptx.Memory()
    args = [memory.register(x, "x", readonly=True), memory.register(out, "out"), x.shape[1]]
    kernel = ptx.compile(path, arch="sm_80")["softmax"]
    return out, kernel.launch(grid=(len(x),), block=(128,), args=args, memory=memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=1000)
    options = parser.parse_args()
    if ptx.nvcc() is None:
        sys.exit("own_kernel: nvcc is not on the path; install the CUDA toolkit.")
    x = np.random.default_rng(0).normal(size=(options.rows, options.columns)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        out, counters = run(SOURCE.replace("BARRIER", "__syncthreads()"), x, Path(folder))
        right = np.exp(x.astype(np.float64))
        error = np.abs(out - right / right.sum(1, keepdims=True)).max()
        print(f"largest error {error:.1e}; {counters.global_sectors} sectors of 32 bytes moved")
        try:
            run(SOURCE.replace("BARRIER", ""), x, Path(folder))
        except ptx.SharedRace as race:
            print(f"without the barrier: {race}")


if __name__ == "__main__":
    main()
