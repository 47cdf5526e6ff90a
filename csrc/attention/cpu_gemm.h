// Register-blocked products of small fp32 tiles: C[m, n] (+)= sum_k A[m, k] * B[k, n].
//
// kMr rows of A are broadcast against kNr vectors of B; the kMr x kNr accumulators, one row of B
// and the broadcast value fill the register file. B and C are row-major with n contiguous and n
// padded to whole vectors. A is row-major, or read transposed (A[m, k] at a[k * lda + m]).
#pragma once

namespace bigkernel::BK_ISA {

constexpr int kMr = 6;
#if defined(BK_AVX512)
constexpr int kNr = 4;
#else
constexpr int kNr = 2;
#endif

enum class Start { kZero, kAdd, kScaled };  // C starts from 0, C or factor[m] * C

struct Product {
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t k;
  Start start;
  const float* factor;  // [m], for kScaled
};

template <int M, int N, bool kTransposed>
void micro_kernel(const Product& p) {
  VecF acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[m][n] = VecF{};
  const float* a = p.a;
  const float* b = p.b;
  const int64_t lda = p.lda, ldb = p.ldb;
  for (int64_t k = 0; k < p.k; ++k) {
    VecF row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const VecF value = set1(kTransposed ? a[m] : a[m * lda]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = fma(value, row[n], acc[m][n]);
    }
    a += kTransposed ? lda : 1;
    b += ldb;
  }
  // C joins last: summing up a tile before adding it to a long sum keeps rounding errors small.
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const VecF factor = set1(p.start == Start::kScaled ? p.factor[m] : 1.0f);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* c = p.c + m * p.ldc + n * kLanes;
      store(c, p.start == Start::kZero ? acc[m][n] : fma(load(c), factor, acc[m][n]));
    }
  }
}

template <int M, bool kTransposed>
void micro_row(Product p, int64_t vectors) {
  while (vectors >= kNr) {
    micro_kernel<M, kNr, kTransposed>(p);
    p.b += kNr * kLanes;
    p.c += kNr * kLanes;
    vectors -= kNr;
  }
  if constexpr (kNr > 2) {
    if (vectors == 3) micro_kernel<M, 3, kTransposed>(p);
    if (vectors == 2) micro_kernel<M, 2, kTransposed>(p);
  }
  if (vectors == 1) micro_kernel<M, 1, kTransposed>(p);
}

// Longer sums are cut, for the same reason that C joins last.
constexpr int64_t kLongestSum = 128;

// C[rows, vectors * kLanes] from A[rows, k] and B[k, vectors * kLanes].
template <bool kTransposed>
void multiply(Product p, int64_t rows, int64_t vectors) {
  while (p.k > kLongestSum) {
    Product part = p;
    part.k = kLongestSum / 2;
    multiply<kTransposed>(part, rows, vectors);
    p.a += part.k * (kTransposed ? p.lda : 1);
    p.b += part.k * p.ldb;
    p.k -= part.k;
    p.start = Start::kAdd;
  }
  while (rows > 0) {
    int64_t done;
    if (rows >= kMr) {
      micro_row<kMr, kTransposed>(p, vectors);
      done = kMr;
    } else if (rows >= 4) {
      micro_row<4, kTransposed>(p, vectors);
      done = 4;
    } else if (rows >= 2) {
      micro_row<2, kTransposed>(p, vectors);
      done = 2;
    } else {
      micro_row<1, kTransposed>(p, vectors);
      done = 1;
    }
    rows -= done;
    p.a += kTransposed ? done : done * p.lda;
    p.c += done * p.ldc;
    p.factor += p.factor == nullptr ? 0 : done;
  }
}

}  // namespace bigkernel::BK_ISA
