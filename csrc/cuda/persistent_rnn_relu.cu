// The persistent kernels of a cell.
#define FUSEDRNN_CELL RnnRelu
#include "persistent.inl"
