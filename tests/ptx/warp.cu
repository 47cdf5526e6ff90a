// Kernels of test_warp.py.
#include <stdint.h>
#define K extern "C" __global__ void
#define T threadIdx.x
#define SHUFFLE(NAME, CALL)                    \
  K shfl_##NAME(const int* x, int* o, int d) { \
    int v = x[T];                              \
    o[T] = CALL;                               \
  }
SHUFFLE(bfly, __shfl_xor_sync(~0u, v, d));
SHUFFLE(up, __shfl_up_sync(~0u, v, d));
SHUFFLE(down, __shfl_down_sync(~0u, v, d));
SHUFFLE(idx, __shfl_sync(~0u, v, d));
SHUFFLE(down8, __shfl_down_sync(~0u, v, d, 8));
SHUFFLE(up8, __shfl_up_sync(~0u, v, d, 8));
SHUFFLE(idx8, __shfl_sync(~0u, v, d + (int)T, 8));
K shfl_half_warp(const int* x, int* o) {
  if (T % 32 < 16)
    o[T] = __shfl_xor_sync(0xffffu, x[T], 5);
  else
    o[T] = -1;
}
K shfl_long(const double* x, double* o) { o[T] = __shfl_xor_sync(~0u, x[T], 9); }
K vote(const int* x, unsigned* o) {
  o[T] = __ballot_sync(~0u, x[T] & 1);
  o[T + 64] = __any_sync(~0u, x[T] > 90) * 4 + __all_sync(~0u, x[T] >= 0) * 2;
  if (x[T] & 1)
    o[T + 128] = __activemask();
  else
    o[T + 128] = __ballot_sync(__activemask(), x[T] & 2);
}
K match(const int* x, unsigned* o) {
  int all;
  o[T] = __match_any_sync(~0u, x[T] & 3);
  o[T + 64] = __match_all_sync(~0u, x[T] & 0x100, &all);
  o[T + 128] = all;
}
K redux(const int* x, int* o) {
  o[T] = __reduce_add_sync(~0u, x[T]);
  o[T + 64] = __reduce_min_sync(~0u, x[T]);
  o[T + 128] = __reduce_max_sync(~0u, x[T]);
  o[T + 192] = __reduce_or_sync(~0u, (unsigned)x[T]);
  o[T + 256] = __reduce_and_sync(~0u, (unsigned)x[T]);
  o[T + 320] = __reduce_xor_sync(~0u, (unsigned)x[T]);
  o[T + 384] = T % 32 < 8 ? __reduce_add_sync(0xffu, x[T]) : 0;
}
#define LDMATRIX(NAME, N, TRANS)                                                  \
  K ldmatrix_##NAME(const uint4* x, unsigned* o) {                                \
    __shared__ uint4 s[8 * N];                                                    \
    if (T < 8 * N) s[T] = x[T];                                                   \
    __syncthreads();                                                              \
    unsigned r[4] = {}, at = (unsigned)__cvta_generic_to_shared(&s[T % (8 * N)]); \
    LOAD##N(TRANS) for (int j = 0; j < N; j++) o[32 * j + T] = r[j];              \
  }
#define LOAD1(TRANS)                                                           \
  asm volatile("ldmatrix.sync.aligned.m8n8.x1" TRANS ".shared.b16 {%0}, [%1];" \
               : "=r"(r[0])                                                    \
               : "r"(at));
#define LOAD2(TRANS)                                                               \
  asm volatile("ldmatrix.sync.aligned.m8n8.x2" TRANS ".shared.b16 {%0, %1}, [%2];" \
               : "=r"(r[0]), "=r"(r[1])                                            \
               : "r"(at));
#define LOAD4(TRANS)                                                                       \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" TRANS ".shared.b16 {%0, %1, %2, %3}, [%4];" \
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                            \
               : "r"(at));
LDMATRIX(x1, 1, "");
LDMATRIX(x2, 2, "");
LDMATRIX(x4, 4, "");
LDMATRIX(x1_trans, 1, ".trans");
LDMATRIX(x2_trans, 2, ".trans");
LDMATRIX(x4_trans, 4, ".trans");
