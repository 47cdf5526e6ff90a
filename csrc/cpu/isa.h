// Which instruction set the CPU kernels use: chosen when the process starts, by what the CPU and
// the operating system offer and what is fast there, never by the build host.
#pragma once
#include <string>
#include <vector>

namespace bigkernel {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

Isa current_isa();
const char* isa_name(Isa isa);
std::vector<std::string> available_isas();  // what this machine and this build can run
void force_isa(const std::string& name);    // throws std::invalid_argument

// Whether torch multiplies matrices of bf16 faster than those of fp32, within the current set.
bool multiplies_bf16();

}  // namespace bigkernel

// A body compiled once per instruction set is declared in all of them and called through the
// current one:
//   BK_DECLARE_PER_ISA(void adam_update(const AdamArgs& args, int64_t begin, int64_t end))
//   BK_CALL(adam_update)(args, begin, end);
// AMX multiplies matrices of bf16, and only where that is what is to be done (BK_CALL_PRODUCTS,
// with whether it is) is there a copy for it: for the rest its processors are those with AVX-512.
#if defined(__x86_64__)
#define BK_DECLARE_PER_ISA(...) \
  namespace portable {          \
  __VA_ARGS__;                  \
  }                             \
  namespace avx2 {              \
  __VA_ARGS__;                  \
  }                             \
  namespace avx512 {            \
  __VA_ARGS__;                  \
  }                             \
  namespace avx512_bf16 {       \
  __VA_ARGS__;                  \
  }                             \
  namespace amx {               \
  __VA_ARGS__;                  \
  }
// A sanitized build has one copy for both kinds of AVX-512: they read and write the same places.
#ifdef __SANITIZE_ADDRESS__
#define BK_AVX512_COPY avx512_bf16
#else
#define BK_AVX512_COPY avx512
#endif
#define BK_CALL(function)                                                                 \
  (::bigkernel::current_isa() == ::bigkernel::Isa::kAvx512Bf16 ? avx512_bf16::function    \
   : ::bigkernel::current_isa() == ::bigkernel::Isa::kAvx512   ? BK_AVX512_COPY::function \
   : ::bigkernel::current_isa() == ::bigkernel::Isa::kAmx      ? BK_AVX512_COPY::function \
   : ::bigkernel::current_isa() == ::bigkernel::Isa::kAvx2     ? avx2::function           \
                                                               : portable::function)
#define BK_CALL_PRODUCTS(are_bf16, function)                                          \
  ((are_bf16) && ::bigkernel::current_isa() == ::bigkernel::Isa::kAmx ? amx::function \
                                                                      : BK_CALL(function))
#else
#define BK_DECLARE_PER_ISA(...) \
  namespace portable {          \
  __VA_ARGS__;                  \
  }
#define BK_CALL(function) portable::function
#define BK_CALL_PRODUCTS(are_bf16, function) portable::function
#endif
