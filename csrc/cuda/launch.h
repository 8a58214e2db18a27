// A layer on the GPU: workspace and stream from torch, products from cuBLAS, everything else from device.h.
#pragma once

#include "../layer.h"

namespace fusedrnn {

void cuda_forward(const Layer& layer, const ForwardProblem& p);
void cuda_backward(const Layer& layer, const BackwardProblem& p);

}  // namespace fusedrnn
