// The list of cells, in the order of fusedrnn/cells.py. CONTRIBUTING.md says what else a new cell needs.
#pragma once

#include "layer_norm.h"
#include "rules.h"
#include "unit_parameters.h"

#if defined(FUSEDRNN_ADDED_CELL)  // a library of one cell more (csrc/added/cell.cpp), in this file
#include "functions.h"
#include FUSEDRNN_ADDED_HEADER
#else
#include "gru.h"
#include "indrnn.h"
#include "layer_norm_gru.h"
#include "layer_norm_lstm.h"
#include "lstm.h"
#include "mgu.h"
#include "peephole.h"
#include "rnn.h"
#include "slstm.h"
#endif

namespace fusedrnn {

template <class... Cells>
struct CellList {};

// clang-format off
#if defined(FUSEDRNN_ADDED_CELL)
using Registry = CellList<FUSEDRNN_ADDED_CELL>;
#else
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
    IndRnnRelu,
    LayerNormLstm,
    LayerNormGru,
    Slstm>;
#endif
// clang-format on

}  // namespace fusedrnn
