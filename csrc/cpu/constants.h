// What the drivers need to know of a cell without its functions, and what they demand of it.
#pragma once

#include "../cells/layer_norm.h"
#include "dispatch.h"

namespace fusedrnn {

template <class Cell>
constexpr CellConstants constants_of() {
  static_assert(!Cell::kProjectable || (Cell::kStates == 2 && Cell::kParameters == 0),
                "the drivers project cells with two states, whose last weight is W_hr");
  static_assert(Cell::kFirst > 0 || (Cell::kParameters > 0 && Cell::kStates == 1),
                "a cell without a product has one state, and parameters of its units");
  static_assert(Cell::kStates == 1 || (Cell::kFirst == Cell::kGates && Cell::kSaved > 0),
                "of a cell with more states than one the drivers make one product, and save something");
  static_assert(Cell::kStates <= 2 || Cell::kParameters == 0, "dc_of of many states gets no parameters");
  return {Cell::kName,
          Cell::kGates,
          Cell::kStates,
          Cell::kSaved,
          Cell::kFirst,
          Cell::kSplit,
          Cell::kParameters,
          Cell::kProjectable,
          NormsOf<Cell>::kColumns,
          NormsOf<Cell>::kRowValues,
          Cell::kLate,
          NormsOf<Cell>::kCount,
          NormsOf<Cell>::kGateSplit,
          NormsOf<Cell>::kOwnSaved,
          NormsOf<Cell>::kFirstArgument};
}

// A set's table with the kernels of bfloat16 of another.
inline KernelTable with_pairs(const char* name, KernelTable table, const PairedTable& pairs) {
  constexpr int kType = static_cast<int>(DType::kBFloat16);
  table.name = name;
  for (int cell = 0; cell < kMaxCells; ++cell) {
    table.forward[cell][kType] = pairs.forward[cell];
    table.backward[cell][kType] = pairs.backward[cell];
    table.panel_bytes[cell][kType] = pairs.panel_bytes[cell];
  }
  return table;
}

}  // namespace fusedrnn
