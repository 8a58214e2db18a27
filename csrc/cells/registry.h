// The list of cells, in the order of fusedrnn/cells.py. CONTRIBUTING.md says what else a new cell needs.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"
#include "rules.h"

namespace fusedrnn {

template <class... Cells>
struct CellList {};

// clang-format off
using Registry = CellList<
    RnnTanh,
    RnnRelu,
    ResidualRnn,
    Lstm,
    Gru,
    GruResetBefore>;
// clang-format on

}  // namespace fusedrnn
