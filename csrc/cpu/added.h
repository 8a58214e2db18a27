// Cells that are compiled after this library, each in a library of its own (csrc/added/cell.cpp), and what they ask of
// this one. They are added for the rest of the process.
#pragma once

#include "dispatch.h"

namespace fusedrnn {

struct Services {
  uint64_t layout;  // added_layout() of this library, the first member for ever
  void* (*acquire_scratch)(int64_t bytes);
  void (*release_scratch)();
  bool (*forked)();
};

struct CudaTable;  // cuda/device.h

struct AddedCell {
  uint64_t layout;  // likewise of the cell's
  CellConstants constants;
  const KernelTable* kernels;  // of this cell alone, of the instruction set in use
  const CudaTable* cuda;       // likewise, or null
};

// Of what crosses, by size: an added cell of other headers is refused.
constexpr uint64_t added_layout() {
  uint64_t all = 0;
  for (const uint64_t size : {sizeof(Services), sizeof(AddedCell), sizeof(KernelTable), sizeof(ForwardProblem),
                              sizeof(BackwardProblem), sizeof(CellConstants)}) {
    all = all * 1000003 + size;
  }
  return all;
}

const Services& services();
// Null, or why the cell is not added. It must stay where it is.
const char* add_cell(const AddedCell* cell);

int added_cells();
const AddedCell& added_cell(int index);

}  // namespace fusedrnn
