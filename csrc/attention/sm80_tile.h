// Tiles of rows in shared memory: [kRows][kDim] of T, in chunks of 16 bytes whose place within a
// row is swizzled, so that the 8 rows of a matrix that ldmatrix reads, or 8 rows that lanes read at
// one column, lie in different banks.
#pragma once
#include <cstdint>

#include "cuda/mma.h"

namespace bigkernel {

// Widths are rounded up so that a row is a multiple of 64 bytes.
template <class T, int kDim>
struct TileLayout {
  static constexpr int kChunk = 16 / sizeof(T);  // elements
  static constexpr int kChunks = kDim / kChunk;
  static constexpr int kRowBytes = kDim * int(sizeof(T));
  static_assert(kRowBytes % 64 == 0, "two rows fill the banks");

  // Where rows start in banks repeats every row or every second one.
  static __device__ __forceinline__ int turn(int row) {
    return kRowBytes % 128 == 0 ? row & 7 : (row >> 1) & 3;
  }
  static __device__ __forceinline__ uint32_t at(int row, int chunk) {
    return uint32_t(row * kRowBytes + ((chunk ^ turn(row)) << 4));
  }
};

// The addresses that one lane gives to ldmatrix_x4 for 16 x 16 elements of a tile of 16-bit T, all
// from a few registers: at(row, step) with row a multiple of 16 and step in units of 16 columns
// costs no instruction where both are constants. The four matrices:
//   kRowsFirst:    r[0]: rows 0-7, columns 0-7      r[1]: rows 8-15, columns 0-7
//                  r[2]: rows 0-7, columns 8-15     r[3]: rows 8-15, columns 8-15
//   kColumnsFirst: r[1] and r[2] the other way round
// Read kRowsFirst, r is the fragment `a` of mma for rows m and columns k; of a tile [k][n] read so
// with _trans, (r[0], r[1]) and (r[2], r[3]) are `b` for n 0-7 and 8-15. Of a tile [n][k] read
// kColumnsFirst, they are. The two parts of `b` lie in neighbouring registers, as mma wants them.
enum class MatrixOrder { kRowsFirst, kColumnsFirst };

template <class T, int kDim, MatrixOrder kOrder = MatrixOrder::kRowsFirst>
struct MatrixCursor {
  using Layout = TileLayout<T, kDim>;
  static constexpr int kTurns = Layout::kRowBytes % 128 == 0 ? 4 : 2;
  uint32_t base[1];  // of at(0, 0); the tile starts at a multiple of 128

  __device__ __forceinline__ MatrixCursor(uint32_t tile, int first_row, int lane) {
    const bool rows_first = kOrder == MatrixOrder::kRowsFirst;
    const int second = lane >> 3 & 1, third = lane >> 4;
    const int row = first_row + (lane & 7) + 8 * (rows_first ? second : third);
    base[0] = tile + Layout::at(row, rows_first ? third : second);
  }
  // Inside a loop: makes the compiler derive the addresses of this round again from one register,
  // rather than keep all of them, or spill them.
  __device__ __forceinline__ void refresh() { asm volatile("" : "+r"(base[0])); }

  __device__ __forceinline__ uint32_t at(int row, int step) const {
    return (base[0] ^ uint32_t(step % kTurns * 32)) + row * Layout::kRowBytes +
           step / kTurns * (kTurns * 32);
  }
};

// One thread's share of the copies of a tile of kRows rows. Columns from `dim` on are zero: they
// are written by `pad`, once for a buffer, and by the loads that are `bounded`.
template <class T, int kRows, int kDim, int kThreads>
struct TileLoader {
  using Layout = TileLayout<T, kDim>;
  static constexpr int kChunks = Layout::kChunks;
  // Thread i takes chunk i % kLanes of row i / kLanes and the chunks kLanes, 2 kLanes ... on; then
  // the same kStep rows on. 8 lanes cover whole sectors, and a wider row costs only constant
  // offsets.
  static constexpr int kLanes = kThreads > 8 * kRows ? 16 : kChunks % 8 == 0 ? 8 : 4;
  static constexpr int kStep = kThreads / kLanes;
  static constexpr int kAcross = kChunks / kLanes;
  static_assert(kRows % kStep == 0 && kStep % 8 == 0, "whole passes, one swizzle for all");

  const char* from;   // this thread's first chunk of row 0 of the matrix
  int64_t row_bytes;  // between rows of the matrix
  uint32_t to;        // this thread's first chunk within a tile
  int row, chunk, dim;

  __device__ __forceinline__ TileLoader(const T* data, int64_t row_stride, int dim_, int thread)
      : row_bytes(row_stride * int64_t(sizeof(T))),
        row(thread / kLanes),
        chunk(thread % kLanes),
        dim(dim_) {
    from = reinterpret_cast<const char*>(data) + row * row_bytes + chunk * 16;
    to = Layout::at(row, chunk);
  }

  // kLanes is a multiple of what the swizzle permutes, or the XOR leaves the bits of kLanes alone.
  __device__ __forceinline__ uint32_t place(int pass, int across) const {
    return to + pass * kStep * Layout::kRowBytes + across * kLanes * 16;
  }
  __device__ __forceinline__ bool inside(int across) const {
    return chunk * Layout::kChunk < dim - across * kLanes * Layout::kChunk;
  }
  // Makes row `rows` of the matrix its row 0.
  __device__ __forceinline__ void advance(int rows) { from += rows * row_bytes; }

  // Rows [first, first + kRows) of the matrix, all of them there, 16-byte aligned.
  __device__ __forceinline__ void load(uint32_t tile, int first) const {
    const char* source = from + first * row_bytes;
#pragma unroll
    for (int pass = 0; pass < kRows / kStep; ++pass) {
#pragma unroll
      for (int across = 0; across < kAcross; ++across)
        if (inside(across)) cp_async_16(tile + place(pass, across), source + across * kLanes * 16);
      source += kStep * row_bytes;
    }
  }

  // Rows [first, first + kRows) of a matrix of `rows` rows; zeros for those beyond.
  __device__ __forceinline__ void load_bounded(uint32_t tile, int first, int rows) const {
#pragma unroll 1
    for (int pass = 0; pass < kRows / kStep; ++pass) {
      const int r = first + row + pass * kStep;
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        const bool there = r < rows && inside(across);
        const char* source = from + (first + pass * kStep) * row_bytes + across * kLanes * 16;
        cp_async_16(tile + place(pass, across), there ? source : from, there ? 16 : 0);
      }
    }
  }

  // The same for rows of any alignment and any dim, element by element, without cp.async.
  __device__ __forceinline__ void load_unaligned(uint32_t tile, int first, int rows) const {
#pragma unroll 1
    for (int pass = 0; pass < kRows / kStep; ++pass) {
      const int r = first + row + pass * kStep;
#pragma unroll 1
      for (int across = 0; across < kAcross; ++across) {
        const T* source = reinterpret_cast<const T*>(from + (first + pass * kStep) * row_bytes) +
                          across * kLanes * Layout::kChunk;
        const int left = r < rows ? dim - (chunk + across * kLanes) * Layout::kChunk : 0;
        union {
          T element[Layout::kChunk];
          uint4 whole;
        } value;
        value.whole = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < Layout::kChunk; ++i)
          if (i < left) value.element[i] = source[i];
        st_shared_v4(tile + place(pass, across), value.whole);
      }
    }
  }

  // Zeros in the columns from dim on, which `load` leaves alone.
  __device__ __forceinline__ void pad(uint32_t tile) const {
#pragma unroll 1
    for (int pass = 0; pass < kRows / kStep; ++pass)
      for (int across = 0; across < kAcross; ++across)
        if (!inside(across)) st_shared_v4(tile + place(pass, across), make_uint4(0, 0, 0, 0));
  }
};

}  // namespace bigkernel
