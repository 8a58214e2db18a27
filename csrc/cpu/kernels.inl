// The CPU kernels of one instruction set: everything an isa_*.cpp holds, and the table that leads to it.
// The file that includes this has set FUSEDRNN_VECTOR_BYTES, FUSEDRNN_TABLE, FUSEDRNN_ISA_NAME and the target.
// All of it has internal linkage: a symbol the linker could share between instruction sets would let a function
// compiled for a newer CPU run on an older one. So no STL containers, no torch headers here.

namespace fusedrnn {
namespace {

#include "vec.h"
//
#include "gemm.h"
//
#include "team.h"
//
#include "forward.inl"
//
#include "backward.inl"

template <class S>
void activation(int function, const S* x, S* y, int64_t n) {
  constexpr int L = Vec<S>::kLanes;
  for (int64_t i = 0; i < n; i += L) {
    const Vec<S> v = load<S>(x + i, n - i);
    store(y + i, function == 0 ? sigmoid(v) : tanh(v), n - i);
  }
}

template <class... Cells>
constexpr KernelTable make_table(CellList<Cells...>) {
  return {FUSEDRNN_ISA_NAME,
          FUSEDRNN_VECTOR_BYTES,
          {{ForwardPass<Cells, float>::run, ForwardPass<Cells, double>::run, ForwardPass<Cells, BFloat16>::run}...},
          {{BackwardPass<Cells, float>::run, BackwardPass<Cells, double>::run, BackwardPass<Cells, BFloat16>::run}...},
          activation<float>,
          activation<double>};
}

}  // namespace

extern const KernelTable FUSEDRNN_TABLE = make_table(Registry{});

}  // namespace fusedrnn
