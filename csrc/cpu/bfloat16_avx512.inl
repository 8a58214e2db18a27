// The CPU kernels of bfloat16 for AVX-512 and instructions that multiply bfloat16; the other types are those of
// isa_avx512.cpp. Included by an isa_*.cpp that has set FUSEDRNN_PAIRED_TABLE and, for tiles, FUSEDRNN_AMX. See
// kernels.inl.
#include <omp.h>
#include <sched.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "dispatch.h"
#include "plan.h"

#if defined(FUSEDRNN_AVX2_AS_AVX512)  // these kernels on AVX2, which does what the processor would: `make test-avx512`
#pragma GCC target("avx2,fma")
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif
#if !defined(FUSEDRNN_AVX2_AS_AVX512)
#define FUSEDRNN_BF16_PRODUCTS
#endif
#include "../cells/registry.h"
#include "constants.h"

#define FUSEDRNN_VECTOR_BYTES 64
#include "kernels.inl"

#if defined(__clang__) && !defined(FUSEDRNN_AVX2_AS_AVX512)
#pragma clang attribute pop
#endif
