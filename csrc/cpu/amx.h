// `multiply` (cpu/products.h) by Intel's AMX, for words of bf16 pairs: an instruction multiplies a
// tile of 16 rows of A, 16 words each, with one of 16 rows of B, 16 words each, into 16 x 16 sums
// in fp32. Words lie as the other instruction sets have them: a row of 16 words of A is a row of
// its tile, and a row of B, whose words hold pairs along the sum, one of the other's.
//
// At most 16 rows, and any length of the sum: the shapes of the tiles say what is read, so that
// what lies beyond never counts. The instruction adds up the 32 products of a tile apart, in two
// sums, before they join C.
#pragma once

#include "cpu/products.h"

namespace bigkernel::BK_ISA {

constexpr int kTile = 16;                // rows of a tile, and words of a row
constexpr int64_t kMostTransposed = 48;  // the longest sum of a transposed A
static_assert(kMr == kTile && kLanes == kTile);

// The tiles of this thread: 0 to 3 are C, 4 is A, 5 to 7 are B. What the shapes are is known inside
// of a session alone, since other libraries set them too.
class Tiles {
 public:
  Tiles() { shape_ = 0; }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  static BK_INLINE void shape(int64_t rows, int64_t words) {
    const int wanted = int(rows * 32 + words);
    if (__builtin_expect(shape_ != wanted, 0)) reshape(int(rows), int(words), wanted);
  }

 private:
  static inline thread_local int shape_ = 0;

  static __attribute__((noinline)) void reshape(int rows, int words, int wanted) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.rows[tile] = uint8_t(tile < 5 ? rows : words);
      config.row_bytes[tile] = uint16_t(tile == 4 ? 4 * words : 4 * kTile);
    }
    __asm__ volatile("" ::"r"(&config) : "memory");  // the intrinsic reads more than it says
    _tile_loadconfig(&config);
    shape_ = wanted;
  }
};

// C[rows, N * kLanes] from A and B, in `chunks` chunks of `step` words.
template <int N>
BK_INLINE void multiply_tiles(const Product& p, int64_t chunks, int64_t step) {
  static_assert(N >= 1 && N <= 4);
  const int64_t lda = p.lda * 4, ldb = p.ldb * 4, ldc = p.ldc * 4;
  if (p.start == Start::kZero) {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) _tile_zero(2);
    if constexpr (N > 3) _tile_zero(3);
  } else {
    _tile_loadd(0, p.c, ldc);
    if constexpr (N > 1) _tile_loadd(1, p.c + kTile, ldc);
    if constexpr (N > 2) _tile_loadd(2, p.c + 2 * kTile, ldc);
    if constexpr (N > 3) _tile_loadd(3, p.c + 3 * kTile, ldc);
  }
  const float *a = p.a, *b = p.b;
  for (int64_t i = 0; i < chunks; ++i) {
    _tile_loadd(4, a, lda);
    _tile_loadd(5, b, ldb);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N > 1) {
      _tile_loadd(6, b + kTile, ldb);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (N > 2) {
      _tile_loadd(7, b + 2 * kTile, ldb);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (N > 3) {
      _tile_loadd(5, b + 3 * kTile, ldb);
      _tile_dpbf16ps(3, 4, 5);
    }
    a += step;
    b += step * p.ldb;
  }
  _tile_stored(0, p.c, ldc);
  if constexpr (N > 1) _tile_stored(1, p.c + kTile, ldc);
  if constexpr (N > 2) _tile_stored(2, p.c + 2 * kTile, ldc);
  if constexpr (N > 3) _tile_stored(3, p.c + 3 * kTile, ldc);
}

BK_INLINE void multiply_chunks(Product p, int64_t rows, int64_t vectors, int64_t chunks,
                               int64_t step) {
  Tiles::shape(rows, step);
  for (; vectors > 0; vectors -= kNr) {
    with_vectors(vectors, [&](auto n) { multiply_tiles<decltype(n)::value>(p, chunks, step); });
    p.b += kNr * kLanes;
    p.c += kNr * kLanes;
  }
}

template <class Words, bool kTransposed>
void multiply(Product p, int64_t rows, int64_t vectors) {
  static_assert(Words::kPack == 2);
  alignas(64) float turned[kTransposed ? kTile * kMostTransposed : 1];
  if constexpr (kTransposed) {  // the rows of A, side by side; a last tile may hold more than words
    for (int64_t k = 0; k < p.k; k += kTile)
      transpose_square(turned + k, kMostTransposed, p.a + k * p.lda,
                       p.lda * int64_t(sizeof(float)));
    p.a = turned;
    p.lda = kMostTransposed;
  }
  // What the tiles read was stored by code that knows nothing of them.
  __asm__ volatile("" ::: "memory");
  const int64_t chunks = p.k / kTile, rest = p.k % kTile;
  if (chunks > 0) {
    multiply_chunks(p, rows, vectors, chunks, kTile);
    p.a += chunks * kTile;
    p.b += chunks * kTile * p.ldb;
    p.start = Start::kAdd;
  }
  if (rest > 0) multiply_chunks(p, rows, vectors, 1, rest);
  __asm__ volatile("" ::: "memory");
}

}  // namespace bigkernel::BK_ISA
