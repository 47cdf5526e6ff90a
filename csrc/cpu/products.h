// Register-blocked products of small tiles of words (cpu/words.h) into fp32:
//   C[m, n] (+)= sum_k A[m, k] * B[k, n]
//
// kMr rows of A are broadcast against kNr vectors of B; the kMr x kNr accumulators, one row of B
// and the broadcast value fill the register file. B and C are row-major with n contiguous and n
// padded to whole vectors. A is row-major, or read transposed (A[m, k] at a[k * lda + m]).
#pragma once

#include "cpu/words.h"

namespace bigkernel::BK_ISA {

#if defined(BK_ISA_AMX)
constexpr int kMr = 16;  // a tile
constexpr int kSoftmaxRows = 4;
#else
constexpr int kMr = 6;
constexpr int kSoftmaxRows = kMr;  // rows of scores that are in registers at once
#endif
#if defined(BK_AVX512)
constexpr int kNr = 4;
#else
constexpr int kNr = 2;
#endif

// A work item that multiplies begins with this.
#if defined(BK_ISA_AMX)
#define BK_TILES const Tiles tiles
#else
#define BK_TILES static_cast<void>(0)
#endif

enum class Start { kZero, kAdd };  // C starts from 0 or from C

struct Product {
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t k;  // words
  Start start;
};

// Calls f with min(vectors, kNr) as a constant.
template <class F>
BK_INLINE void with_vectors(int64_t vectors, const F& f) {
  if (vectors >= kNr) return f(std::integral_constant<int, kNr>{});
  if constexpr (kNr > 2) {
    if (vectors == 3) return f(std::integral_constant<int, 3>{});
    if (vectors == 2) return f(std::integral_constant<int, 2>{});
  }
  f(std::integral_constant<int, 1>{});
}

// Longer sums are cut, for the same reason that C joins last.
constexpr int64_t kLongestSum = 128;

#if !defined(BK_ISA_AMX)

// acc[m][n] = the sum over k words, from 0.
template <class Words, int M, int N, bool kTransposed>
BK_INLINE void accumulate(VecF (&acc)[M][N], const float* a, int64_t lda, const float* b,
                          int64_t ldb, int64_t words) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[m][n] = VecF{};
  for (int64_t k = 0; k < words; ++k) {
    VecF row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const VecF value = broadcast(a + (kTransposed ? m : m * lda));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = Words::dot(value, row[n], acc[m][n]);
    }
    a += kTransposed ? lda : 1;
    b += ldb;
  }
}

template <class Words, int M, int N, bool kTransposed>
void micro_kernel(const Product& product) {
  const Product p = product;  // a copy that stores to C cannot change
  VecF acc[M][N];
  accumulate<Words, M, N, kTransposed>(acc, p.a, p.lda, p.b, p.ldb, p.k);
  // C joins last: summing up a tile before adding it to a long sum keeps rounding errors small.
  float* c = p.c;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    __asm__("" : "+r"(c));  // one pointer, not M * N of them computed ahead
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* at = c + n * kLanes;
      store(at, p.start == Start::kZero ? acc[m][n] : load(at) + acc[m][n]);
    }
    c += p.ldc;
  }
}

template <class Words, int M, bool kTransposed>
void micro_row(Product p, int64_t vectors) {
  for (; vectors > 0; vectors -= kNr) {
    with_vectors(vectors,
                 [&](auto n) { micro_kernel<Words, M, decltype(n)::value, kTransposed>(p); });
    p.b += kNr * kLanes;
    p.c += kNr * kLanes;
  }
}

// C[rows, vectors * kLanes] from A[rows, k] and B[k, vectors * kLanes].
template <class Words, bool kTransposed>
void multiply(Product p, int64_t rows, int64_t vectors) {
  while (p.k > kLongestSum) {
    Product part = p;
    part.k = kLongestSum / 2;
    multiply<Words, kTransposed>(part, rows, vectors);
    p.a += part.k * (kTransposed ? p.lda : 1);
    p.b += part.k * p.ldb;
    p.k -= part.k;
    p.start = Start::kAdd;
  }
  while (rows > 0) {
    int64_t done;
    if (rows >= kMr) {
      micro_row<Words, kMr, kTransposed>(p, vectors);
      done = kMr;
    } else if (rows >= 4) {
      micro_row<Words, 4, kTransposed>(p, vectors);
      done = 4;
    } else if (rows >= 2) {
      micro_row<Words, 2, kTransposed>(p, vectors);
      done = 2;
    } else {
      micro_row<Words, 1, kTransposed>(p, vectors);
      done = 1;
    }
    rows -= done;
    p.a += kTransposed ? done : done * p.lda;
    p.c += done * p.ldc;
  }
}

#endif

}  // namespace bigkernel::BK_ISA
