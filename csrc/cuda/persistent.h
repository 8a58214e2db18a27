// The persistent kernels as the stepwise driver on CUDA calls them. Each cell's are compiled in a file of their own
// (persistent_*.cu): they take long.
#pragma once

#include <cuda_runtime.h>

#include "../persistent/plan.h"
#include "../persistent/span.h"

namespace fusedrnn::persistent {

// Where a span runs.
struct Launch {
  cudaStream_t stream;
  Multiplier multiplier;
  Gpu gpu;
};

template <class Cell>
constexpr Loop loop_of(Multiplier multiplier, int64_t H, bool backward) {
  return {Cell::kGates, Cell::kSplit, Cell::kStates, Cell::kSaved, multiplier, units_for(H), backward};
}

template <class Cell, class T>
cudaError_t launch(const ForwardSpan<T>& span, const Launch& where);
template <class Cell, class T>
cudaError_t launch(const BackwardSpan<T>& span, const Launch& where);

}  // namespace fusedrnn::persistent
