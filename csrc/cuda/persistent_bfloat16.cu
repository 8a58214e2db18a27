// The persistent kernels of a type, for every cell.
#define FUSEDRNN_TYPE __nv_bfloat16
#include "persistent.inl"
