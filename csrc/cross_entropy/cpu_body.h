// Cross-entropy on the CPU, once per instruction set. For a row of (capped) logits z, its label y,
// class weights w, smoothing s and V classes, with lse = peak + spread = log(sum(exp(z))):
//   loss = (1 - s) w_y (lse - z_y) + s / V * sum_c(w_c (lse - z_c)) + z_loss * lse^2
//   dz_c = p_c ((1 - s) w_y + s / V * sum(w) + 2 z_loss * lse) - (1 - s) w_y [c = y] - s / V * w_c
// or, for soft labels q, with m_c = w_c ((1 - s) q_c + s / V),
//   loss = sum_c(m_c (lse - z_c)) + z_loss * lse^2,  dz_c = p_c (sum(m) + 2 z_loss * lse) - m_c
// with p_c = exp(z_c - lse), and then dlogit = dz * (1 - (z / softcap)^2). A row comes from memory
// once in forward: the sum of exponentials is kept relative to the peak so far, block by block.
// lse in two summands, since rounding their sum costs p the digits that the peak has before its
// point.
#include "cpu/rows.h"

#include "cpu/exp.h"
#include "cross_entropy/cross_entropy.h"

namespace bigkernel::BK_ISA {
namespace cross_entropy {

constexpr int64_t kBlock = 1024;  // elements: in the first-level cache between their two passes
constexpr float kInfinity = __builtin_inff();

template <bool kCapped>
BK_INLINE VecF capped(VecF x, float softcap) {
  if constexpr (!kCapped) return x;
  VecF value, slope;
  tanh_and_slope(x / softcap, value, slope);
  return softcap * value;
}

// m of a row of soft labels.
template <class S>
BK_INLINE VecF mass(const CrossEntropyArgs& a, const S* soft, int64_t i, int n) {
  const VecF m =
      fma(load_some(soft + i, n), set1(1 - a.smoothing), set1(a.smoothing / float(a.classes)));
  return a.weight == nullptr ? m : m * load_some(a.weight + i, n);
}

// S: the element type of soft labels, or void.
template <class T, bool kCapped, class S>
void forward(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  constexpr bool kSoft = !std::is_void_v<S>;
  float scratch[kBlock];  // a block's capped logits
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = kSoft ? -1 : a.labels[row];
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    float peak = -kInfinity, wanted = 0, anchor = 0;
    // smooth: sum(w_c (z_c - anchor)), so that little cancels; of soft labels sum(m_c (z_c -
    // anchor))
    double sum = 0, smooth = 0, whole = 0;
    for (int64_t first = 0; first < a.classes; first += kBlock) {
      const int64_t count = a.classes - first < kBlock ? a.classes - first : kBlock;
      VecF largest = set1(-kInfinity);
      for_elements(count, [&](int64_t i, int n) BK_LAMBDA {
        VecF z = capped<kCapped>(load_some(logits + first + i, n), a.softcap);
        store_some(scratch + i, z, n);
        if (n < kLanes) z = lane_index() < n ? z : set1(-kInfinity);
        largest = vmax(z, largest);
      });
      const float top = reduce_max(largest);
      const float before = peak;
      peak = top > peak ? top : peak;
      // Of a row that so far holds -inf alone, or +inf: the sums below are right, or NaN, as due.
      const float shift = peak == -kInfinity ? 0.0f : peak;
      if (first == 0) anchor = shift;
      float sums[1];
      sum_elements<1>(count, sums, [&](int64_t i, int n, VecF(&to)[1]) BK_LAMBDA {
        VecF e = vexp(load_some(scratch + i, n) - shift);
        if (n < kLanes) e = lane_index() < n ? e : VecF{};
        to[0] += e;
      });
      sum = (sum == 0 ? 0.0 : sum * __builtin_exp(double(before) - shift)) + sums[0];
      if constexpr (kSoft) {
        const S* soft = static_cast<const S*>(a.soft) + row * a.soft_stride;
        float both[2];
        sum_elements<2>(count, both, [&](int64_t i, int n, VecF(&to)[2]) BK_LAMBDA {
          VecF m = mass(a, soft, first + i, n), z = load_some(scratch + i, n) - anchor;
          if (n < kLanes) {
            m = lane_index() < n ? m : VecF{};
            z = lane_index() < n ? z : VecF{};
          }
          to[0] += m;
          to[1] += m * z;
        });
        whole += both[0];
        smooth += both[1];
      } else if (a.smoothing != 0) {
        sum_elements<1>(count, sums, [&](int64_t i, int n, VecF(&to)[1]) BK_LAMBDA {
          VecF z = load_some(scratch + i, n) - anchor;
          if (n < kLanes) z = lane_index() < n ? z : VecF{};
          to[0] += a.weight == nullptr ? z : z * load_some(a.weight + first + i, n);
        });
        smooth += sums[0];
      }
      if (!kSoft && label >= first && label < first + count) wanted = scratch[label - first];
    }
    const double spread = __builtin_log(sum), lse = peak + spread;
    a.peak[row] = peak;
    a.spread[row] = float(spread);
    if constexpr (kSoft) {
      double loss = whole * (lse - anchor) - smooth;
      if (a.z_loss != 0) loss += a.z_loss * lse * lse;
      a.losses[row] = float(loss);
      continue;
    }
    if (label == a.ignore_index) {
      a.losses[row] = 0;
      continue;
    }
    const double w = a.weight == nullptr ? 1.0 : a.weight[label], s = a.smoothing;
    double loss = (1 - s) * w * (lse - wanted);
    if (s != 0) loss += s * (a.weight_sum * (lse - anchor) - smooth) / double(a.classes);
    if (a.z_loss != 0) loss += a.z_loss * lse * lse;
    a.losses[row] = float(loss);
  }
}

template <class T, bool kCapped>
void backward(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = a.labels[row];
    T* out = static_cast<T*>(a.dlogits) + row * a.grad_stride;
    if (label == a.ignore_index) {
      __builtin_memset(out, 0, size_t(a.classes) * sizeof(T));
      continue;
    }
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    const float g = a.scale[row], peak = a.peak[row], spread = a.spread[row];
    const float w = a.weight == nullptr ? 1.0f : a.weight[label];
    const float share = a.smoothing / float(a.classes), hit = (1 - a.smoothing) * w;
    const float every = share * a.weight_sum, drift = 2 * a.z_loss * (peak + spread);
    const int64_t block = label / kLanes * kLanes;
    const VecF one = lane_index() == set1i(int32_t(label - block)) ? set1(1.0f) : VecF{};
    for_elements(a.classes, [&](int64_t i, int n) BK_LAMBDA {
      VecF z = load_some(logits + i, n), slope = set1(g);
      if constexpr (kCapped) {
        tanh_and_slope(z / a.softcap, z, slope);
        z = rounded(z * a.softcap);  // as forward had it, which knows the peak of those
        slope *= g;
      }
      const VecF p = vexp((z - peak) - spread);
      // Differences of what is nearly equal are taken first.
      VecF d = fma(i == block ? p - one : p, set1(hit), p * drift);
      if (share != 0) {
        const VecF w = a.weight == nullptr ? set1(1.0f) : load_some(a.weight + i, n);
        d += fma(p, set1(every), -rounded(w * share));
      }
      store_some(out + i, d * slope, n);
    });
  }
}

template <class T, bool kCapped, class S>
void soft_backward(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const S* soft = static_cast<const S*>(a.soft) + row * a.soft_stride;
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    T* out = static_cast<T*>(a.dlogits) + row * a.grad_stride;
    float whole[1];
    sum_elements<1>(a.classes, whole, [&](int64_t i, int n, VecF(&to)[1]) BK_LAMBDA {
      const VecF m = mass(a, soft, i, n);
      to[0] += n < kLanes ? (lane_index() < n ? m : VecF{}) : m;
    });
    const float g = a.scale[row], peak = a.peak[row], spread = a.spread[row];
    const float every = whole[0], drift = 2 * a.z_loss * (peak + spread);
    for_elements(a.classes, [&](int64_t i, int n) BK_LAMBDA {
      VecF z = load_some(logits + i, n), slope = set1(g);
      if constexpr (kCapped) {
        tanh_and_slope(z / a.softcap, z, slope);
        z = rounded(z * a.softcap);
        slope *= g;
      }
      const VecF p = vexp((z - peak) - spread);
      // As above: p sum(m) and m are nearly equal where p is near 1.
      const VecF d = fma(p, set1(drift), fma(p, set1(every), -rounded(mass(a, soft, i, n))));
      store_some(out + i, d * slope, n);
    });
  }
}

// Calls f(T, capped, S) for what the arguments hold.
template <class F>
BK_INLINE void with_kind(const CrossEntropyArgs& a, const F& f) {
  with_type(a.type, [&](auto tag) BK_LAMBDA {
    const auto soft = [&](auto kind) BK_LAMBDA {
      if (a.softcap == 0)
        f(tag, std::false_type{}, kind);
      else
        f(tag, std::true_type{}, kind);
    };
    if (a.soft == nullptr) return soft(std::type_identity<void>{});
    with_type(a.soft_type,
              [&](auto type) BK_LAMBDA { soft(std::type_identity<decltype(type)>{}); });
  });
}

}  // namespace cross_entropy

void cross_entropy_forward(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  cross_entropy::with_kind(a, [&](auto tag, auto capped, auto kind) BK_LAMBDA {
    using Soft = typename decltype(kind)::type;
    cross_entropy::forward<decltype(tag), decltype(capped)::value, Soft>(a, begin, end);
  });
}

void cross_entropy_backward(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  cross_entropy::with_kind(a, [&](auto tag, auto capped, auto kind) BK_LAMBDA {
    using Soft = typename decltype(kind)::type;
    if constexpr (std::is_void_v<Soft>)
      cross_entropy::backward<decltype(tag), decltype(capped)::value>(a, begin, end);
    else
      cross_entropy::soft_backward<decltype(tag), decltype(capped)::value, Soft>(a, begin, end);
  });
}

}  // namespace bigkernel::BK_ISA
