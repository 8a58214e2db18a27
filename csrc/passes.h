// The two passes of one layer: what they take and give, every allocation, the call of the backend. For the ops, and for
// who calls them from C++.
#pragma once

#include "layer.h"

namespace fusedrnn {

// Forward: y, h_n, c_n, and `saved`, what the backward pass needs: empty if it is not asked for.
struct LayerOutputs {
  Tensor y, h_n, c_n, saved;
};
LayerOutputs forward_pass(const LayerArguments& given, bool save);

// What later computations send back; each may be undefined.
struct Cotangents {
  OptionalTensor y, h_n, c_n, c;  // rows, states, states, rows
};

// Which gradients are wanted besides those of h0 and c0.
struct Needs {
  bool x, weights, gates, norms;
};

struct Limits {
  int64_t bptt_steps = 0;
  double clip = 0;
  bool by_norm = false;
};

// What is not wanted is empty.
struct LayerGradients {
  Tensor x, h0, c0;
  Tensors weights;
  Tensor gates, h, norms;
  Tensor x_part[2];  // the directions are worked on at the same time
};

// Hand-derived gradients; y and saved as forward_pass gave them.
LayerGradients backward_pass(const LayerArguments& given, const Cotangents& from, const Tensor& y, const Tensor& saved,
                             const Needs& need, const Limits& limits);

}  // namespace fusedrnn
