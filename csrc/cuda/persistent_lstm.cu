// The persistent kernels of a cell.
#define FUSEDRNN_CELL Lstm
#include "persistent.inl"
