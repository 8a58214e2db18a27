// The CPU kernels of int8 weights for AVX512_VNNI; the others are those of isa_avx512.cpp. See kernels.inl.
#if defined(__x86_64__) && !defined(FUSEDRNN_BASE_ONLY)
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif
#include "../cells/registry.h"
#include "constants.h"

#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_VNNI
#define FUSEDRNN_INT8_TABLE kInt8Avx512Vnni
#include "kernels.inl"

#if defined(__clang__) && !defined(FUSEDRNN_AVX2_AS_AVX512)
#pragma clang attribute pop
#endif
#endif
