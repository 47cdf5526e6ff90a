// RMS and layer norm on the CPU, once per instruction set. For each row, with h = x + residual:
//   n = (h - mean) * rstd,  rstd = 1 / sqrt(sum((h - mean)^2) / D + eps),  y = n * scale + bias
// with mean = 0 for RMS norm; and backward, with g = dy * scale:
//   dh = rstd * (g - [mean(g)] - n * mean(g * n)) + dsum,  dscale = sum(dy * n),  dbias = sum(dy)
// A row comes from memory once; its further passes find it in the first-level cache. 16-bit
// elements are widened as they are loaded.

#include "cpu/rows.h"
#include "norm/norm.h"

namespace bigkernel::BK_ISA {
namespace norm {

template <class T>
BK_INLINE const T* row_of(const void* base, int64_t stride, int64_t row) {
  return static_cast<const T*>(base) + stride * row;
}

// h of a row, which is written where there is a residual, and the first of its sums: the elements
// where it is centred, else the squares.
template <class X, class R, class H>
BK_INLINE const H* add(const NormArgs& a, int64_t row, float& first) {
  const X* x = row_of<X>(a.x, a.x_stride, row);
  const R* residual = row_of<R>(a.residual, a.residual_stride, row);
  H* h = static_cast<H*>(a.sum) + row * a.dim;
  const bool centred = a.mean != nullptr;
  float sum[1];
  sum_elements<1>(a.dim, sum, [&](int64_t i, int n, VecF(&to)[1]) BK_LAMBDA {
    const VecF v = rounded_to<H>(load_some(x + i, n) + load_some(residual + i, n));
    store_some(h + i, v, n);
    to[0] += centred ? v : v * v;
  });
  first = sum[0];
  return h;
}

template <class H>
BK_INLINE float first_sum(const H* h, int64_t dim, bool centred) {
  float sum[1];
  if (centred)
    sum_elements<1>(
        dim, sum, [&](int64_t i, int n, VecF(&to)[1]) BK_LAMBDA { to[0] += load_some(h + i, n); });
  else
    sum_elements<1>(dim, sum, [&](int64_t i, int n, VecF(&to)[1]) BK_LAMBDA {
      const VecF v = load_some(h + i, n);
      to[0] = fma(v, v, to[0]);
    });
  return sum[0];
}

template <class H>
BK_INLINE float square_distances(const H* h, int64_t dim, float mean) {
  float sum[1];
  sum_elements<1>(dim, sum, [&](int64_t i, int n, VecF(&to)[1]) BK_LAMBDA {
    VecF v = load_some(h + i, n) - mean;
    if (n < kLanes) v = lane_index() < n ? v : VecF{};
    to[0] = fma(v, v, to[0]);
  });
  return sum[0];
}

template <class H, class Y>
BK_INLINE void finish(const NormArgs& a, int64_t row, const H* h, float first) {
  const float dim = float(a.dim);
  float mean = 0, squares = first;
  if (a.mean != nullptr) {
    mean = first / dim;
    a.mean[row] = mean;
    squares = square_distances(h, a.dim, mean);
  }
  const float rstd = 1.0f / __builtin_sqrtf(squares / dim + a.eps);
  a.rstd[row] = rstd;
  Y* y = static_cast<Y*>(a.y) + row * a.dim;
  auto write = [&](auto last) BK_LAMBDA {
    for_elements(a.dim, [&](int64_t i, int n) BK_LAMBDA {
      store_some(y + i, last((load_some(h + i, n) - mean) * rstd, i, n), n);
    });
  };
  if (a.scale == nullptr)
    write([&](VecF v, int64_t, int) BK_LAMBDA { return v; });
  else if (a.bias != nullptr)
    write([&](VecF v, int64_t i, int n)
              BK_LAMBDA { return fma(v, load_some(a.scale + i, n), load_some(a.bias + i, n)); });
  else if (a.round_first)
    write([&](VecF v, int64_t i, int n)
              BK_LAMBDA { return rounded_to<H>(v) * load_some(a.scale + i, n); });
  else
    write([&](VecF v, int64_t i, int n) BK_LAMBDA { return v * load_some(a.scale + i, n); });
}

template <class H, class F>
BK_INLINE void with_y(const NormArgs& a, const F& f) {
  if (a.y_type == DType::kFloat32) return f(float{});
  f(H{});
}

template <class X, class R, class H>
void forward_of_sum(const NormArgs& a, int64_t begin, int64_t end) {
  with_y<H>(a, [&](auto tag) BK_LAMBDA {
    for (int64_t row = begin; row < end; ++row) {
      float first;
      const H* h = add<X, R, H>(a, row, first);
      finish<H, decltype(tag)>(a, row, h, first);
    }
  });
}

template <class H>
void forward(const NormArgs& a, int64_t begin, int64_t end) {
  with_y<H>(a, [&](auto tag) BK_LAMBDA {
    for (int64_t row = begin; row < end; ++row) {
      const H* h = row_of<H>(a.x, a.x_stride, row);
      finish<H, decltype(tag)>(a, row, h, first_sum(h, a.dim, a.mean != nullptr));
    }
  });
}

template <class H, class Y>
void backward(const NormGradArgs& a, int64_t begin, int64_t end, float* dscale, float* dbias,
              float* run) {
  const float dim = float(a.dim);
  float* run_bias = run + a.dim;
  auto clear = [&](float* p) BK_LAMBDA { __builtin_memset(p, 0, size_t(a.dim) * sizeof(float)); };
  auto flush = [&](float* to, float* from) BK_LAMBDA {
    if (to == nullptr) return;
    for_elements(a.dim, [&](int64_t i, int n) BK_LAMBDA {
      store_some(to + i, load_some(to + i, n) + load_some(from + i, n), n);
    });
    clear(from);
  };
  if (dscale != nullptr) clear(run);
  if (dbias != nullptr) clear(run_bias);
  for (int64_t row = begin; row < end; ++row) {
    const H* h = row_of<H>(a.h, a.h_stride, row);
    const Y* dy = row_of<Y>(a.dy, a.dy_stride, row);
    const H* dsum = a.dsum == nullptr ? nullptr : row_of<H>(a.dsum, a.dsum_stride, row);
    H* dh = static_cast<H*>(a.dh) + row * a.dim;
    const float rstd = a.rstd[row], mean = a.mean == nullptr ? 0.0f : a.mean[row];
    auto scaled = [&](int64_t i, int n) BK_LAMBDA {
      const VecF g = load_some(dy + i, n);
      return a.scale == nullptr ? g : g * load_some(a.scale + i, n);
    };
    float sums[2];
    sum_elements<2>(a.dim, sums, [&](int64_t i, int n, VecF(&to)[2]) BK_LAMBDA {
      const VecF g = scaled(i, n);
      to[0] = fma(g, (load_some(h + i, n) - mean) * rstd, to[0]);
      to[1] += g;
    });
    const float along = sums[0] / dim, flat = a.mean == nullptr ? 0.0f : sums[1] / dim;
    for_elements(a.dim, [&](int64_t i, int n) BK_LAMBDA {
      const VecF normal = (load_some(h + i, n) - mean) * rstd;
      VecF d = rstd * (scaled(i, n) - flat - normal * along);
      if (dsum != nullptr) d += load_some(dsum + i, n);
      store_some(dh + i, d, n);
      if (dscale != nullptr)
        store_some(run + i, fma(load_some(dy + i, n), normal, load_some(run + i, n)), n);
      if (dbias != nullptr)
        store_some(run_bias + i, load_some(run_bias + i, n) + load_some(dy + i, n), n);
    });
    if ((row - begin) % kNormRun == kNormRun - 1 || row + 1 == end) {
      flush(dscale, run);
      flush(dbias, run_bias);
    }
  }
}

}  // namespace norm

void norm_forward(const NormArgs& a, int64_t begin, int64_t end) {
  using namespace norm;
  if (a.residual == nullptr)
    return with_type(a.x_type, [&](auto h) BK_LAMBDA { forward<decltype(h)>(a, begin, end); });
  with_type(a.x_type, [&](auto x) BK_LAMBDA {
    using X = decltype(x);
    if (a.residual_type == a.x_type) return forward_of_sum<X, X, X>(a, begin, end);
    forward_of_sum<X, float, float>(a, begin, end);
  });
}

void norm_backward(const NormGradArgs& a, int64_t begin, int64_t end, float* dscale, float* dbias,
                   float* run) {
  with_type(a.h_type, [&](auto h) BK_LAMBDA {
    using H = decltype(h);
    if (a.dy_type == a.h_type)
      norm::backward<H, H>(a, begin, end, dscale, dbias, run);
    else
      norm::backward<H, float>(a, begin, end, dscale, dbias, run);
  });
}

void norm_widen(const void* weight, DType type, float offset, int64_t n, float* result) {
  with_type(type, [&](auto tag) BK_LAMBDA {
    const auto* p = static_cast<const decltype(tag)*>(weight);
    for_elements(n, [&](int64_t i, int count) BK_LAMBDA {
      store_some(result + i, load_some(p + i, count) + offset, count);
    });
  });
}

}  // namespace bigkernel::BK_ISA
