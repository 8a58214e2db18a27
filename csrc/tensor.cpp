// See tensor.h.
#include "target.h"

#include "tensor.h"

#include <array>

namespace fusedrnn {
namespace {

struct Known {
  const char* name;
  int32_t type;
};

const std::array<Known, kDTypes>& known() {  // in the order of DType
  static const std::array<Known, kDTypes> types = {Known{"float32", aoti_torch_dtype_float32()},
                                                   {"float64", aoti_torch_dtype_float64()},
                                                   {"bfloat16", aoti_torch_dtype_bfloat16()},
                                                   {"float16", aoti_torch_dtype_float16()}};
  return types;
}

const char* other_name(int32_t type) {
  const Known others[] = {{"uint8", aoti_torch_dtype_uint8()},         {"int8", aoti_torch_dtype_int8()},
                          {"int16", aoti_torch_dtype_int16()},         {"int32", aoti_torch_dtype_int32()},
                          {"int64", aoti_torch_dtype_int64()},         {"bool", aoti_torch_dtype_bool()},
                          {"complex64", aoti_torch_dtype_complex64()}, {"complex128", aoti_torch_dtype_complex128()}};
  for (const Known& other : others) {
    if (other.type == type) return other.name;
  }
  return "another type";
}

void delete_tensor(AtenTensorHandle handle) { aoti_torch_delete_tensor_object(handle); }

}  // namespace

std::ostream& operator<<(std::ostream& out, Sizes sizes) {
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  return out << ']';
}

std::ostream& operator<<(std::ostream& out, Device device) {
  if (device.is_cpu()) return out << "cpu";
  if (device.is_cuda()) return out << "cuda:" << device.index;
  return out << (device.type == aoti_torch_device_type_meta() ? "meta" : "another device");
}

Elements::Elements(DType dtype) : type(known()[static_cast<int>(dtype)].type) {}

int Elements::kernel_dtype() const {
  for (int i = 0; i < kDTypes; ++i) {
    if (known()[i].type == type) return i;
  }
  return -1;
}

std::ostream& operator<<(std::ostream& out, Elements elements) {
  const int known_as = elements.kernel_dtype();
  return out << "torch." << (known_as >= 0 ? known()[known_as].name : other_name(elements.type));
}

Tensor Tensor::take(AtenTensorHandle handle) {
  if (!handle) return {};
  const decltype(owner_) held(handle, delete_tensor);
  Tensor t = lent(handle);
  if (t.defined()) t.owner_ = held;
  return t;
}

Tensor Tensor::lent(AtenTensorHandle handle) {
  const auto told = [](AOTITorchError error) { done(error, "fusedrnn: torch does not tell what a tensor is"); };
  bool defined = false;
  told(aoti_torch_is_defined(handle, &defined));
  if (!defined) return {};
  Facts f;
  int32_t layout = 0, type = 0;
  told(aoti_torch_get_dim(handle, &f.dim));
  told(aoti_torch_get_numel(handle, &f.numel));
  told(aoti_torch_get_dtype(handle, &type));
  told(aoti_torch_get_device_type(handle, &f.device.type));
  told(aoti_torch_get_device_index(handle, &f.device.index));
  told(aoti_torch_get_layout(handle, &layout));
  f.elements = type;
  f.element_bytes = f.elements.bytes();
  f.dense = layout == aoti_torch_layout_strided();
  if (!f.dense) return lent(handle, f);
  int64_t *sizes = nullptr, *strides = nullptr;
  told(aoti_torch_get_sizes(handle, &sizes));
  told(aoti_torch_get_strides(handle, &strides));
  const int64_t known = std::min<int64_t>(f.dim, Facts::kMost);
  std::copy_n(sizes, known, f.sizes);
  std::copy_n(strides, known, f.strides);
  told(aoti_torch_get_storage_offset(handle, &f.storage_offset));
  told(aoti_torch_get_storage_size(handle, &f.storage_bytes));
  told(aoti_torch_is_contiguous(handle, &f.contiguous));
  told(aoti_torch_get_data_ptr(handle, &f.data));
  return lent(handle, f);
}

Tensor Tensor::to(Elements elements) const {
  const Tensor made = empty(sizes(), elements, device());
  AtenTensorHandle from = handle_;
  Tensor held;
  if (view_) {
    AtenTensorHandle view = nullptr;
    done(aoti_torch__reinterpret_tensor(handle_, dim(), facts_.sizes, facts_.strides, moved_, &view),
         "fusedrnn: torch could not look at a tensor otherwise");
    held = take(view);
    from = view;
  }
  done(aoti_torch_copy_(made.handle(), from, 0), "fusedrnn: torch could not copy a tensor");
  return made;
}

Tensor Tensor::viewed(Sizes sizes, Sizes strides, int64_t offset) const {
  Tensor t = *this;
  t.view_ = true;
  t.moved_ += offset;
  Facts& f = t.facts_;
  f.dim = static_cast<int64_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), f.sizes);
  std::copy(strides.begin(), strides.end(), f.strides);
  f.numel = 1;
  f.contiguous = true;
  for (int64_t i = f.dim; i-- > 0;) {
    f.contiguous = f.contiguous && (f.sizes[i] == 1 || f.strides[i] == f.numel);
    f.numel *= f.sizes[i];
  }
  f.contiguous = f.contiguous || f.numel == 0;
  f.storage_offset += offset;
  f.data = static_cast<char*>(f.data) + offset * f.element_bytes;
  return t;
}

void Tensor::set_to_zero() const { done(aoti_torch_zero_(handle_), "fusedrnn: torch could not clear a tensor"); }

AtenTensorHandle Tensor::new_handle() const {
  AtenTensorHandle made = nullptr;
  done(aoti_torch_new_tensor_handle(handle_, &made), "fusedrnn: torch takes no result");
  return made;
}

Tensor with_one(const Tensor& t) {
  std::vector<int64_t> sizes = {1}, strides = {t.numel()};
  sizes.insert(sizes.end(), t.sizes().begin(), t.sizes().end());
  strides.insert(strides.end(), t.strides().begin(), t.strides().end());
  return t.viewed(sizes, strides, 0);
}

Tensor empty_if_there_is_memory(Sizes sizes, Elements elements, Device device) {
  check(sizes.size() <= Facts::kMost, "fusedrnn: too many dimensions");
  int64_t strides[Facts::kMost] = {};
  int64_t below = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = below;
    below *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle made = nullptr;
  const AOTITorchError error = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                        elements.type, device.type, device.index, &made);
  return error == AOTI_TORCH_SUCCESS ? Tensor::take(made) : Tensor();
}

Tensor empty(Sizes sizes, Elements elements, Device device) {
  const Tensor made = empty_if_there_is_memory(sizes, elements, device);
  check(made.defined(), "fusedrnn: can't allocate memory for a tensor of sizes ", sizes);
  return made;
}

}  // namespace fusedrnn
