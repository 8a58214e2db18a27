// The persistent kernels of a type, for every cell.
#define FUSEDRNN_TYPE __half
#include "persistent.inl"
