// CPU binding of attention: checks, allocation, and the order of the parallel phases.
//
// Forward: pack keys and values once, then blocks of query rows. Backward: convert q and dout, then
// runs of keys (dk, dv and shares of dq), then the sum of the shares; on request the mask's
// gradient. Units (a key head of a sequence) are taken in rounds, so that packed copies stay
// bounded.
#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "attention/attention.h"
#include "attention/binding.h"
#include "cpu/parallel.h"

// Where there is AMX, attention in bf16 has a copy of its own.
#define BK_ATTENTION(function) BK_CALL_PRODUCTS(a.dtype == DType::kBFloat16, function)

namespace bigkernel {
namespace {

// Packed copies of one round. Forward: 2 MB a thread, so that they are still in its L2 cache when
// they are used. Backward holds more per row, and needs some units to balance.
constexpr int64_t kForwardFloatsPerThread = int64_t{512} << 10;
constexpr int64_t kBackwardFloatsPerThread = int64_t{1} << 20;
constexpr int64_t kMostChunks = 8;     // copies of dq
constexpr int64_t kTilesOfAChunk = 2;  // at least

// Cache-line aligned, never initialised.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(floats == 0 ? nullptr
                            : static_cast<float*>(::operator new(size_t(floats) * sizeof(float),
                                                                 std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(memory_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return memory_; }

 private:
  float* memory_;
};

// Calls f(item, scratch of this worker) for 0..n; idle workers take the next items. Of very many,
// a few at a time: neighbours lie side by side in memory.
template <class F>
void hand_out(int64_t n, const Scratch& scratch, int64_t scratch_floats, const F& f) {
  const int64_t at_once = std::max<int64_t>(1, n / (32 * thread_count()));
  std::atomic<int64_t> next{0};
  parallel_for(thread_count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i; (i = next.fetch_add(at_once, std::memory_order_relaxed)) < n;)
        for (const int64_t stop = std::min(n, i + at_once); i < stop; ++i)
          f(i, scratch.get() + worker * scratch_floats);
  });
}

// Everything that AttentionArgs points to.
struct Call {
  AttentionArgs args{};
  std::vector<AttentionSequence> sequences;
  std::vector<AttentionUnit> units;
  std::vector<float> slopes;
  std::vector<int64_t> out_sizes, lse_sizes;
  bool packed = false;
};

// The bounds of the sequences; their lengths are the one thing that is in memory.
std::vector<int64_t> read_cu_seqlens(const char* op, const char* name, const Tensor& cu,
                                     int64_t total, int64_t longest) {
  const int32_t* p = static_cast<const int32_t*>(cu.data_ptr());
  std::vector<int64_t> bounds(p, p + cu.size(0));
  BK_CHECK(bounds.front() == 0, op, name, " must start with 0, got ", bounds.front());
  for (size_t i = 1; i < bounds.size(); ++i) {
    BK_CHECK(bounds[i] >= bounds[i - 1], op, name, " must not decrease, got ", bounds[i], " after ",
             bounds[i - 1]);
    BK_CHECK(bounds[i] - bounds[i - 1] <= longest, op, "the longest sequence of ", name, " has ",
             bounds[i] - bounds[i - 1], " tokens, more than the max_seqlen given, ", longest);
  }
  BK_CHECK(bounds.back() == total, op, name, " must end with the number of packed tokens, ", total,
           ", got ", bounds.back());
  return bounds;
}

std::vector<float> read_slopes(const char* op, const AttentionProblem& p, const Tensor& slopes) {
  const int64_t rows = slopes.dim() == 2 ? p.batch : 1;
  std::vector<float> read(size_t(rows * p.heads_q));
  with_float_dtype(dtype_of(slopes, op, "alibi_slopes"), op, "alibi_slopes", [&](auto tag) {
    using T = decltype(tag);
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t h = 0; h < p.heads_q; ++h)
        read[size_t(b * p.heads_q + h)] = to_float(
            static_cast<const T*>(slopes.data_ptr())[b * p.slopes_batch + h * p.slopes_head]);
  });
  return read;
}

// The keys up to the last one that a boolean mask of padding leaves open, one that is the same for
// all rows and heads. What comes after it then costs nothing, and changes no bit of the rest.
int64_t open_keys(const AttentionMask& mask, int64_t b, int64_t keys) {
  if (mask.kind != MaskKind::kBool || mask.head != 0 || mask.row != 0) return keys;
  const uint8_t* open = static_cast<const uint8_t*>(mask.data) + b * mask.batch;
  while (keys > 0 && open[(keys - 1) * mask.col] == 0) --keys;
  return keys;
}

Call prepare(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
             const AttentionOptions& o) {
  const AttentionProblem p = check_problem(op, q, k, v, o);
  Call call;
  call.packed = p.packed;
  if (p.packed) {
    const auto q_bounds = read_cu_seqlens(op, "cu_seqlens_q", *o.cu_q, q.size(0), o.max_q);
    const auto k_bounds = read_cu_seqlens(op, "cu_seqlens_k", *o.cu_k, k.size(0), o.max_k);
    for (size_t b = 0; b + 1 < q_bounds.size(); ++b) {
      const int64_t keys = k_bounds[b + 1] - k_bounds[b];
      call.sequences.push_back({int64_t(b), q_bounds[b], k_bounds[b], q_bounds[b + 1] - q_bounds[b],
                                open_keys(p.mask, 0, keys), keys});
    }
  } else {
    for (int64_t b = 0; b < q.size(0); ++b)
      call.sequences.push_back({b, 0, 0, q.size(2), open_keys(p.mask, b, k.size(2)), k.size(2)});
  }
  AttentionArgs& a = call.args;
  static_cast<AttentionRule&>(a) = p.rule;
  a.dtype = p.dtype;
  a.heads_q = p.heads_q;
  a.heads_kv = p.heads_kv;
  a.group = p.group;
  a.dim = p.dim;
  a.dim_v = p.dim_v;
  a.batch = p.batch;
  a.q = p.q;
  a.k = p.k;
  a.v = p.v;
  a.mask = p.mask;
  // Far beyond any length, but far enough from overflow.
  constexpr int64_t kFar = int64_t{1} << 60;
  a.left = std::min(p.left, kFar);
  a.right = std::min(p.right, kFar);
  if (o.slopes.has_value()) {
    call.slopes = read_slopes(op, p, *o.slopes);
    a.slopes_batch = o.slopes->dim() == 2 ? a.heads_q : 0;
  }
  a.dropout_p = o.dropout_p;
  if (o.dropout_p > 0) a.seed = uint64_t(*static_cast<const int64_t*>(o.seed->data_ptr()));
  call.out_sizes = p.out_sizes;
  call.lse_sizes = p.lse_sizes;
  return call;
}

// Fixes what points into the Call, once it lies where it stays.
void settle(Call& call) {
  call.args.sequences = call.sequences.data();
  call.args.units = call.units.data();
  call.args.slopes = call.slopes.empty() ? nullptr : call.slopes.data();
}

struct Round {
  int64_t first, last;  // units
  int64_t tiles, rows;
};

// Every key head of every sequence that has rows or keys, the longest first, so that short work is
// left for the end; cut into rounds whose packed copies take about so many floats.
std::vector<Round> plan_rounds(Call& call, int64_t block_k, int64_t floats, int64_t floats_per_tile,
                               int64_t floats_per_row) {
  const AttentionArgs& a = call.args;
  std::vector<int64_t> order(call.sequences.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
    const AttentionSequence &s = call.sequences[size_t(x)], &t = call.sequences[size_t(y)];
    return s.rows * s.keys > t.rows * t.keys;
  });
  std::vector<Round> rounds;
  for (const int64_t s : order) {
    const AttentionSequence& seq = call.sequences[size_t(s)];
    if (seq.rows == 0 && seq.keys == 0) continue;
    const int64_t tiles = (seq.keys + block_k - 1) / block_k;
    const int64_t rows = a.group * ((seq.rows + 1) / 2 * 2);  // a pair of rows is of one head
    for (int64_t h = 0; h < a.heads_kv; ++h) {
      const int64_t used = rounds.empty() ? 0
                                          : rounds.back().tiles * floats_per_tile +
                                                rounds.back().rows * floats_per_row;
      if (rounds.empty() || used + tiles * floats_per_tile + rows * floats_per_row > floats)
        rounds.push_back({int64_t(call.units.size()), int64_t(call.units.size()), 0, 0});
      Round& round = rounds.back();
      call.units.push_back({s, h, round.tiles, round.rows});
      round.tiles += tiles;
      round.rows += rows;
      ++round.last;
    }
  }
  return rounds;
}

// Blocks of query rows of a round; the last rows of a head, which under a causal mask see most,
// first.
std::vector<AttentionBlock> blocks_of(const Call& call, const Round& round, int64_t block_q) {
  std::vector<AttentionBlock> blocks;
  for (int64_t u = round.first; u < round.last; ++u) {
    const int64_t rows = call.sequences[size_t(call.units[size_t(u)].sequence)].rows;
    for (int64_t member = 0; member < call.args.group; ++member)
      for (int64_t begin = (rows - 1) / block_q * block_q; rows > 0 && begin >= 0; begin -= block_q)
        blocks.push_back({u, member, begin});
  }
  return blocks;
}

std::tuple<Tensor, Tensor> attention_fwd_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const AttentionOptions& options) {
  constexpr const char* op = "attention_fwd";
  Call call = prepare(op, q, k, v, options);
  AttentionArgs& a = call.args;
  Tensor out = empty_like_layout(q, a.dim_v);
  Tensor lse = empty_tensor(q, in_two(call.lse_sizes), ScalarType::Float);
  a.out = view(out, call.packed);
  a.lse = view_lse(lse, call.packed);

  const AttentionPlan plan = BK_ATTENTION(attention_plan)(a.dtype, a.dim, a.dim_v, false);
  // Where each head has a single block, its tiles are used once, and packed by who uses them.
  bool reused = a.group > 1;
  for (const AttentionSequence& seq : call.sequences) reused |= seq.rows > plan.block_q;
  const std::vector<Round> rounds =
      plan_rounds(call, plan.block_k, thread_count() * kForwardFloatsPerThread,
                  reused ? plan.tile_floats : 0, 0);
  settle(call);
  const Scratch scratch(thread_count() * plan.scratch_floats);
  int64_t most_tiles = 0;
  for (const Round& round : rounds) most_tiles = std::max(most_tiles, round.tiles);
  const Scratch packed(reused ? most_tiles * plan.tile_floats : 0);
  a.packed_kv = packed.get();
  for (const Round& round : rounds) {
    if (reused) {
      // The heads of a sequence side by side, as their rows often lie in memory.
      std::vector<std::pair<int64_t, int64_t>> tiles;
      for (int64_t u = round.first, end; u < round.last; u = end) {
        const int64_t sequence = call.units[size_t(u)].sequence;
        for (end = u; end < round.last && call.units[size_t(end)].sequence == sequence;) ++end;
        for (int64_t t = 0; t * plan.block_k < call.sequences[size_t(sequence)].keys; ++t)
          for (int64_t head = u; head < end; ++head) tiles.emplace_back(head, t);
      }
      parallel_for(int64_t(tiles.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          BK_ATTENTION(attention_pack)(a, tiles[size_t(i)].first, tiles[size_t(i)].second);
      });
    }
    const std::vector<AttentionBlock> blocks = blocks_of(call, round, plan.block_q);
    hand_out(int64_t(blocks.size()), scratch, plan.scratch_floats, [&](int64_t i, float* mine) {
      BK_ATTENTION(attention_fwd_block)(a, blocks[size_t(i)], mine);
    });
  }
  return {out, lse};
}

// The gradient of the mask, of its shape and dtype.
Tensor mask_gradient(const Call& call, const Tensor& mask, const AttentionPlan& plan) {
  std::vector<int64_t> sizes(mask.sizes().begin(), mask.sizes().end());
  Tensor dmask = empty_tensor(mask, sizes);
  AttentionArgs a = call.args;
  if (dmask.numel() == 0) return dmask;
  if (a.heads_q == 0 || a.batch == 0) {
    torch::stable::zero_(dmask);
    return dmask;
  }
  a.dmask = view_mask("attention_bwd", dmask, mask, sizes);
  const bool by[4] = {sizes[0] > 1, sizes[1] > 1, sizes[2] > 1, sizes[3] > 1};
  std::vector<AttentionMaskTile> tiles;
  for (int64_t b = 0; b < sizes[0]; ++b)
    for (int64_t h = 0; h < sizes[1]; ++h)
      for (int64_t row = 0; row < sizes[2]; row += plan.block_q)
        for (int64_t col = 0; col < sizes[3]; col += plan.block_k)
          tiles.push_back({by[0] ? b : -1, by[1] ? h : -1, by[2] ? row : -1, by[3] ? col : -1,
                           std::min(sizes[2] - row, plan.block_q),
                           std::min(sizes[3] - col, plan.block_k)});
  const Scratch scratch(thread_count() * plan.scratch_floats_mask);
  hand_out(int64_t(tiles.size()), scratch, plan.scratch_floats_mask, [&](int64_t i, float* mine) {
    BK_ATTENTION(attention_bwd_mask)(a, tiles[size_t(i)], mine);
  });
  return dmask;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd_cpu(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const AttentionOptions& options,
    bool needs_dmask) {
  constexpr const char* op = "attention_bwd";
  Call call = prepare(op, q, k, v, options);
  AttentionArgs& a = call.args;
  const Tensor dout_rows = check_backward(op, dout, dlse, q, out, lse, call.out_sizes,
                                          call.lse_sizes, a.mask.kind, needs_dmask);
  if (dlse.has_value()) a.dlse = view_lse(*dlse, call.packed);
  Tensor dq = empty_like_layout(q, a.dim);
  Tensor dk = empty_like_layout(k, a.dim);
  Tensor dv = empty_like_layout(v, a.dim_v);
  for (const AttentionSequence& seq : call.sequences) {
    if (seq.keys == seq.all_keys) continue;
    for (Tensor* t : {&dk, &dv}) torch::stable::zero_(*t);  // those of the padding are not written
    break;
  }
  a.out = view(out, call.packed);
  a.dout = view(dout_rows, call.packed);
  a.lse = view_lse(lse, call.packed);
  a.dq = view(dq, call.packed);
  a.dk = view(dk, call.packed);
  a.dv = view(dv, call.packed);

  const AttentionPlan plan = BK_ATTENTION(attention_plan)(a.dtype, a.dim, a.dim_v, true);
  const auto tiles_of = [&](int64_t keys) { return (keys + plan.block_k - 1) / plan.block_k; };
  // Work items of a head, each with a dq of its own. Their number follows from the sequence alone:
  // the order in which dq is summed, and so its bits, do not depend on what else is in the batch.
  const auto chunks_of = [&](int64_t keys) {
    return std::clamp(tiles_of(keys) / kTilesOfAChunk, int64_t{1}, kMostChunks);
  };
  const auto keys_of = [&](int64_t unit) {
    return call.sequences[size_t(call.units[size_t(unit)].sequence)].keys;
  };
  int64_t most_keys = 0;
  for (const AttentionSequence& seq : call.sequences) most_keys = std::max(most_keys, seq.keys);
  const int64_t most_chunks = chunks_of(most_keys);
  const std::vector<Round> rounds =
      plan_rounds(call, plan.block_k, thread_count() * kBackwardFloatsPerThread, 0,
                  (2 + most_chunks) * plan.ld_q + 2 * plan.ld_v + 1);
  settle(call);
  int64_t most_rows = 0;
  for (const Round& round : rounds) most_rows = std::max(most_rows, round.rows);
  const Scratch scratch(thread_count() * plan.scratch_floats);
  const Scratch packed_q(most_rows * plan.ld_q), packed_do(most_rows * plan.ld_v);
  const int64_t pairs = plan.pack == 1 ? 0 : most_rows / plan.pack;
  const Scratch paired_q(pairs * plan.ld_q), paired_do(pairs * plan.ld_v);
  const Scratch delta(most_rows), partial_dq(most_rows * plan.ld_q * most_chunks);
  a.packed_q = packed_q.get();
  a.packed_do = packed_do.get();
  a.paired_q = pairs == 0 ? a.packed_q : paired_q.get();
  a.paired_do = pairs == 0 ? a.packed_do : paired_do.get();
  a.delta = delta.get();
  a.partial_dq = partial_dq.get();
  for (const Round& round : rounds) {
    a.round_rows = round.rows;
    const std::vector<AttentionBlock> blocks = blocks_of(call, round, plan.block_q);
    parallel_for(int64_t(blocks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        BK_ATTENTION(attention_bwd_prepare)(a, blocks[size_t(i)]);
    });
    std::vector<AttentionChunk> runs;
    for (int64_t u = round.first; u < round.last; ++u) {
      const int64_t tiles = tiles_of(keys_of(u)), chunks = chunks_of(keys_of(u));
      for (int64_t c = 0; c < chunks; ++c)
        runs.push_back({u, c, tiles * c / chunks, tiles * (c + 1) / chunks});
    }
    hand_out(int64_t(runs.size()), scratch, plan.scratch_floats, [&](int64_t i, float* mine) {
      BK_ATTENTION(attention_bwd_keys)(a, runs[size_t(i)], mine);
    });
    parallel_for(int64_t(blocks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const AttentionBlock& block = blocks[size_t(i)];
        BK_ATTENTION(attention_bwd_queries)(a, block, chunks_of(keys_of(block.unit)));
      }
    });
  }
  Tensor dmask = needs_dmask ? mask_gradient(call, *options.mask, plan) : empty_tensor(q, {0});
  return {dq, dk, dv, dmask};
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CPU, m) {
  m.impl("attention_fwd", BK_BOX(bigkernel::attention_fwd_cpu));
  m.impl("attention_bwd", BK_BOX(bigkernel::attention_bwd_cpu));
}
