// The persistent kernels of a type, for every cell.
#define FUSEDRNN_TYPE float
#include "persistent.inl"
