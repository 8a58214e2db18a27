// Who computes a layer: the instruction set in use, or the GPU.
#pragma once

#include "layer.h"

namespace fusedrnn {

struct Backend {
  bool host;                         // the CPU: inference may go past the ops
  bool even_rows;                    // x must have one distance between all its rows (has_even_rows, problem.h)
  bool adds_directions;              // dx is the sum of both directions; else each has a part of its own
  bool small_weights;                // there are kernels for matrices of smaller types
  bool (*has)(int cell, int dtype);  // a kernel
  void (*forward)(const Layer& layer, const ForwardProblem& p);  // both throw where memory or a launch fails
  void (*backward)(const Layer& layer, const BackwardProblem& p);
};

#if defined(FUSEDRNN_CUDA)
extern const Backend kCudaBackend;  // cuda/launch.cpp
#endif

// The kernel of a layer on the CPU, and the bytes of its packed weights.
ForwardKernel forward_kernel(const Layer& layer);
int64_t panel_bytes(const Layer& layer);
// Whether it has kernels there for matrices in int8 and bfloat16.
bool has_small_weights(int cell);

bool has_backend(const Tensor& x);  // in this build
const Backend& backend_of(const Tensor& x);

}  // namespace fusedrnn
