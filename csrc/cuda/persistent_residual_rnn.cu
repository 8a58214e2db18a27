// The persistent kernels of a cell.
#define FUSEDRNN_CELL ResidualRnn
#include "persistent.inl"
