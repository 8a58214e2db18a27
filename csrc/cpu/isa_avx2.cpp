// The CPU kernels for AVX2 and FMA. See kernels.inl.
#if defined(__x86_64__) && !defined(FUSEDRNN_BASE_ONLY)
#include <omp.h>
#include <sched.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "dispatch.h"
#include "plan.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "../cells/registry.h"
#include "constants.h"

#define FUSEDRNN_VECTOR_BYTES 32
#define FUSEDRNN_TABLE kTableAvx2
#define FUSEDRNN_INT8_TABLE kInt8Avx2
#define FUSEDRNN_INT8_OF_TABLE kInt8Avx2
#define FUSEDRNN_BFLOAT16_TABLE kBFloat16Avx2
#define FUSEDRNN_ISA_NAME "avx2"
#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
