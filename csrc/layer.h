// A layer's arguments as torch gives them: checked once, then turned into what the backends see (problem.h).
// Every address that a kernel gets is taken here, by input() and output(), which see that its memory is there and as
// large as the layer's sizes say: for the ops, inference and steps alike.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "problem.h"

namespace fusedrnn {

using OptionalTensor = std::optional<at::Tensor>;

int kernel_dtype(at::ScalarType dtype);  // its place in the kernels' tables; -1: none

using DirectionWeights = PerWeight<at::Tensor>;      // biases and projection may be undefined
using ListedWeights = PerWeight<const at::Tensor*>;  // in a list of the ops

// Calls visit(name, weight, shape) for each that is there.
template <class Visit>
void each_weight(const ListedWeights& w, int64_t gates, int64_t I, int64_t H, int64_t R, const Visit& visit) {
  visit("w_ih", *w.w_ih, at::IntArrayRef({gates * H, I}));
  visit("w_hh", *w.w_hh, at::IntArrayRef({gates * H, R}));
  if (w.b_ih) visit("b_ih", *w.b_ih, at::IntArrayRef({gates * H}));
  if (w.b_hh) visit("b_hh", *w.b_hh, at::IntArrayRef({gates * H}));
  if (w.w_hr) visit("w_hr", *w.w_hr, at::IntArrayRef({R, H}));
}

// What a list of weights holds for each direction: w_ih, w_hh[, b_ih, b_hh][, w_hr], in this order.
struct WeightOrder {
  int64_t each;
  bool biases, projected;

  // Of a list of so many, for so many directions (of all layers); none if there is no such list.
  static std::optional<WeightOrder> of(int64_t weights, int64_t directions);
  ListedWeights at(at::TensorList weights, int64_t direction) const;
};

// problem.h's StateNoise as tensors, each of which may be undefined.
struct Noise {
  OptionalTensor mask_h, keep_h, keep_c;
};

// Arguments that fit one another, with contiguous weights and states; owns what a problem points to.
struct Layer {
  int cell;
  LayerSizes size;
  at::ScalarType dtype;
  at::Tensor x, h0, c0;               // h0, c0 may be undefined
  at::Tensor mask_h, keep_h, keep_c;  // may be undefined
  at::DataPtr steps;                  // what size.active and size.offset point to
  std::vector<DirectionWeights> weights;
  bool packed;

  const CellConstants& constants() const { return cell_constants(cell); }
  at::ScalarType compute_type() const { return at::isReducedFloatingType(dtype) ? at::kFloat : dtype; }
  int64_t saved_width() const {
    const int own = constants().saved + constants().states - 1;
    const int64_t width = (own == 0 && keep_h.defined() ? 1 : own) * size.H;
    return spread_stride(width, at::elementSize(compute_type()));
  }
  int kernel_dtype() const { return fusedrnn::kernel_dtype(dtype); }
  // float32 copies where the device has no kernel of the dtype: float16 on the CPU.
  void widen_without_kernel();
};

// Throws what torch.nn would, or names the argument that does not fit.
Layer read_layer(const at::Tensor& x, const OptionalTensor& batch_sizes, const OptionalTensor& h0,
                 const OptionalTensor& c0, at::TensorList weights, c10::string_view cell, bool bidirectional,
                 const Noise& noise = {});

// Whether there are steps in x [T, B, I], or [B, I] of one, and no product of its sizes overflows.
bool steps_fit(const at::Tensor& x);
// Whether the storage of t is as large as its sizes and strides say: someone may have resized or freed it.
bool is_there(const at::Tensor& t);
// t, or a copy of it whose elements lie at multiples of their size, as kernels read them.
at::Tensor aligned(const at::Tensor& t);
inline bool is_aligned(const at::Tensor& t) {
  return t.numel() == 0 || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.element_size() == 0;
}
// float32, its last dimension dense whatever lay in t.
at::Tensor widened_to_float(const at::Tensor& t);
// Throws if the memory of t is not there (is_there), or t is undefined.
void check_there(const at::Tensor& t, const char* name);
void check_tensor(const at::Tensor& t, const at::Tensor& x, const char* name, at::IntArrayRef shape);
// Undefined if not given, else contiguous.
at::Tensor check_optional(const OptionalTensor& t, const at::Tensor& x, const char* name, at::IntArrayRef shape);
// Rows of y: [T, B, D * columns] or [N, D * columns], with the last dimension dense. Undefined if not given.
at::Tensor check_rows(const OptionalTensor& t, const Layer& layer, const char* name, int64_t columns);
void check_memory(bool enough);

// To be read: a checked tensor, null if undefined.
const void* input(const at::Tensor& t);
// To be written: part `part` of `parts` along the first dimension of a contiguous t, each of this shape; null if t is
// undefined or has no element.
void* output(const at::Tensor& t, std::initializer_list<int64_t> shape, int64_t part = 0, int64_t parts = 1);
RowView rows(const at::Tensor& t, bool packed);
int threads();  // for a call made now

template <class Problem>
void fill(Problem& p, const Layer& layer) {
  p.size = layer.size;
  for (int d = 0; d < layer.size.D; ++d) p.weights[d] = layer.weights[d].map(input);
  p.x = rows(layer.x, layer.packed);
  p.noise = {input(layer.mask_h), rows(layer.keep_h, layer.packed), rows(layer.keep_c, layer.packed)};
  p.h0 = input(layer.h0);
  p.c0 = input(layer.c0);
  p.threads = threads();
}

}  // namespace fusedrnn
