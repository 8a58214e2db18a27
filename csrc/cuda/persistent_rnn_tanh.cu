// The persistent kernels of a cell.
#define FUSEDRNN_CELL RnnTanh
#include "persistent.inl"
