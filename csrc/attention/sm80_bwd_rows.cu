// What attention's backward needs of each row before the products of tiles; after them the sums of
// dk and dv over the blocks that shared a tile of keys; and the gradient of a mask that is
// broadcast along the keys.
#include "attention/sm80_bwd_mask.h"
#include "cuda/launch.h"

namespace bigkernel {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 4;  // for a row; the 8 rows of a warp write whole sectors of delta

// -lse and -delta = dlse - <dout, out> of each row, as stat_plane says, kLanes lanes a row. A row
// that sees no key has the weights e^-inf = 0.
template <class T, bool kGeneral>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_rows_kernel(const __grid_constant__ AttentionCudaArgs args) {
  constexpr int kWidth = 16 / sizeof(T);
  // A packed batch may have more rows than 32 bits count, though no sequence has.
  const int64_t rows = args.cu_q != nullptr ? args.total_q : args.max_q;
  const uint32_t blocks = uint32_t((rows + kThreads / kLanes - 1) / (kThreads / kLanes));
  const int of_head = int(blockIdx.x / blocks);
  const int b = of_head / args.heads_q, head = of_head % args.heads_q;
  const int64_t row =
      int64_t(blockIdx.x % blocks) * (kThreads / kLanes) + int(threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  if (row >= rows) return;
  const T* const out = row_pointer<T>(args.out, b, head, row);
  const T* const dout = row_pointer<T>(args.dout, b, head, row);
  float sum = 0.0f;
  for (int d = lane * kWidth; d < args.dim_v; d += kLanes * kWidth) {
    union {
      uint4 whole;
      T element[kWidth];
    } x, y;
    x.whole = y.whole = make_uint4(0, 0, 0, 0);
    if (args.aligned) {
      x.whole = *reinterpret_cast<const uint4*>(out + d);
      y.whole = *reinterpret_cast<const uint4*>(dout + d);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (d + i >= args.dim_v) continue;
        x.element[i] = out[d + i];
        y.element[i] = dout[d + i];
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      sum = fmaf(to_float(x.element[i]), to_float(y.element[i]), sum);
  }
  const uint32_t together = ((1u << kLanes) - 1) << (threadIdx.x % 32 / kLanes * kLanes);
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) sum += __shfl_xor_sync(together, sum, offset);
  if (lane != 0) return;
  constexpr float kUnit = sizeof(T) == 2 ? kLog2E : 1.0f;
  // Both at once: one by one, each would ask for the same sectors.
  const float2 lse = *reinterpret_cast<const float2*>(row_pointer<float>(args.lse, b, head, row));
  const float top = lse.x, log_sum = lse.y;
  const bool open = top != -BK_INFINITY;
  float delta = -sum;
  if (args.dlse.data != nullptr) delta += *row_pointer<float>(args.dlse, b, head, row);
  float* const to = row_pointer<float>(args.delta, b, head, row);
  to[0] = open ? (kGeneral ? -top : -(top + log_sum) * kUnit) : -BK_INFINITY;
  to[stat_plane(args)] = open ? delta : 0.0f;
  if constexpr (kGeneral) to[2 * stat_plane(args)] = -log_sum * kUnit;
}

constexpr int kSumRows = 32;

// dk and dv of kSumRows keys of a head: the sum of args.parts, split after split, 4 columns a
// thread, so that each load takes whole sectors.
template <class T>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_sum_kernel(const __grid_constant__ AttentionCudaArgs args) {
  const uint32_t blocks = uint32_t(args.max_k + kSumRows - 1) / kSumRows;
  const int head = int(blockIdx.x / blocks) % args.heads_kv;
  const DeviceSequence seq = sequence_of(args, int(blockIdx.x / blocks) / args.heads_kv);
  const AttentionParts parts(args);
  const int first = int(blockIdx.x % blocks) * kSumRows;
  const int of_dk = parts.dk_width / 4, of_row = of_dk + parts.dv_width / 4;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kSumRows * of_row; i += kThreads) {
    const int row = first + i / of_row;
    if (row >= seq.keys) break;
    const bool is_dv = i % of_row >= of_dk;
    const int column = (i % of_row - (is_dv ? of_dk : 0)) * 4;
    const int width = is_dv ? parts.dv_width : parts.dk_width;
    const float* from = (is_dv ? parts.dv : parts.dk) + column +
                        parts.row(args, seq, head * args.splits, row) * width;
    float4 sum = {};
#pragma unroll 1
    for (int split = 0; split < args.splits; ++split) {
      const float4 part = *reinterpret_cast<const float4*>(from);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      from += parts.rows * width;
    }
    struct alignas(4 * sizeof(T)) Four {
      T element[4];
    } const value{{round_to<T>(sum.x), round_to<T>(sum.y), round_to<T>(sum.z), round_to<T>(sum.w)}};
    T* const to =
        row_pointer<T>(is_dv ? args.dv : args.dk, seq.index, head, seq.first_k + row) + column;
    const int left = (is_dv ? args.dim_v : args.dim) - column;
    if (args.aligned && left >= 4) {
      *reinterpret_cast<Four*>(to) = value;
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (e < left) to[e] = value.element[e];
    }
  }
}

// A summand common to all keys of a row cancels in the softmax but shifts lse: its gradient is
// dlse, summed over the rows that share it and see any key. One warp for each element of the
// result.
__global__ void __launch_bounds__(kThreads)
    attention_bwd_mask_rows_kernel(const __grid_constant__ AttentionCudaArgs args) {
  const AttentionMask& dmask = args.dmask;
  const int batches = dmask.batch != 0 ? args.batch : 1, heads = dmask.head != 0 ? args.heads_q : 1;
  const int rows = dmask.row != 0 ? args.max_q : 1;
  const int64_t index = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (index >= int64_t(batches) * heads * rows) return;
  const int row = int(index % rows), head = int(index / rows % heads);
  const int b = int(index / rows / heads);
  const int more_heads = args.heads_q / heads, more_rows = args.max_q / rows;
  const int64_t count = int64_t(args.batch / batches) * more_heads * more_rows;
  double sum = 0.0;
  for (int64_t i = threadIdx.x % 32; i < count && args.dlse.data != nullptr; i += 32) {
    const int at_row = row + int(i % more_rows), at_head = head + int(i / more_rows % more_heads);
    const int at_b = b + int(i / more_rows / more_heads);
    const DeviceSequence s = sequence_of(args, at_b);
    if (at_row >= s.rows) continue;
    if (*row_pointer<float>(args.lse, at_b, at_head, s.first_q + at_row) != -BK_INFINITY)
      sum += *row_pointer<float>(args.dlse, at_b, at_head, s.first_q + at_row);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0)
    store_mask_gradient(dmask, b * dmask.batch + head * dmask.head + row * dmask.row, float(sum));
}

template <class T>
const void* rows_kernel(bool general) {
  return general ? reinterpret_cast<const void*>(&attention_bwd_rows_kernel<T, true>)
                 : reinterpret_cast<const void*>(&attention_bwd_rows_kernel<T, false>);
}

}  // namespace

AttentionLaunch attention_bwd_rows(DType dtype, bool general) {
  AttentionLaunch launch{};
  launch.name = "attention_bwd_rows_kernel";
  launch.kernel = dtype == DType::kFloat32    ? rows_kernel<float>(general)
                  : dtype == DType::kBFloat16 ? rows_kernel<bf16>(general)
                                              : rows_kernel<fp16>(general);
  launch.generation = kSm80;
  launch.threads = kThreads;
  launch.tile_rows = kThreads / kLanes;
  launch.general = general;
  return launch;
}

AttentionLaunch attention_bwd_sum(DType dtype) {
  AttentionLaunch launch{};
  launch.name = "attention_bwd_sum_kernel";
  with_type(dtype, [&](auto type) {
    launch.kernel = reinterpret_cast<const void*>(&attention_bwd_sum_kernel<decltype(type)>);
  });
  launch.generation = kSm80;
  launch.threads = kThreads;
  launch.tile_rows = kSumRows;
  return launch;
}

AttentionLaunch attention_bwd_mask_rows() {
  AttentionLaunch launch{};
  launch.name = "attention_bwd_mask_rows_kernel";
  launch.kernel = reinterpret_cast<const void*>(&attention_bwd_mask_rows_kernel);
  launch.generation = kSm80;
  launch.threads = kThreads;
  launch.tile_rows = kThreads / 32;
  return launch;
}

}  // namespace bigkernel
