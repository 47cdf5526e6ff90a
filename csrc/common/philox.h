// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four
// 32-bit words that are a function of a 64-bit key and a 128-bit counter, so that every backend
// sees the same numbers. bigkernel/random.py is the same function in PyTorch.
#pragma once
#include "common/dtypes.h"

namespace bigkernel {

struct Philox4 {
  uint32_t word[4];
};

BK_HD Philox4 philox4x32(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0;
    const uint64_t b = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(b >> 32) ^ c1 ^ k0;
    const uint32_t n2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c0 = n0;
    c1 = uint32_t(b);
    c2 = n2;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Philox4{{c0, c1, c2, c3}};
}

}  // namespace bigkernel
