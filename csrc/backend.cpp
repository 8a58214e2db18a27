// See backend.h. No other file chooses by the device of a tensor.
#include "target.h"

#include "backend.h"

namespace fusedrnn {
namespace {

bool host_has(int cell, int dtype) { return kernels().forward[cell][dtype] != nullptr; }

const SmallWeightsTable* small_weights(const Layer& layer) {
  switch (layer.matrices) {
    case Matrices::kInt8: return kernels().int8;
    case Matrices::kBFloat16: return kernels().bfloat16;
    default: return nullptr;
  }
}

void host_forward(const Layer& layer, const ForwardProblem& p) { check_memory(forward_kernel(layer)(p)); }

void host_backward(const Layer& layer, const BackwardProblem& p) {
  check_memory(kernels().backward[layer.cell][layer.kernel_dtype()](p));
}

}  // namespace

ForwardKernel forward_kernel(const Layer& layer) {
  const SmallWeightsTable* const small = small_weights(layer);
  return small ? small->forward[layer.cell] : kernels().forward[layer.cell][layer.kernel_dtype()];
}

int64_t panel_bytes(const Layer& layer) {
  const SmallWeightsTable* const small = small_weights(layer);
  const auto bytes = small ? small->panel_bytes[layer.cell] : kernels().panel_bytes[layer.cell][layer.kernel_dtype()];
  return bytes(layer.size);
}

bool has_backend(const Tensor& x) {
#if defined(FUSEDRNN_CUDA)
  if (x.device().is_cuda()) return true;
#endif
  return x.device().is_cpu();
}

const Backend& backend_of(const Tensor& x) {
#if defined(FUSEDRNN_CUDA)
  if (x.device().is_cuda()) return kCudaBackend;
#endif
  static const Backend host = {true, kernels().even_rows, false, true, host_has, host_forward, host_backward};
  return host;
}

}  // namespace fusedrnn
