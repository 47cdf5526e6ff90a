// Adam on the GPU. For each element (names as in adam.h):
//   g = grad * grad_factor + l2 * x;  m += weight1 * (g - m);  v += weight2 * (g^2 - v)
//   x -= decay * x + step_size * m / (sqrt(max(v, vmax)) + eps)
//
// The list of tensors travels by value, in the kernel's parameters (at most 32 KB): no copy to the
// device, nothing to keep alive, so the launches can be captured in a graph as they are. A list of
// up to kTensors tensors of one combination of dtypes takes three launches:
//   adam_norm_kernel     only if clipping: sums of squares, one per block
//   adam_prepare_kernel  norm, whether to skip, step counts, the scalars of each tensor
//   adam_update_kernel   one block for each chunk of kChunk elements
// No shared memory beyond the reductions' 32 doubles. Each thread moves 4 elements at a time
// (16 bytes of fp32, 8 of a 16-bit type; 8 elements where all arrays are 16-bit), so a warp's
// access covers whole sectors. Misaligned tensors and tails go element by element.
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "adam/cuda.h"
#include "common/philox.h"
#include "cuda/convert.h"
#include "cuda/launch.h"
#include "cuda/reduce.h"

namespace bigkernel {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;
constexpr int kTensors = 384;       // in one update or prepare launch: 384 * 76 bytes of parameters
constexpr int kNormTensors = 1024;  // 1024 * 24 bytes
constexpr int kNormBlocks = 512;    // at most, so that one block can add up what they found
constexpr int kGroups = 64;
constexpr float kLargest = 3.402823466e38f;

template <class Entry, int kCapacity>
struct Table {
  int32_t count;
  uint32_t chunks;
  Entry entry[kCapacity];
  uint32_t first[kCapacity];  // chunks of the entries before

  // The entry that holds this chunk.
  __device__ int find(uint32_t chunk) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first[middle] <= chunk)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
};

struct NormEntry {
  const void* grad;  // [numel]
  int64_t numel;
  int32_t aligned;
};

struct UpdateEntry {
  void* param;           // [numel]
  const void* grad;      // [numel]
  void* exp_avg;         // [numel]
  void* exp_avg_sq;      // [numel]
  void* max_exp_avg_sq;  // [numel] or null
  float* master;         // [numel] or null
  int64_t numel;
  uint32_t index;
  int32_t aligned;
};

struct PrepareEntry {
  float* step;  // [1]
  uint32_t index;
  int32_t group;
};

struct PrepareTable {
  int32_t count, first_group;
  PrepareEntry entry[kTensors];
  AdamDeviceGroup group[kGroups];
};

// kWidth elements that are moved by accesses of at most 16 bytes.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Pack {
  T at[kWidth];
};

template <int kWidth, class T>
__device__ void load(const T* p, int64_t i, float (&out)[kWidth]) {
  const auto pack = *reinterpret_cast<const Pack<T, kWidth>*>(p + i);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) out[k] = widen(pack.at[k]);
}

template <int kWidth, class T>
__device__ void store(T* p, int64_t i, const float (&in)[kWidth]) {
  Pack<T, kWidth> pack;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) pack.at[k] = narrow<T>(in[k]);
  *reinterpret_cast<Pack<T, kWidth>*>(p + i) = pack;
}

// To 1 and 2 ulp; what rounds exactly calls a slow path that costs a third of the loop's
// instructions and spills registers. x itself, at whose scale steps count, is still rounded once.
__device__ float root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ float divide(float x, float y) { return __fdividef(x, y); }  // y below 2^126

__device__ double read(DeviceScalar s, double otherwise) {
  if (s.data == nullptr) return otherwise;
  return s.is_double ? *static_cast<const double*>(s.data)
                     : double(*static_cast<const float*>(s.data));
}

using NormTable = Table<NormEntry, kNormTensors>;
static_assert(sizeof(NormTable) <= 32000, "kernel parameters end at 32,764 bytes");

template <class G>
__global__ void __launch_bounds__(kThreads)
    adam_norm_kernel(const __grid_constant__ NormTable table, double* partials) {
  double total = 0;
  for (uint32_t chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
    const int which = table.find(chunk);
    const int64_t begin = int64_t(chunk - table.first[which]) * kChunk;
    const int64_t numel = table.entry[which].numel;
    const int n = int(numel - begin < kChunk ? numel - begin : kChunk);
    const G* grad = static_cast<const G*>(table.entry[which].grad) + begin;
    const int vectors = table.entry[which].aligned ? n / 4 * 4 : 0;
    float sum = 0;
    bool zero = true;
    for (int i = 4 * threadIdx.x; i < vectors; i += 4 * kThreads) {
      float g[4];
      load<4>(grad, i, g);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sum = fmaf(g[k], g[k], sum);
        zero &= g[k] == 0;
      }
    }
    for (int i = vectors + threadIdx.x; i < n; i += kThreads) {
      const float g = widen(grad[i]);
      sum = fmaf(g, g, sum);
      zero &= g == 0;
    }
    double squares = sum;
    // Where fp32 overflowed, or lost digits to underflow, this thread's elements again in fp64.
    if (!zero && !(sum > 1e-30f && sum <= kLargest)) {
      squares = 0;
      for (int i = 4 * threadIdx.x; i < vectors; i += 4 * kThreads)
        for (int k = 0; k < 4; ++k) squares += double(widen(grad[i + k])) * widen(grad[i + k]);
      for (int i = vectors + threadIdx.x; i < n; i += kThreads)
        squares += double(widen(grad[i])) * widen(grad[i]);
    }
    total += squares;
  }
  total = block_sum<kThreads>(total);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// The norm over all partial sums; every thread of the block takes part and gets it.
__device__ double norm_of(const AdamDeviceCall& call) {
  double sum = 0;
  for (int i = threadIdx.x; i < call.partial_count; i += kThreads) sum += call.partials[i];
  return sqrt(block_sum<kThreads>(sum)) / read(call.grad_scale, 1.0);
}

__global__ void __launch_bounds__(kThreads)
    adam_finish_kernel(const __grid_constant__ AdamDeviceCall call) {
  const double norm = norm_of(call);
  if (threadIdx.x == 0) *call.norm = float(norm);
}

static_assert(sizeof(PrepareTable) + sizeof(AdamDeviceCall) <= 32000,
              "kernel parameters end at 32,764 bytes");

// One thread per tensor; every block works out the norm for itself, in the same order.
__global__ void __launch_bounds__(kThreads)
    adam_prepare_kernel(const __grid_constant__ PrepareTable table,
                        const __grid_constant__ AdamDeviceCall call) {
  double factor = 1.0 / read(call.grad_scale, 1.0);
  bool skip = read(call.found_inf, 0.0) != 0.0;
  if (call.max_norm >= 0) {
    const double exact = call.total_norm.data ? read(call.total_norm, 0.0) : norm_of(call);
    const double norm = float(exact);
    factor *= fmin(call.max_norm / (norm + 1e-6), 1.0);
    skip |= !isfinite(norm);
    if (blockIdx.x == 0 && threadIdx.x == 0) *call.norm = float(exact);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) call.control->skip = skip;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (skip || i >= table.count) return;

  const PrepareEntry& entry = table.entry[i];
  const AdamDeviceGroup& group = table.group[entry.group - table.first_group];
  const float count = *entry.step + 1.0f;
  *entry.step = count;
  const double step = count, lr = read(group.lr, group.host.lr);
  const double root = sqrt(1.0 - pow(group.host.beta2, step));
  const bool decoupled = group.host.flags & kDecoupled;
  AdamScalars s;
  s.grad_factor = float(group.host.flags & kMaximize ? -factor : factor);
  s.weight1 = float(1.0 - group.host.beta1);
  s.weight2 = float(1.0 - group.host.beta2);
  s.step_size = float(lr * root / (1.0 - pow(group.host.beta1, step)));
  s.eps = float(group.host.eps * root);
  s.l2 = decoupled ? 0.0f : float(group.host.weight_decay);
  s.decay = decoupled ? float(lr * group.host.weight_decay) : 0.0f;
  s.amsgrad = group.host.flags & kAmsgrad;
  s.stochastic = call.seed != nullptr;
  s.step = uint32_t(count);
  s.seed = call.seed ? uint64_t(*call.seed) : 0;
  call.scalars[entry.index] = s;
}

using UpdateTable = Table<UpdateEntry, kTensors>;
static_assert(sizeof(UpdateTable) <= 32000, "kernel parameters end at 32,764 bytes");

// Up or down at random, so that the mean is kept: the bits below bf16's plus 16 random ones carry
// into it or not. Element e takes the (e mod 8)-th 16-bit half of its block of eight's four words.
template <int kWidth>
__device__ void store_stochastically(bf16* p, int64_t i, const float (&x)[kWidth],
                                     const AdamScalars& s, uint32_t index, int64_t element) {
  Pack<bf16, kWidth> pack;
  const uint64_t block = uint64_t(element) / 8;
  const Philox4 random = philox4x32(s.seed, uint32_t(block), uint32_t(block >> 32), index, s.step);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const int half = int(element + k) & 7;
    uint32_t word = random.word[0];  // selected, not indexed: words stay in registers
    word = half / 2 == 1 ? random.word[1] : word;
    word = half / 2 == 2 ? random.word[2] : word;
    word = half / 2 == 3 ? random.word[3] : word;
    const uint32_t bits = __float_as_uint(x[k]);
    const uint32_t noise = half & 1 ? word >> 16 : word & 0xffffu;
    pack.at[k] = (bits & 0x7fffffffu) < 0x7f800000u ? bf16{uint16_t((bits + noise) >> 16)}
                                                    : narrow<bf16>(x[k]);
  }
  *reinterpret_cast<Pack<bf16, kWidth>*>(p + i) = pack;
}

template <class P, class G, class M, bool kMaster, int kWidth>
__device__ void update(const UpdateEntry& t, const AdamScalars& s, int64_t begin, int i) {
  P* param = static_cast<P*>(t.param) + begin;
  M* exp_avg = static_cast<M*>(t.exp_avg) + begin;
  M* exp_avg_sq = static_cast<M*>(t.exp_avg_sq) + begin;
  float x[kWidth], g[kWidth], m[kWidth], v[kWidth], largest[kWidth];
  if constexpr (kMaster)
    load<kWidth>(t.master + begin, i, x);
  else
    load<kWidth>(param, i, x);
  load<kWidth>(static_cast<const G*>(t.grad) + begin, i, g);
  load<kWidth>(exp_avg, i, m);
  load<kWidth>(exp_avg_sq, i, v);
  if (s.amsgrad) load<kWidth>(static_cast<M*>(t.max_exp_avg_sq) + begin, i, largest);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    float grad = g[k] * s.grad_factor;
    if (s.l2 != 0) grad = fmaf(s.l2, x[k], grad);
    m[k] = fmaf(s.weight1, grad - m[k], m[k]);
    // v - weight2 v keeps more of 1 - beta2 than beta2 * v would; not for an infinite v.
    const float kept = v[k] <= kLargest ? fmaf(-s.weight2, v[k], v[k]) : v[k];
    v[k] = fmaf(s.weight2 * grad, grad, kept);
    if (s.amsgrad) largest[k] = v[k] > largest[k] || v[k] != v[k] ? v[k] : largest[k];
    float step = divide(s.step_size * m[k], root(s.amsgrad ? largest[k] : v[k]) + s.eps);
    // An infinite x decays to itself, not to inf - inf.
    if (s.decay != 0) step = fabsf(x[k]) <= kLargest ? fmaf(s.decay, x[k], step) : step;
    x[k] -= step;
  }
  store<kWidth>(exp_avg, i, m);
  store<kWidth>(exp_avg_sq, i, v);
  if (s.amsgrad) store<kWidth>(static_cast<M*>(t.max_exp_avg_sq) + begin, i, largest);
  if constexpr (kMaster) store<kWidth>(t.master + begin, i, x);
  if constexpr (!kMaster && std::is_same_v<P, bf16>) {
    if (s.stochastic) return store_stochastically(param, i, x, s, t.index, begin + i);
  }
  store<kWidth>(param, i, x);
}

template <class P, class G, class M, bool kMaster>
__global__ void __launch_bounds__(kThreads)
    adam_update_kernel(const __grid_constant__ UpdateTable table, const AdamScalars* scalars,
                       const AdamControl* control) {
  if (control->skip) return;
  constexpr int kWidth = sizeof(P) + sizeof(G) + sizeof(M) == 6 && !kMaster ? 8 : 4;
  const int which = table.find(blockIdx.x);
  const UpdateEntry& t = table.entry[which];
  const AdamScalars s = scalars[t.index];
  const int64_t begin = int64_t(blockIdx.x - table.first[which]) * kChunk;
  const int n = int(t.numel - begin < kChunk ? t.numel - begin : kChunk);
  const int vectors = t.aligned ? n / kWidth * kWidth : 0;
  for (int i = kWidth * threadIdx.x; i < vectors; i += kWidth * kThreads)
    update<P, G, M, kMaster, kWidth>(t, s, begin, i);
  for (int i = vectors + threadIdx.x; i < n; i += kThreads)
    update<P, G, M, kMaster, 1>(t, s, begin, i);
}

bool all_aligned(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return bits % 16 == 0;
}

template <class Table_, class Entry>
bool add(Table_& table, const Entry& entry) {
  constexpr int kCapacity = sizeof(table.first) / sizeof(table.first[0]);
  const uint64_t chunks = (uint64_t(entry.numel) + kChunk - 1) / kChunk;
  if (table.count == kCapacity || table.chunks + chunks > 0x7fffffffu) return false;
  table.entry[table.count] = entry;
  table.first[table.count++] = table.chunks;
  table.chunks += uint32_t(chunks);
  return true;
}

// The launches that a list takes: tensors of one combination of dtypes, in tables that fit.
int combination(const AdamTensor& t) {
  return ((int(t.param_type) * 3 + int(t.grad_type)) * 2 + int(t.moment_type)) * 2 +
         (t.master != nullptr);
}

std::vector<UpdateTable> plan_updates(const std::vector<AdamTensor>& tensors, int which) {
  std::vector<UpdateTable> tables;
  for (const AdamTensor& t : tensors) {
    if (t.numel == 0 || combination(t) != which) continue;
    const UpdateEntry entry{
        t.param,
        t.grad,
        t.exp_avg,
        t.exp_avg_sq,
        t.max_exp_avg_sq,
        t.master,
        t.numel,
        t.index,
        all_aligned({t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.max_exp_avg_sq, t.master})};
    if (tables.empty() || !add(tables.back(), entry)) add(tables.emplace_back(), entry);
  }
  return tables;
}

std::vector<NormTable> plan_norm(const std::vector<AdamTensor>& tensors, DType type) {
  std::vector<NormTable> tables;
  for (const AdamTensor& t : tensors) {
    if (t.numel == 0 || t.grad_type != type) continue;
    const NormEntry entry{t.grad, t.numel, all_aligned({t.grad})};
    if (tables.empty() || !add(tables.back(), entry)) add(tables.emplace_back(), entry);
  }
  return tables;
}

uint32_t norm_blocks(const NormTable& table) {
  return std::min<uint32_t>(table.chunks, kNormBlocks);
}

constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

}  // namespace

int64_t adam_partial_count(const std::vector<AdamTensor>& tensors) {
  int64_t count = 0;
  for (DType type : kTypes)
    for (const NormTable& table : plan_norm(tensors, type)) count += norm_blocks(table);
  return count;
}

void launch_adam_norm(const std::vector<AdamTensor>& tensors, double* partials, int device,
                      void* stream) {
  check_device("adam_norm", "adam_norm_kernel", use_device(device), kSm80);
  for (DType type : kTypes) {
    for (const NormTable& table : plan_norm(tensors, type)) {
      const uint32_t grid = norm_blocks(table);
      with_type(type, [&](auto g) {
        launch_kernel("adam_norm_kernel", adam_norm_kernel<decltype(g)>, grid, kThreads, 0, stream,
                      table, partials);
      });
      partials += grid;
    }
  }
}

void launch_adam_finish(const AdamDeviceCall& call, int device, void* stream) {
  check_device("adam_norm", "adam_finish_kernel", use_device(device), kSm80);
  launch_kernel("adam_finish_kernel", adam_finish_kernel, 1, kThreads, 0, stream, call);
}

void launch_adam_step(const std::vector<AdamTensor>& tensors,
                      const std::vector<AdamDeviceGroup>& groups, const AdamDeviceCall& call,
                      int device, void* stream) {
  check_device("adam_step_", "adam_update_kernel", use_device(device), kSm80);
  for (size_t next = 0; next < tensors.size();) {
    PrepareTable table{};
    table.first_group = tensors[next].group;
    for (; next < tensors.size() && table.count < kTensors; ++next) {
      const AdamTensor& t = tensors[next];
      if (t.group - table.first_group >= kGroups) break;
      table.entry[table.count++] = {t.step, t.index, t.group};
      table.group[t.group - table.first_group] = groups[t.group];
    }
    const uint32_t grid = (table.count + kThreads - 1) / kThreads;
    launch_kernel("adam_prepare_kernel", adam_prepare_kernel, grid, kThreads, 0, stream, table,
                  call);
  }
  std::vector<int> combinations;
  for (const AdamTensor& t : tensors)
    if (std::find(combinations.begin(), combinations.end(), combination(t)) == combinations.end())
      combinations.push_back(combination(t));
  for (int which : combinations) {
    const auto first = std::find_if(tensors.begin(), tensors.end(),
                                    [&](const AdamTensor& t) { return combination(t) == which; });
    for (const UpdateTable& table : plan_updates(tensors, which)) {
      with_type(first->param_type, [&](auto p) {
        with_type(first->grad_type, [&](auto g) {
          auto launch = [&](auto m, auto master) {
            const auto kernel =
                adam_update_kernel<decltype(p), decltype(g), decltype(m), decltype(master)::value>;
            launch_kernel("adam_update_kernel", kernel, table.chunks, kThreads, 0, stream, table,
                          call.scalars, call.control);
          };
          auto with_master = [&](auto m) {
            if constexpr (sizeof(p) == 2) {
              if (first->master != nullptr) return launch(m, std::true_type{});
            }
            launch(m, std::false_type{});
          };
          if (first->moment_type == DType::kFloat32)
            with_master(float{});
          else
            with_master(bf16{});
        });
      });
    }
  }
}

}  // namespace bigkernel
