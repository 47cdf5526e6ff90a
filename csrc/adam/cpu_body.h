// Adam on the CPU, once per instruction set. For each element (names as in adam.h):
//   g = grad * grad_factor + l2 * x;  m += weight1 * (g - m);  v += weight2 * (g^2 - v)
//   x -= decay * x + step_size * m / (sqrt(max(v, vmax)) + eps)
// The loop is bound by memory: fp32 arrays are updated where they lie, 16-bit ones pass through
// buffers of one unit (2 KB each) in the first-level cache, so there is one loop for all dtypes.
#include "adam/adam.h"
#include "cpu/philox_vec.h"

namespace bigkernel::BK_ISA {
namespace adam {

constexpr float kLargest = 3.4028234663852886e38f;

// Widens n elements from `offset` on into `buffer`, or points to them if they are fp32 already.
inline float* widen(const void* base, DType type, int64_t offset, int64_t n, float* buffer) {
  if (type == DType::kFloat32) return const_cast<float*>(static_cast<const float*>(base)) + offset;
  auto convert = [&](auto* p) {
    p += offset;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(buffer + i, load(p + i));
    for (; i < n; ++i) buffer[i] = ::bigkernel::to_float(p[i]);
  };
  if (type == DType::kBFloat16)
    convert(static_cast<const bf16*>(base));
  else
    convert(static_cast<const fp16*>(base));
  return buffer;
}

// The way back, rounding to nearest even; nothing to do for fp32.
inline void narrow(void* base, DType type, int64_t offset, int64_t n, const float* buffer) {
  auto convert = [&](auto* p) {
    p += offset;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(p + i, load(buffer + i));
    if (i < n) store_n(p + i, load_n(buffer + i, int(n - i)), int(n - i));
  };
  if (type == DType::kBFloat16)
    convert(static_cast<bf16*>(base));
  else if (type == DType::kFloat16)
    convert(static_cast<fp16*>(base));
}

// Sixteen random bits for each of the 8 * kLanes elements from `offset` on (a multiple of that
// many): philox4x32 of common/philox.h for kLanes consecutive counters at once.
inline void noise(const AdamScalars& s, uint32_t index, int64_t offset, uint16_t* out) {
  const uint64_t block = uint64_t(offset) / 8;
  VecU word[4];
  philox4x32(s.seed, uint32_t(block) + (VecU)lane_index(), uint32_t(block >> 32), index, s.step,
             word);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int w = 0; w < 4; ++w) {
      out[lane * 8 + 2 * w] = uint16_t(word[w][lane]);
      out[lane * 8 + 2 * w + 1] = uint16_t(word[w][lane] >> 16);
    }
  }
}

inline void narrow_stochastically(const AdamTensor& t, const AdamScalars& s, int64_t offset,
                                  int64_t n, const float* buffer) {
  bf16* out = static_cast<bf16*>(t.param) + offset;
  uint16_t bits[8 * kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    if (i % (8 * kLanes) == 0) noise(s, t.index, offset + i, bits);
    const int count = int(n - i < kLanes ? n - i : kLanes);
    const VecF x = count == kLanes ? load(buffer + i) : load_n(buffer + i, count);
    VecH half;
    __builtin_memcpy(&half, bits + i % (8 * kLanes), sizeof half);
    const VecU u = (VecU)x;
    const VecU cut = (u + __builtin_convertvector(half, VecU)) >> 16;
    const VecH rounded =
        __builtin_convertvector((u & 0x7fffffffu) < 0x7f800000u ? cut : bf16_bits(x), VecH);
    __builtin_memcpy(out + i, &rounded, size_t(2 * count));
  }
}

template <bool kVmax, bool kL2, bool kDecay>
inline void update(float* x_, const float* g_, float* m_, float* v_, float* vmax_, int64_t n,
                   const AdamScalars& s) {
  auto lanes = [&](auto get, auto put) {
    VecF x = get(x_), m = get(m_), v = get(v_);
    VecF g = get(g_) * s.grad_factor;
    if constexpr (kL2) g = fma(set1(s.l2), x, g);
    m = fma(set1(s.weight1), g - m, m);
    // v - weight2 v keeps more of 1 - beta2 than beta2 * v would; not for an infinite v.
    const VecF kept = v <= kLargest ? fma(set1(-s.weight2), v, v) : v;
    v = fma(s.weight2 * g, g, kept);
    put(m_, m);
    put(v_, v);
    if constexpr (kVmax) {
      const VecF largest = get(vmax_);
      v = v > largest || v != v ? v : largest;
      put(vmax_, v);
    }
    VecF step = (s.step_size * m) / (vsqrt(v) + s.eps);
    // An infinite x decays to itself, not to inf - inf.
    if constexpr (kDecay) step = vabs(x) <= kLargest ? fma(set1(s.decay), x, step) : step;
    put(x_, x - step);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    lanes([&](const float* p) { return load(p + i); }, [&](float* p, VecF y) { store(p + i, y); });
  if (i < n) {
    const int rest = int(n - i);
    lanes([&](const float* p) { return load_n(p + i, rest); },
          [&](float* p, VecF y) { store_n(p + i, y, rest); });
  }
}

using Update = void (*)(float*, const float*, float*, float*, float*, int64_t, const AdamScalars&);

inline Update choose(const AdamScalars& s) {
  if (s.amsgrad)
    return s.l2 != 0 ? update<true, true, false>
                     : (s.decay != 0 ? update<true, false, true> : update<true, false, false>);
  return s.l2 != 0 ? update<false, true, false>
                   : (s.decay != 0 ? update<false, false, true> : update<false, false, false>);
}

template <class T>
inline double square_sum(const T* p, int64_t n) {
  // Fp32 within a unit, fp64 beyond it: 4 accumulators of at most kAdamUnit / 4 / kLanes terms.
  double total = 0;
  for (int64_t first = 0; first < n; first += kAdamUnit) {
    const int64_t count = n - first < kAdamUnit ? n - first : kAdamUnit;
    const T* unit = p + first;
    VecF sum[4] = {};
    VecI any = {};  // bits of all elements: were they all zero?
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes)
      for (int j = 0; j < 4; ++j) {
        const VecF g = load(unit + i + j * kLanes);
        sum[j] = fma(g, g, sum[j]);
        any |= (VecI)g & 0x7fffffff;
      }
    for (; i < count; i += kLanes) {
      const int rest = int(count - i < kLanes ? count - i : kLanes);
      const VecF g = rest == kLanes ? load(unit + i) : load_n(unit + i, rest);
      sum[0] = fma(g, g, sum[0]);
      any |= (VecI)g & 0x7fffffff;
    }
    double squares = reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    // Where fp32 overflowed, or lost digits to underflow, the unit is summed again in fp64.
    bool zero = true;
    if (squares == 0)
      for (int k = 0; k < kLanes; ++k) zero &= any[k] == 0;
    if (squares == 0 ? !zero : !(squares > 1e-30 && squares <= double(kLargest))) {
      squares = 0;
      for (int64_t k = 0; k < count; ++k) {
        const double g = ::bigkernel::to_float(unit[k]);
        squares += g * g;
      }
    }
    total += squares;
  }
  return total;
}

}  // namespace adam

void adam_update(const AdamTensor& t, const AdamScalars& s, int64_t begin, int64_t end) {
  using namespace adam;
  float param[kAdamUnit], grad[kAdamUnit], m[kAdamUnit], v[kAdamUnit], vmax[kAdamUnit];
  const Update update_unit = choose(s);
  for (int64_t i = begin; i < end; i += kAdamUnit) {
    const int64_t n = end - i < kAdamUnit ? end - i : kAdamUnit;
    float* x = t.master ? t.master + i : widen(t.param, t.param_type, i, n, param);
    float* m_at = widen(t.exp_avg, t.moment_type, i, n, m);
    float* v_at = widen(t.exp_avg_sq, t.moment_type, i, n, v);
    float* vmax_at = s.amsgrad ? widen(t.max_exp_avg_sq, t.moment_type, i, n, vmax) : nullptr;
    update_unit(x, widen(t.grad, t.grad_type, i, n, grad), m_at, v_at, vmax_at, n, s);
    if (s.stochastic && t.param_type == DType::kBFloat16 && t.master == nullptr)
      narrow_stochastically(t, s, i, n, x);
    else
      narrow(t.param, t.param_type, i, n, x);
    narrow(t.exp_avg, t.moment_type, i, n, m);
    narrow(t.exp_avg_sq, t.moment_type, i, n, v);
    if (s.amsgrad) narrow(t.max_exp_avg_sq, t.moment_type, i, n, vmax);
  }
}

double adam_square_sum(const void* grad, DType type, int64_t begin, int64_t end) {
  using namespace adam;
  if (type == DType::kFloat32)
    return square_sum(static_cast<const float*>(grad) + begin, end - begin);
  if (type == DType::kBFloat16)
    return square_sum(static_cast<const bf16*>(grad) + begin, end - begin);
  return square_sum(static_cast<const fp16*>(grad) + begin, end - begin);
}

void adam_stream(float* x, const float* g, float* m, float* v, int64_t n, float zero) {
  constexpr int64_t kAhead = 256;  // floats; the best of 0, 128, 256 and 1024
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (const float* p : {static_cast<const float*>(x), g, static_cast<const float*>(m),
                           static_cast<const float*>(v)})
      __builtin_prefetch(p + i + kAhead);
    const VecF change = load(g + i) * zero;
    for (float* p : {x, m, v}) store(p + i, load(p + i) + change);
  }
  for (; i < n; ++i)
    for (float* p : {x, m, v}) p[i] += g[i] * zero;
}

float adam_read(const float* g, int64_t n) {
  constexpr int kStreams = 4;
  VecF sum[kStreams] = {};
  const int64_t span = n / kStreams / kLanes * kLanes;
  for (int64_t i = 0; i < span; i += kLanes)
    for (int j = 0; j < kStreams; ++j) sum[j] += load(g + j * span + i);
  float rest = 0;
  for (int64_t i = kStreams * span; i < n; ++i) rest += g[i];
  return rest + reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace bigkernel::BK_ISA
