// The persistent kernels of a cell.
#define FUSEDRNN_CELL Gru
#include "persistent.inl"
