// The list of cells. A new cell is a struct, a line here, an entry in fusedrnn/cells.py and a module class.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"
#include "rules.h"

namespace fusedrnn {

template <class... Cells>
struct CellList {};

using Registry = CellList<RnnTanh,          //
                          RnnRelu,          //
                          ResidualRnn,      //
                          Lstm,             //
                          Gru,              //
                          GruResetBefore>;  //

}  // namespace fusedrnn
