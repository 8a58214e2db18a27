// fusedrnn.layer.autograd differentiates layers. A call of an op by itself, from a trace say, has no gradient: an
// error.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

TORCH_LIBRARY_IMPL(fusedrnn, Autograd, m) {
  m.impl("layer_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("layer_backward", torch::autograd::autogradNotImplementedFallback());
}
