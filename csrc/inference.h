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
    explicit Layer(uint64_t digest, at::Tensor memory = {}) : digest(digest), memory(std::move(memory)) {}
    const uint64_t digest;
    const at::Tensor memory;  // undefined: not packed yet
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

// y, h_n, c_n of `layers` layers: x [T, B, I]; h0, c0 [layers * D, B, *]; weights of each layer and direction in turn.
// zoneout: the part of h and of c that a step keeps, 0 for none (StateNoise of problem.h, the same for all).
// None if the tensors do not fit the layers, some of them is not a plain one on the CPU, or someone listens to what
// torch does: the ops serve those, or word the error.
using Inferred = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Zoneout = std::pair<double, double>;
std::optional<Inferred> infer(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                              const std::vector<at::Tensor>& weights, const std::string& cell, bool bidirectional,
                              int64_t layers, PackedWeights& kept, const Zoneout& zoneout);

// One step at a time through stacked layers of one direction: the sizes are checked once, for one batch size and
// weights of these shapes; every step is given its tensors, the weights too, and keeps none of their addresses.
class Stepper {
 public:
  // None if the tensors do not fit or are no plain ones on the CPU: x [B, I].
  static std::unique_ptr<Stepper> make(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                                       const std::string& cell, int64_t layers, const Zoneout& zoneout);
  size_t weights() const { return shapes_.size(); }
  bool two_states() const { return layers_[0].constants().states == 2; }
  // Whether a step can read weight i as it is now.
  bool fits(size_t i, const at::Tensor& weight) const;
  // y [B, R], h_n [layers, B, R], c_n [layers, B, H], from x [B, I], all states, of these shapes, or none, and weights
  // that fit. None if x or the states are others than the prepared ones, or someone listens to torch.
  std::optional<Inferred> step(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                               at::TensorList weights) const;

 private:
  bool fits(const at::Tensor& t, at::IntArrayRef shape) const;

  at::Tensor keep_;                // what the problems' noise points to
  std::vector<Layer> layers_;      // without tensors
  std::vector<ForwardProblem> problems_;
  std::vector<at::DimVector> shapes_;  // of the weights
  at::TensorOptions options_;
};

}  // namespace fusedrnn
