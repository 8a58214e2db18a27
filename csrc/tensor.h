// torch's tensors by its stable C interface, which stays the same from version to version: what the checks ask of one,
// and how one is made. No other header of torch is needed by the files that include this one.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "problem.h"

namespace fusedrnn {

// Throws what Python sees as a RuntimeError, with the words of all `what`.
template <class... What>
void check(bool good, const What&... what) {
  if (good) return;
  std::ostringstream text;
  (text << ... << what);
  throw std::runtime_error(text.str());
}

// The same, unless a call of torch's C functions went well.
template <class... What>
void done(AOTITorchError error, const What&... what) {
  check(error == AOTI_TORCH_SUCCESS, what...);
}

// Sizes or strides that somebody else holds.
class Sizes {
 public:
  Sizes(const int64_t* data, size_t size) : data_(data), size_(size) {}
  Sizes(const std::vector<int64_t>& sizes) : Sizes(sizes.data(), sizes.size()) {}
  Sizes(std::initializer_list<int64_t> sizes) : Sizes(sizes.begin(), sizes.size()) {}
  const int64_t* begin() const { return data_; }
  const int64_t* end() const { return data_ + size_; }
  size_t size() const { return size_; }
  int64_t operator[](size_t i) const { return data_[i]; }
  Sizes from(size_t first) const { return {data_ + first, size_ - first}; }
  bool operator==(Sizes other) const { return size_ == other.size_ && std::equal(begin(), end(), other.begin()); }
  bool operator!=(Sizes other) const { return !(*this == other); }

 private:
  const int64_t* data_;
  size_t size_;
};
std::ostream& operator<<(std::ostream& out, Sizes sizes);

struct Device {
  int32_t type, index;
  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }
  bool operator==(Device other) const { return type == other.type && index == other.index; }
};
std::ostream& operator<<(std::ostream& out, Device device);

// The type of a tensor's elements, by torch's number.
struct Elements {
  int32_t type;
  Elements(int32_t type) : type(type) {}
  Elements(DType dtype);  // NOLINT
  int64_t bytes() const { return aoti_torch_dtype_element_size(type); }
  int kernel_dtype() const;  // its place in the kernels' tables; -1: none
  bool operator==(Elements other) const { return type == other.type; }
  bool operator!=(Elements other) const { return type != other.type; }
};
std::ostream& operator<<(std::ostream& out, Elements elements);

// What a tensor is, asked once.
struct Facts {
  static constexpr int kMost = 5;  // dimensions whose sizes are known: no tensor of a layer has more
  int64_t dim = 0, numel = 0, storage_offset = 0, storage_bytes = 0;
  int64_t sizes[kMost] = {}, strides[kMost] = {};
  Elements elements = 0;
  int64_t element_bytes = 1;
  Device device = {0, 0};
  bool dense = true, contiguous = true;
  void* data = nullptr;  // of a dense one that has memory
};

// A tensor, or nothing. Copies are the same tensor.
class Tensor {
 public:
  Tensor() = default;
  // The handle is given up; one of an undefined tensor becomes nothing.
  static Tensor take(AtenTensorHandle handle);
  // The tensor is somebody else's, who holds it for longer.
  static Tensor lent(AtenTensorHandle handle);
  static Tensor lent(AtenTensorHandle handle, const Facts& facts) {
    Tensor t;
    t.handle_ = handle;
    t.facts_ = facts;
    return t;
  }

  bool defined() const { return handle_ != nullptr; }
  int64_t dim() const { return facts_.dim; }
  int64_t numel() const { return facts_.numel; }
  Sizes sizes() const { return {facts_.sizes, known_dims()}; }
  Sizes strides() const { return {facts_.strides, known_dims()}; }
  int64_t size(int64_t i) const { return facts_.sizes[i < 0 ? dim() + i : i]; }
  int64_t stride(int64_t i) const { return facts_.strides[i < 0 ? dim() + i : i]; }
  Elements elements() const { return facts_.elements; }
  int64_t element_bytes() const { return facts_.element_bytes; }
  int64_t nbytes() const { return numel() * element_bytes(); }
  Device device() const { return facts_.device; }
  bool is_dense() const { return facts_.dense; }
  bool is_contiguous() const { return facts_.contiguous; }
  int64_t storage_offset() const { return facts_.storage_offset; }
  int64_t storage_bytes() const { return facts_.storage_bytes; }
  const void* data() const { return facts_.data; }
  void* mutable_data() const { return facts_.data; }

  Tensor copy() const { return to(elements()); }  // contiguous
  Tensor to(Elements elements) const;             // likewise, of this type
  Tensor contiguous() const { return is_contiguous() ? *this : copy(); }
  // The same memory by other sizes and strides, from an element on. torch does not know of it.
  Tensor viewed(Sizes sizes, Sizes strides, int64_t offset) const;
  void set_to_zero() const;
  // Another handle of it, for somebody who will give it up.
  AtenTensorHandle new_handle() const;
  // torch's own tensor, as it is without views of ours.
  AtenTensorHandle handle() const { return handle_; }

 private:
  size_t known_dims() const { return std::min<int64_t>(facts_.dim, Facts::kMost); }

  AtenTensorHandle handle_ = nullptr;
  std::shared_ptr<AtenTensorOpaque> owner_;  // null if it is lent
  Facts facts_;
  bool view_ = false;
  int64_t moved_ = 0;  // elements from the handle's first one to that of a view
};
using OptionalTensor = std::optional<Tensor>;

// The same with a dimension of one in front.
Tensor with_one(const Tensor& t);

// Contiguous, of contents nobody has written.
Tensor empty(Sizes sizes, Elements elements, Device device);
Tensor empty_if_there_is_memory(Sizes sizes, Elements elements, Device device);  // else undefined
inline Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like) {
  return empty(Sizes(sizes), like.elements(), like.device());
}

}  // namespace fusedrnn
