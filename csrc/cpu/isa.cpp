#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bigkernel {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int kIsas = 5;

// Whether the processor multiplies tiles of bf16, and the operating system lets us: Linux gives
// their registers, 8 KB a thread, to a process that asks.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  constexpr unsigned kTiles = 1u << 24, kBf16 = 1u << 22;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) == 0 || (d & kBf16) == 0)
    return false;
  static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}

// __builtin_cpu_supports asks both CPUID and XGETBV, so a set whose registers the operating system
// does not save does not count.
bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
#ifdef __SANITIZE_ADDRESS__
      if (!__builtin_cpu_supports("avx512bf16")) return false;  // BK_AVX512_COPY
#endif
      return supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::kAvx512Bf16:
      return supported(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::kAmx:
      return supported(Isa::kAvx512Bf16) && may_use_tiles();
  }
  return false;
#else
  return isa == Isa::kPortable;
#endif
}

Isa widest() {
  for (int i = kIsas - 1; i > 0; --i)
    if (supported(Isa(i))) return Isa(i);
  return Isa::kPortable;
}

// Intel cores with AMX, known by their AVX-512 FP16, take four times as long for a dot product of
// bf16 pairs as for an FMA, which does half as much: where AMX is kept from us, converting to fp32
// is twice as fast.
bool dot_products_are_slow() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") && __builtin_cpu_supports("avx512fp16");
#else
  return false;
#endif
}

Isa best() {
  const Isa isa = widest();
  return isa == Isa::kAvx512Bf16 && dot_products_are_slow() ? Isa::kAvx512 : isa;
}

Isa parse(const std::string& name, const char* where) {
  std::string known;
  for (int i = 0; i < kIsas; ++i) {
    if (name == kNames[i]) {
      if (supported(Isa(i))) return Isa(i);
      throw std::invalid_argument(std::string(where) + ": this CPU has no " + name +
                                  "; it runs up to " + isa_name(widest()));
    }
    known += (i ? ", " : "") + std::string(kNames[i]);
  }
  throw std::invalid_argument(std::string(where) + " must be one of " + known + ", got '" + name +
                              "'");
}

// BIGKERNEL_CPU_ISA is read by bigkernel/_native.py, which can raise.
std::atomic<Isa> g_isa{best()};

}  // namespace

Isa current_isa() { return g_isa.load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsas; ++i)
    if (supported(Isa(i))) names.push_back(kNames[i]);
  return names;
}

bool multiplies_bf16() { return current_isa() >= Isa::kAvx512 && supported(Isa::kAvx512Bf16); }

void force_isa(const std::string& name) { g_isa = parse(name, "BIGKERNEL_CPU_ISA"); }

}  // namespace bigkernel
