// The persistent kernels as the stepwise driver on CUDA calls them. Those of each type are compiled in a file of their
// own (persistent_*.cu): they take long.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../cells/registry.h"
#include "../cpu/dispatch.h"
#include "../persistent/plan.h"
#include "../persistent/span.h"

namespace fusedrnn::persistent {

// Where a span runs.
struct Launch {
  cudaStream_t stream;
  Multiplier multiplier;
  Gpu gpu;
};

// Of every cell of the registry, in its order; null for cells that have no such kernel.
template <class T>
struct Launchers {
  cudaError_t (*forward[kMaxCells])(const ForwardSpan<T>& span, const Launch& where);
  cudaError_t (*backward[kMaxCells])(const BackwardSpan<T>& span, const Launch& where);
};
template <class T>
const Launchers<T>& launchers();

template <class Cell, class... Cells>
constexpr int index_of(CellList<Cells...>) {
  int index = 0;
  static_cast<void>(((std::is_same_v<Cell, Cells> || (++index, false)) || ...));
  return index;
}
template <class Cell, class T>
cudaError_t launch(const ForwardSpan<T>& span, const Launch& where) {
  return launchers<T>().forward[index_of<Cell>(Registry{})](span, where);
}
template <class Cell, class T>
cudaError_t launch(const BackwardSpan<T>& span, const Launch& where) {
  return launchers<T>().backward[index_of<Cell>(Registry{})](span, where);
}

}  // namespace fusedrnn::persistent
