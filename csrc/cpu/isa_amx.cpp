// The CPU kernels of bfloat16 for the tiles of AMX.
#if defined(__x86_64__) && !defined(FUSEDRNN_BASE_ONLY)
#define FUSEDRNN_AMX
#define FUSEDRNN_PAIRED_TABLE kTableAmx
#include "bfloat16_avx512.inl"
#endif
