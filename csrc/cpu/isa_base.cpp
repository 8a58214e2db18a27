// The CPU kernels for the compiler's default target: runs anywhere, NEON on Arm. See kernels.inl.
#include <omp.h>
#include <sched.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "dispatch.h"
#include "plan.h"

#include "../cells/registry.h"
#include "constants.h"

#define FUSEDRNN_VECTOR_BYTES 16
#define FUSEDRNN_TABLE kTableBase
#define FUSEDRNN_INT8_TABLE kInt8Base
#define FUSEDRNN_INT8_OF_TABLE kInt8Base
#define FUSEDRNN_BFLOAT16_TABLE kBFloat16Base
#define FUSEDRNN_ISA_NAME "base"
#include "kernels.inl"
