// See backend.h. No other file chooses by the device of a tensor.
#include "target.h"

#include "backend.h"

namespace fusedrnn {
namespace {

bool host_has(int cell, int dtype) {
  const auto [table, place] = kernels_of(cell);
  return table->forward[place][dtype] != nullptr;
}

const SmallWeightsTable* small_weights(const KernelTable& table, Matrices matrices) {
  switch (matrices) {
    case Matrices::kInt8: return table.int8;
    case Matrices::kBFloat16: return table.bfloat16;
    default: return nullptr;
  }
}

void host_forward(const Layer& layer, const ForwardProblem& p) { check_memory(forward_kernel(layer)(p)); }

void host_backward(const Layer& layer, const BackwardProblem& p) {
  const auto [table, place] = kernels_of(layer.cell);
  check_memory(table->backward[place][layer.kernel_dtype()](p));
}

}  // namespace

ForwardKernel forward_kernel(const Layer& layer) {
  const auto [table, place] = kernels_of(layer.cell);
  const SmallWeightsTable* const small = small_weights(*table, layer.matrices);
  return small ? small->forward[place] : table->forward[place][layer.kernel_dtype()];
}

int64_t panel_bytes(const Layer& layer) {
  const auto [table, place] = kernels_of(layer.cell);
  const SmallWeightsTable* const small = small_weights(*table, layer.matrices);
  const auto bytes = small ? small->panel_bytes[place] : table->panel_bytes[place][layer.kernel_dtype()];
  return bytes(layer.size);
}

bool has_small_weights(int cell) {
  return cell_constants(cell).parameters == 0 && cell_constants(cell).states <= 2 &&
         kernels_of(cell).table->int8 != nullptr;
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
