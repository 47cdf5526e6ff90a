// What the CUDA binding of attention hands to its launchers, and what they make of it. No torch
// header here. The formula stands in attention.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/attention.h"
#include "cuda/device.h"

namespace bigkernel {

// Travels by value in the kernels' parameters. Tensors' `first` rows come from cu_q and cu_k.
struct AttentionCudaArgs : AttentionRule {
  AttentionTensor q, k, v, out, lse;              // lse: 2 floats a row
  AttentionTensor dout, dlse, dq, dk, dv, delta;  // backward; dlse.data may be null; delta:
                                                  // fp32 scratch of three planes, stat_plane
  AttentionMask mask, dmask;                      // strides in elements, 0 where broadcast
  const float* slopes;                            // null: no ALiBi
  int64_t slopes_batch, slopes_head;              // strides
  const int64_t* seed;                            // [1], null: no dropout
  const int32_t *cu_q, *cu_k;                     // [batch + 1], null: a dense batch
  int64_t total_q, total_k;                       // packed: rows of q, of k
  DType dtype;                                    // float32, bfloat16 or float16
  int32_t batch, heads_q, heads_kv, group;
  int32_t max_q, max_k;  // rows and keys of a sequence, at most
  int32_t dim, dim_v;    // at most kAttentionMostDim
  int32_t aligned;       // every row of every tensor starts and ends at a multiple of 16 bytes
  uint32_t together;     // heads whose tiles are taken by their length (cuda_order.h)
  // dk and dv: the blocks that have a tile of keys, and the query heads of each, members * splits =
  // group. Where there are several, each leaves its sums in `parts` (AttentionParts, sm80_bwd.h).
  // Few queries: the blocks among which keys are split (FewParts, sm80_few.h); 0 for other kernels.
  int32_t splits, members;
  float* parts;
  int32_t left, right;         // -1: unlimited
  float dropout_scale;         // 1 / (1 - p), 0 if p = 1
  uint32_t dropout_threshold;  // floor(p 2^32): smaller words are dropped
};

constexpr int64_t kAttentionMostDim = 256;
constexpr int64_t kAttentionMostParts = int64_t{256} << 20;
// Positions, and sums of two of them, fit in 32 bits; a window of this size has no end.
constexpr int64_t kAttentionMostRows = int64_t{1} << 29;

// Fills the three numbers of dropout; the caller sets the seed.
inline void set_dropout(AttentionCudaArgs& args, double p) {
  args.dropout_scale = p >= 1 ? 0.0f : float(1.0 / (1.0 - p));
  args.dropout_threshold = p >= 1 ? 0 : uint32_t(p * 4294967296.0);
}

// Whether every row of a tensor of `dim` columns starts and ends at a multiple of 16 bytes, so that
// it can be moved in such pieces.
inline bool rows_aligned(const AttentionTensor& t, int64_t dim, DType dtype) {
  const auto bytes = [&](int64_t elements) { return elements * dtype_size(dtype); };
  return ((reinterpret_cast<uintptr_t>(t.data) | uintptr_t(bytes(t.batch)) |
           uintptr_t(bytes(t.head)) | uintptr_t(bytes(t.row)) | uintptr_t(bytes(dim))) &
          15) == 0;
}

// Columns of a row of args.parts, for a head of so many: whole pieces of 8.
BK_HD int32_t attention_part_width(int32_t dim) { return (dim + 7) / 8 * 8; }

// The floats of one split: dk and dv.
inline int64_t attention_bwd_part(const AttentionCudaArgs& args) {
  return (args.cu_q != nullptr ? args.total_k : int64_t{args.batch} * args.max_k) * args.heads_kv *
         (attention_part_width(args.dim) + attention_part_width(args.dim_v));
}

// What a launch will be: tests and reports read it, launches follow it.
struct AttentionLaunch {
  const char* name;
  const void* kernel;        // takes an AttentionCudaArgs
  int32_t generation;        // of GPUs that run it: this compute capability and later
  uint32_t blocks, threads;  // no blocks: nothing to do
  size_t shared;
  int32_t tile_rows, tile_keys, tile_dim;
  int32_t aligned;
  uint32_t together;
  int32_t general;  // the kernel with every feature, not the one for plain and causal attention
};

// Few queries, many keys: sm80_few.h. split_attention_fwd sets args.splits to the number of blocks
// among which keys are split, or to 0 where the kernels of launch_attention_fwd do better. For
// those, args.parts holds splits * attention_few_part(args) floats, at most kAttentionMostParts
// bytes.
constexpr int32_t kAttentionFewRows = 16, kAttentionFewKeys = 256;
void split_attention_fwd(AttentionCudaArgs& args, const DeviceTraits& device);
int64_t attention_few_part(const AttentionCudaArgs& args);
std::vector<AttentionLaunch> plan_attention_few(const AttentionCudaArgs& args,
                                                const DeviceTraits& device);
void launch_attention_few(const AttentionCudaArgs& args, int device, void* stream);

// Throw std::runtime_error, naming the kernel and why the device cannot run it, or the grid and
// CUDA's message. Launches go to `stream` (a cudaStream_t) of `device` and return at once.
AttentionLaunch plan_attention_fwd(const AttentionCudaArgs& args, const DeviceTraits& device);
void launch_attention_fwd(const AttentionCudaArgs& args, int device, void* stream);

// Backward: one launch after the other. dmask.kind says whether a mask's gradient is wanted.
//
// Before it the caller sets args.splits and args.members, as split_attention_bwd does for a device:
// where keys have fewer tiles than fill it, the query heads that share them are split among blocks,
// whose sums one more launch adds up in one order, so that each run has the same bits. For those,
// args.parts holds splits * attention_bwd_part(args) floats, at most kAttentionMostParts bytes; a
// group is split less, or not at all, where that would be more.
void split_attention_bwd(AttentionCudaArgs& args, const DeviceTraits& device);
std::vector<AttentionLaunch> plan_attention_bwd(const AttentionCudaArgs& args,
                                                const DeviceTraits& device);
void launch_attention_bwd(const AttentionCudaArgs& args, int device, void* stream);

}  // namespace bigkernel
