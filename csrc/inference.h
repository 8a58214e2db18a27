// Inference of stacked layers on a dense batch, by the shortest way, with packed weights kept from call to call.
#pragma once

#include <memory>
#include <mutex>
#include <tuple>

#include "layer.h"

namespace fusedrnn {

// What is kept for one module: for each layer a digest of its weights and, once the same weights have come a second
// time, their panels. Every call computes the digest of the weights it is given, so that a change of theirs is seen,
// however it was made. Calls from several threads may share one.
class PackedWeights {
 public:
  struct Layer {
    uint64_t digest;
    at::Tensor memory;  // undefined: not packed yet
    Panels panels;
  };
  std::shared_ptr<const Layer> find(size_t layer) const;
  void keep(size_t layer, std::shared_ptr<const Layer> found);
  int64_t bytes() const;

 private:
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<const Layer>> layers_;
};

// y, h_n, c_n of `layers` layers: x [T, B, I]; h0, c0 [layers * D, B, *]; weights of each layer and direction in turn.
// None if some tensor is not a plain one on the CPU, or someone listens to what torch does: the ops serve those.
using Inferred = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
std::optional<Inferred> infer(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                              const std::vector<at::Tensor>& weights, const std::string& cell, bool bidirectional,
                              int64_t layers, PackedWeights& kept);

}  // namespace fusedrnn
