// Rotary position embedding on the CPU, once per instruction set. Elements are rotated in pairs
// (a, b), which lie half of the rotary dimensions apart, or side by side (interleaved):
//   a' = a * cos_a - b * sin_a,  b' = b * cos_b + a * sin_b
// and, transposed, which is the gradient:
//   a' = a * cos_a + b * sin_b,  b' = b * cos_b - a * sin_a
// Dimensions beyond the rotary ones are copied. A position's cosines and sines are widened to fp32
// and given their signs once for all of its heads.
#include "cpu/rows.h"

#include "rope/rope.h"

namespace bigkernel::BK_ISA {
namespace rope {

template <class T>
BK_INLINE void widen(const void* from, int64_t offset, int64_t n, float* to) {
  const T* p = static_cast<const T*>(from) + offset;
  for_elements(n, [&](int64_t i, int count)
                      BK_LAMBDA { store_some(to + i, load_some(p + i, count), count); });
}

// cos, and by what the partner of each element is multiplied.
BK_INLINE void prepare(const RopeArgs& a, int64_t batch, int64_t row, float* cos, float* factor) {
  with_type(a.table_type, [&](auto tag) BK_LAMBDA {
    widen<decltype(tag)>(a.cos, batch * a.cos_batch + row * a.cos_row, a.rotary, cos);
    widen<decltype(tag)>(a.sin, batch * a.sin_batch + row * a.sin_row, a.rotary, factor);
  });
  const int64_t pairs = a.rotary / 2, step = a.interleaved ? 2 : 1;
  const int64_t apart = a.interleaved ? 1 : pairs;
  for (int64_t i = 0; i < pairs; ++i) {
    float &first = factor[i * step], &second = factor[i * step + apart];
    const float sin_a = first, sin_b = second;
    first = a.transposed ? sin_b : -sin_a;
    second = a.transposed ? -sin_a : sin_b;
  }
}

template <class T>
BK_INLINE void halves(const T* x, T* out, int64_t pairs, const float* cos, const float* factor) {
  for_elements(pairs, [&](int64_t i, int n) BK_LAMBDA {
    const VecF a = load_some(x + i, n), b = load_some(x + pairs + i, n);
    const VecF left = fma(a, load_some(cos + i, n), b * load_some(factor + i, n));
    const VecF right = fma(b, load_some(cos + pairs + i, n), a * load_some(factor + pairs + i, n));
    store_some(out + i, left, n);
    store_some(out + pairs + i, right, n);
  });
}

template <class T>
BK_INLINE void neighbours(const T* x, T* out, int64_t n, const float* cos, const float* factor) {
  for_elements(n, [&](int64_t i, int count) BK_LAMBDA {
    const VecF v = load_some(x + i, count);
    const VecF turned = swap_lanes<1>(v) * load_some(factor + i, count);
    store_some(out + i, fma(v, load_some(cos + i, count), turned), count);
  });
}

template <class T>
void rotate(const RopeArgs& a, int64_t begin, int64_t end, float* scratch) {
  float *cos = scratch, *factor = scratch + a.rotary;
  for (int64_t position = begin; position < end; ++position) {
    const int64_t batch = position / a.length, row = position % a.length;
    prepare(a, batch, row, cos, factor);
    for (int t = 0; t < a.count; ++t) {
      const RopeTensor& tensor = a.tensors[t];
      const T* x = static_cast<const T*>(tensor.x) + batch * tensor.x_batch + row * tensor.x_row;
      T* out = static_cast<T*>(tensor.out) + batch * tensor.out_batch + row * tensor.out_row;
      for (int64_t head = 0; head < tensor.heads; ++head) {
        if (a.interleaved)
          neighbours(x, out, a.rotary, cos, factor);
        else
          halves(x, out, a.rotary / 2, cos, factor);
        if (out != x && a.rotary < a.dim)
          __builtin_memcpy(out + a.rotary, x + a.rotary, size_t(a.dim - a.rotary) * sizeof(T));
        x += tensor.x_head;
        out += tensor.out_head;
      }
    }
  }
}

}  // namespace rope

void rope_rotate(const RopeArgs& a, int64_t begin, int64_t end, float* scratch) {
  with_type(a.type,
            [&](auto tag) BK_LAMBDA { rope::rotate<decltype(tag)>(a, begin, end, scratch); });
}

}  // namespace bigkernel::BK_ISA
