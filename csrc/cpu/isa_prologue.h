// Every standard header a vector body may need, included before the instruction set is switched
// on: an inline function of the standard library must never be compiled with AVX-512, since the
// linker keeps one copy for the whole program.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
// GCC 12 writes "any value" in its own AVX-512 headers as a variable that is initialized with
// itself.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "common/dtypes.h"
#include "common/philox.h"
#include "cpu/isa.h"
