// A bias and the activation after it on the GPU. For each element:
//   y = act(x + bias);  dx = dy * act'(x + bias),  dbias = the sum of dx over the rows
//
// A block of 8 warps takes 32 * kWidth columns of a chunk of rows: a lane keeps the bias and, in
// backward, the sums of its kWidth columns in registers, and the warps take rows by turns. So each
// array is read or written once, in accesses of 16 bytes a lane. The sums of the warps are added
// through shared memory (9 KB at most), those of the chunks by a second kernel, in order. Rows
// that are misaligned, or of an odd length, go element by element.
#include <algorithm>

#include "bias_act/cuda.h"
#include "common/activations.h"
#include "cuda/convert.h"
#include "cuda/launch.h"
#include "cuda/mma.h"

namespace bigkernel {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int64_t kLeastRows = 64, kMostChunks = 512;

int64_t rows_of_chunk(int64_t rows) {
  return std::max(kLeastRows, (rows + kMostChunks - 1) / kMostChunks);
}

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T at[kWidth];
};

template <class T>
__device__ void store(T* to, const Pack<T, 1>& from) {
  *to = from.at[0];
}
// In one instruction: the compiler would take the struct apart and store element by element.
template <class T, int kWidth>
__device__ void store(T* to, const Pack<T, kWidth>& from) {
  uint4 whole;
  static_assert(sizeof whole == sizeof from);
  __builtin_memcpy(&whole, &from, sizeof whole);
  st_global_v4(to, whole);
}

template <class T, int kWidth, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    bias_act_kernel(const __grid_constant__ BiasActCudaArgs call, int64_t size) {
  const BiasActArgs& a = call.args;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = (int64_t(blockIdx.x) * 32 + lane) * kWidth;
  const int64_t begin = blockIdx.y * size, stop = begin + size;
  const int64_t end = stop < call.rows ? stop : call.rows;
  float bias[kWidth] = {}, sums[kWidth] = {};
  if (column < a.dim) {
    if (a.bias != nullptr) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) bias[k] = a.bias[column + k];
    }
    device::with_activation(a.activation, [&](auto activation) {
      for (int64_t row = begin + warp; row < end; row += kWarps) {
        using Columns = Pack<T, kWidth>;
        const int64_t at = row * a.dim + column;
        const Columns x = *reinterpret_cast<const Columns*>(static_cast<const T*>(a.x) + at);
        Columns dy, y;
        if constexpr (kBackward)
          dy = *reinterpret_cast<const Columns*>(static_cast<const T*>(a.dy) + at);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          float value, slope;
          decltype(activation)::both(widen(x.at[k]) + bias[k], value, slope);
          if constexpr (kBackward) {
            value = widen(dy.at[k]) * slope;
            sums[k] += value;
          }
          y.at[k] = narrow<T>(value);
        }
        store(static_cast<T*>(a.y) + at, y);
      }
    });
  }
  if constexpr (kBackward) {
    if (call.partials == nullptr) return;
    constexpr int kPitch = 32 + 32 / kWidth;  // no two lanes in one bank, along either way
    __shared__ float of_warp[kWarps][kWidth][kPitch];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) of_warp[warp][k][lane] = sums[k];
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * kWidth; i += kThreads) {
      const int64_t to = int64_t(blockIdx.x) * 32 * kWidth + i;
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += of_warp[w][i % kWidth][i / kWidth];
      if (to < a.dim) call.partials[blockIdx.y * a.dim + to] = sum;
    }
  }
}

// dbias <- the sum of the chunks: 32 columns a block, whose warps take chunks by turns.
__global__ void __launch_bounds__(kThreads)
    bias_act_sum_kernel(const __grid_constant__ BiasActCudaArgs call, int64_t chunks) {
  __shared__ float of_warp[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t dim = call.args.dim, column = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (column < dim) {
    for (int64_t chunk = warp; chunk < chunks; chunk += kWarps)
      sum += call.partials[chunk * dim + column];
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= dim) return;
  for (int w = 1; w < kWarps; ++w) sum += of_warp[w][lane];
  call.dbias[column] = sum;
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T, int kWidth, bool kBackward>
void launch(const BiasActCudaArgs& call, void* stream) {
  const int64_t blocks = (call.args.dim + 32 * kWidth - 1) / (32 * kWidth);
  const dim3 grid(unsigned(blocks), unsigned(bias_act_chunks(call.rows)));
  launch_kernel("bias_act_kernel", bias_act_kernel<T, kWidth, kBackward>, grid, kThreads, 0, stream,
                call, rows_of_chunk(call.rows));
}

}  // namespace

int64_t bias_act_chunks(int64_t rows) {
  const int64_t size = rows_of_chunk(rows);
  return (rows + size - 1) / size;
}

void launch_bias_act(const BiasActCudaArgs& call, int device, void* stream) {
  const BiasActArgs& a = call.args;
  const bool backward = a.dy != nullptr;
  const char* op = backward ? "bias_act_bwd" : "bias_act_fwd";
  check_device(op, "bias_act_kernel", use_device(device), kSm80);
  if (a.dim > 0 && call.rows > 0) {
    with_type(a.type, [&](auto type) {
      using T = decltype(type);
      constexpr int kWide = 16 / sizeof(T);
      const bool wide =
          a.dim % kWide == 0 && is_aligned(a.x) && is_aligned(a.y) && is_aligned(a.dy);
      if (backward)
        wide ? launch<T, kWide, true>(call, stream) : launch<T, 1, true>(call, stream);
      else
        wide ? launch<T, kWide, false>(call, stream) : launch<T, 1, false>(call, stream);
    });
  }
  if (call.partials == nullptr || a.dim == 0) return;
  const unsigned grid = unsigned((a.dim + 31) / 32);
  launch_kernel("bias_act_sum_kernel", bias_act_sum_kernel, grid, kThreads, 0, stream, call,
                bias_act_chunks(call.rows));
}

}  // namespace bigkernel
