// The CPU kernels of bfloat16 for the instruction of AVX512_BF16.
#if defined(__x86_64__) && !defined(FUSEDRNN_BASE_ONLY)
#define FUSEDRNN_PAIRED_TABLE kTableAvx512Bf16
#include "bfloat16_avx512.inl"
#endif
