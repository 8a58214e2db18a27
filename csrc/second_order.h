// Gradients of a single step that are differentiated again, by autograd of C++: the first by the kernel, the second by
// hand (docs/derivations.md, section T). Beyond the second the long way goes on.
#pragma once

#include "training.h"

namespace fusedrnn {

// Whether there are second derivatives by hand for the cell: on the CPU, in float32 and float64.
bool differentiates_twice(const CellStep& step);

// What the long way gives for plain tensors, with its graph: the gradients of x, the states and the weights.
std::vector<at::Tensor> gradients_with_graph(const StepGradients& of);

}  // namespace fusedrnn
