// torch's C++ tensors as csrc/tensor.h's, and back, without a call of the C interface: for the module _fast alone.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include "tensor.h"

namespace fusedrnn {

// A tensor whose data is what it seems: no subclass, no wrapper of torch.func, no view that must be resolved first.
inline bool plain(const at::Tensor& t) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kPlain({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU,
                                        DispatchKey::CUDA, DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA,
                                        DispatchKey::ADInplaceOrView});
  return t.defined() && kPlain.has_all(t.key_set());
}

// As Tensor::lent asks for them.
inline Facts facts(const at::Tensor& t) {
  Facts f;
  f.dim = t.dim();
  f.numel = t.numel();
  f.storage_offset = t.storage_offset();
  f.storage_bytes = static_cast<int64_t>(t.storage().nbytes());
  const int64_t known = std::min<int64_t>(f.dim, Facts::kMost);
  std::copy_n(t.sizes().begin(), known, f.sizes);
  std::copy_n(t.strides().begin(), known, f.strides);
  f.elements = static_cast<int32_t>(t.scalar_type());
  f.element_bytes = t.element_size();
  f.device = {static_cast<int32_t>(t.device().type()), t.device().index()};
  f.contiguous = t.is_contiguous();
  f.data = t.storage().data() ? const_cast<void*>(t.const_data_ptr()) : nullptr;
  return f;
}

// A plain tensor that the caller holds for longer.
inline Tensor borrowed(at::Tensor& t) {
  return Tensor::lent(torch::aot_inductor::tensor_pointer_to_tensor_handle(&t), facts(t));
}

inline at::Tensor as_torch(const Tensor& t) {
  return t.defined() ? *torch::aot_inductor::tensor_handle_to_tensor_pointer(t.handle()) : at::Tensor();
}

}  // namespace fusedrnn
