// Inference of stacked layers on a dense batch, by the shortest way, with packed weights kept from call to call.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>

#include "layer.h"

namespace fusedrnn {

// What is kept for one module: for each layer a digest of its weights and, once the same weights have come a second
// time, their panels. Every call computes the digest of the weights it is given, so that a change of theirs is seen,
// however it was made. Calls from several threads may share one.
class PackedWeights {
 public:
  struct Layer {
    explicit Layer(uint64_t digest, Tensor memory = {}) : digest(digest), memory(std::move(memory)) {}
    const uint64_t digest;
    const Tensor memory;  // undefined: not packed yet
    Panels panels{nullptr, 0, false};
    mutable std::atomic<int> passed_over{0};  // calls in a row that shared the units otherwise and packed themselves
  };
  std::shared_ptr<const Layer> find(size_t layer) const;
  void keep(size_t layer, std::shared_ptr<const Layer> found);
  int64_t bytes() const;
  std::atomic<int64_t> uses{0};  // how often panels were used that an earlier call had packed

 private:
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<const Layer>> layers_;
};

// The part of h and of c that a step keeps, 0 for none (StateNoise of problem.h, the same for all).
using Zoneout = std::pair<double, double>;

// What a module of stacked layers says of itself and is given.
struct ModuleCall {
  int cell;
  bool one_step;  // x [B, I] of a single step; else [T, B, I]
  int64_t layers, directions, I, H, R;
  Tensor x;
  OptionalTensor h0, c0;  // [layers * directions, B, *]; of a single step [B, *]. All of the cell's states, or none
  Tensors weights;        // of each layer and direction in turn
  std::optional<Tensors> scales = {};  // likewise, of matrices of a smaller type (matrices_of)
  int64_t parts() const { return layers * directions; }
};

// Whether the kernels take the call as it is: plain tensors on one device, of a type that kernels have, of the sizes
// that the module says, and their memory there. It throws nothing, and what fits is not refused later.
bool fits(const ModuleCall& call);

// Whether inference and steps may call the kernels: on the CPU, and not for float16, which some sets widen.
bool has_kernels(const Tensor& x);

// A call of one layer as the ops have it: those of a single step with a dimension of time, which is one.
LayerArguments arguments_of(const ModuleCall& call);

// The results of a call that fits: y, h_n, c_n; those of a single step have no dimension of time. None where only the
// ops will do: not on the CPU, float16, someone listens to what torch does.
using Inferred = std::tuple<Tensor, Tensor, Tensor>;
std::optional<Inferred> infer(const ModuleCall& call, PackedWeights& kept, const Zoneout& zoneout);

// One step at a time through stacked layers of one direction: the sizes are checked once, for one batch size and
// weights of these shapes; every step is given its tensors, the weights too, and keeps none of their addresses.
class Stepper {
 public:
  // For calls like this one, of a single step and of one direction. None where only the ops will do.
  static std::unique_ptr<Stepper> make(const ModuleCall& call, const Zoneout& zoneout);
  size_t weights() const { return weights_; }
  size_t scales() const { return shapes_.size() - weights_; }
  bool two_states() const { return two_states_; }
  // y [B, R], h_n [layers, B, R], c_n [layers, B, H], from x [B, I], all states, of these shapes, or none, and as many
  // weights and scales. None if a tensor differs from the one that it was prepared for, or someone listens to torch.
  std::optional<Inferred> step(const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                               const Tensors& weights, const Tensors& scales) const;

 private:
  static bool fits(const Tensor& t, Sizes shape, Elements elements);

  Tensor keep_;                // what the problems' noise points to
  std::vector<Layer> layers_;  // without tensors
  std::vector<ForwardProblem> problems_;
  struct Form {
    std::vector<int64_t> shape;
    Elements elements;
  };
  std::vector<Form> shapes_;  // of the weights, then of the scales
  size_t weights_ = 0;
  Elements elements_ = 0;
  bool two_states_ = false;
};

}  // namespace fusedrnn
