// The list of cells, in the order of fusedrnn/cells.py. CONTRIBUTING.md says what else a new cell needs.
#pragma once

#include "gru.h"
#include "indrnn.h"
#include "lstm.h"
#include "mgu.h"
#include "peephole.h"
#include "rnn.h"
#include "rules.h"
#include "unit_parameters.h"

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
    GruResetBefore,
    Mgu,
    PeepholeLstm,
    IndRnnTanh,
    IndRnnRelu>;
// clang-format on

}  // namespace fusedrnn
