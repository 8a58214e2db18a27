// Training cells one step at a time, with the gradient by autograd of C++: a cell in a loop of Python, whose step takes
// less time than an autograd Function of Python would.
//
// The gradients of the weights are products of few rows in each step, and torch would add as many of them as there are
// steps. Here a step of a cell hands its rows on: between the steps and the weights there is a node
// (WeightSums of training.cpp) that autograd calls after all of them, and that multiplies the rows of all steps at
// once.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <mutex>
#include <vector>

#include "interface.h"

namespace fusedrnn {

// One step of a cell, of tensors that are plain and fit (`fits` of inference.h).
struct CellStep {
  int cell;
  at::Tensor x;                     // [B, I]
  std::vector<at::Tensor> states;   // [B, H] each; none: zeros
  std::vector<at::Tensor> weights;  // w_ih, w_hh[, b_ih, b_hh]
};

struct Sums;  // the node of the steps of a sequence, and what stands for the weights in it

// What is kept for a module between its steps: the way to the last node, for as long as a graph has it.
class KeptSums {
 public:
  struct Found {
    at::Tensor sums;                 // Sums, in a tensor (training.cpp): the graph is to hold it
    std::vector<at::Tensor> stands;  // for the weights; none: a first step, which may be the only one
  };
  // For these weights, what a step before has, or new ones: for the first step of a sequence, after a backward pass.
  Found find(const CellConstants& cell, const CellStep& step);

 private:
  std::mutex mutex_;
  c10::weak_intrusive_ptr<c10::TensorImpl> sums_{c10::intrusive_ptr<c10::TensorImpl>()};
};

// The backward pass of a step where the kernels alone will not do: it is differentiated or mapped over in its turn, or
// somebody looks on. from: gradients of the states; wanted: of x, the states and the weights, in this order.
struct StepGradients {
  const CellStep& step;
  const at::Tensor &h, &saved;  // as the forward pass gave them
  const std::vector<at::Tensor>& from;
  const std::vector<bool>& wanted;
};
using LongWay = std::vector<at::Tensor> (*)(const StepGradients&);

// Before the first step: what is used from then on.
void connect_training(const Interface* library, LongWay long_way);
const Interface& training_library();
LongWay way_of_python();

// As the library takes a step, and a result of it, which nobody else holds, without its first dimension of one: that of
// time or of directions.
ModuleCall call_of(CellStep& step);
at::Tensor without_first(const Tensor& t);

// Whether nobody but autograd looks on, for these gradients and what was saved. Else only the long way will do.
bool all_plain(const std::vector<at::Tensor>& from, const std::vector<at::Tensor>& saved);

// The next states with their graph.
std::vector<at::Tensor> train(CellStep step, KeptSums& kept);

// A dispatch mode, a transform of torch.func, a tracer: whatever wants to see every op.
bool watched();

}  // namespace fusedrnn
