// The CPU kernels for AVX-512 (F, BW, DQ, VL). See kernels.inl.
#if defined(__x86_64__) && !defined(FUSEDRNN_BASE_ONLY)
#include <omp.h>
#include <sched.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "dispatch.h"
#include "plan.h"

#if defined(FUSEDRNN_AVX2_AS_AVX512)  // these kernels on AVX2, two registers a vector: `make test-avx512`
#pragma GCC target("avx2,fma")
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include "../cells/registry.h"
#include "constants.h"

#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_TABLE kTableAvx512
#define FUSEDRNN_INT8_OF_TABLE kInt8Avx2  // without VNNI, four instructions of half the width beat more of the whole
#define FUSEDRNN_BFLOAT16_TABLE kBFloat16Avx512
#define FUSEDRNN_ISA_NAME "avx512"
#include "kernels.inl"

#if defined(__clang__) && !defined(FUSEDRNN_AVX2_AS_AVX512)
#pragma clang attribute pop
#endif
#endif
