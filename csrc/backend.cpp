// See backend.h. No other file chooses by the device of a tensor.
#include "target.h"

#include "backend.h"

namespace fusedrnn {
namespace {

bool host_has(int cell, int dtype) { return kernels().forward[cell][dtype] != nullptr; }

bool host_has_int8(int) { return true; }

void host_forward(const Layer& layer, const ForwardProblem& p) { check_memory(forward_kernel(layer)(p)); }

void host_backward(const Layer& layer, const BackwardProblem& p) {
  check_memory(kernels().backward[layer.cell][layer.kernel_dtype()](p));
}

}  // namespace

ForwardKernel forward_kernel(const Layer& layer) {
  const KernelTable& table = kernels();
  return layer.scales.empty() ? table.forward[layer.cell][layer.kernel_dtype()] : table.int8->forward[layer.cell];
}

int64_t panel_bytes(const Layer& layer) {
  const KernelTable& table = kernels();
  const auto bytes =
      layer.scales.empty() ? table.panel_bytes[layer.cell][layer.kernel_dtype()] : table.int8->panel_bytes[layer.cell];
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
  static const Backend host = {true, kernels().even_rows, false, host_has, host_has_int8, host_forward, host_backward};
  return host;
}

}  // namespace fusedrnn
