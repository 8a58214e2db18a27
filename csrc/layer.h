// A layer's arguments as torch gives them: checked once, then turned into what the backends see (problem.h).
// Every address that a kernel gets is taken here, by input() and output(), which see that its memory is there and as
// large as the layer's sizes say: for the ops, inference and steps alike.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "cpu/dispatch.h"
#include "problem.h"
#include "tensor.h"

namespace fusedrnn {

using Tensors = std::vector<Tensor>;

using DirectionWeights = PerWeight<Tensor>;      // biases and projection may be undefined
using ListedWeights = PerWeight<const Tensor*>;  // in a list of the ops

// Calls visit(name, weight, shape) for each that is there.
template <class Visit>
void each_weight(const ListedWeights& w, const CellConstants& cell, int64_t I, int64_t H, int64_t R,
                 const Visit& visit) {
  const int64_t gates = cell.gates;
  visit("w_ih", *w.w_ih, Sizes({gates * H, I}));
  if (w.w_hh) visit("w_hh", *w.w_hh, Sizes({gates * H, R}));
  if (w.b_ih) visit("b_ih", *w.b_ih, Sizes({gates * H}));
  if (w.b_hh) visit("b_hh", *w.b_hh, Sizes({gates * H}));
  if (w.w_hr) visit("w_hr", *w.w_hr, Sizes({R, H}));
  if (w.w_unit) visit("w_unit", *w.w_unit, Sizes({cell.parameters * H}));
}

// Of int8 matrices; hr undefined without a projection.
struct DirectionScales {
  Tensor ih, hh, hr;
};

// What a list of weights holds for each direction: w_ih, w_hh[, b_ih, b_hh][, w_hr], in this order. Of a cell with
// parameters of its units they are the last in the place of w_hr; without a product with h they are w_hh.
struct WeightOrder {
  int64_t each;
  bool biases, projected, parameters, product;

  // Of a list of so many, for so many directions (of all layers); none if there is no such list.
  static std::optional<WeightOrder> of(const CellConstants& cell, int64_t weights, int64_t directions);
  ListedWeights at(const Tensor* weights, int64_t direction) const;
  // Scales that go with int8 matrices, likewise: s_ih, s_hh[, s_hr].
  int64_t scales() const { return projected ? 3 : 2; }
  DirectionScales scales_at(const Tensor* all, int64_t direction) const;
};

// Calls visit(name, scale, shape) for each that is there.
template <class Visit>
void each_scale(const DirectionScales& s, int64_t gates, int64_t H, int64_t R, const Visit& visit) {
  visit("s_ih", s.ih, Sizes({gates * H}));
  visit("s_hh", s.hh, Sizes({gates * H}));
  if (s.hr.defined()) visit("s_hr", s.hr, Sizes({R}));
}
// What the matrices are, which in a layer of float32 may be of a smaller type, for inference.
enum class Matrices { kAsInput, kInt8, kBFloat16 };
// So many int8 products have a sum in int32, one of them unsigned too.
constexpr int64_t kMostBytes = 1 << 16;
// With scales int8; with a list of none bfloat16.
Matrices matrices_of(const std::optional<Tensors>& scales);
// Elements of a weight of this shape.
Elements elements_of_weight(const Tensor& x, Sizes shape, Matrices matrices);

// problem.h's StateNoise as tensors, each of which may be undefined.
struct Noise {
  OptionalTensor mask_h, keep_h, keep_c;
};

// What a layer is given, as the ops name it. x: [T, B, I], or [N, I] with batch_sizes (a PackedSequence's).
struct LayerArguments {
  Tensor x;
  OptionalTensor batch_sizes, h0, c0;
  Tensors weights;  // for each direction (WeightOrder)
  std::string_view cell;
  bool bidirectional = false;
  Noise noise;
  std::optional<Tensors> scales;  // for each direction, if the matrices are of a smaller type (matrices_of)
};

// Arguments that fit one another, with contiguous weights and states; owns what a problem points to.
struct Layer {
  int cell;
  LayerSizes size;
  DType dtype;
  Tensor x, h0, c0;                  // h0, c0 may be undefined
  Tensor mask_h, keep_h, keep_c;     // may be undefined
  std::unique_ptr<int64_t[]> steps;  // what size.active and size.offset point to
  std::vector<DirectionWeights> weights;
  Matrices matrices = Matrices::kAsInput;
  std::vector<DirectionScales> scales;  // of int8 matrices, else empty
  bool packed;

  const CellConstants& constants() const { return cell_constants(cell); }
  DType compute_type() const { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }
  int64_t saved_width() const {
    const int own = constants().saved + constants().states - 1;
    const int64_t width = (own == 0 && keep_h.defined() ? 1 : own) * size.H + constants().row_values;
    return spread_stride(width, Elements(compute_type()).bytes());
  }
  int kernel_dtype() const { return static_cast<int>(dtype); }
  // float32 copies where the device has no kernel of the dtype: float16 on the CPU.
  void widen_without_kernel();
};

// Throws what torch.nn would, or names the argument that does not fit.
Layer read_layer(const LayerArguments& given);

// Whether there are steps in x [T, B, I], or [B, I] of one, and no product of its sizes overflows.
bool steps_fit(const Tensor& x);
// Whether the storage of t is as large as its sizes and strides say: someone may have resized or freed it.
bool is_there(const Tensor& t);
// t, or a copy of it whose elements lie at multiples of their size, as kernels read them.
Tensor aligned(const Tensor& t);
inline bool is_aligned(const Tensor& t) {
  return t.numel() == 0 || reinterpret_cast<uintptr_t>(t.data()) % t.element_bytes() == 0;
}
// float32, its last dimension dense whatever lay in t.
Tensor widened_to_float(const Tensor& t);
// Throws if the memory of t is not there (is_there), or t is undefined.
void check_there(const Tensor& t, const char* name);
void check_tensor(const Tensor& t, const Tensor& x, const char* name, Sizes shape);
void check_tensor(const Tensor& t, const Tensor& x, const char* name, Sizes shape, Elements elements);
// Undefined if not given, else contiguous.
Tensor check_optional(const OptionalTensor& t, const Tensor& x, const char* name, Sizes shape);
// Rows of y: [T, B, D * columns] or [N, D * columns], with the last dimension dense. Undefined if not given.
Tensor check_rows(const OptionalTensor& t, const Layer& layer, const char* name, int64_t columns);
void check_memory(bool enough);

// To be read: a checked tensor, null if undefined.
const void* input(const Tensor& t);
WeightScales scales_of(const DirectionScales& scales);
// To be written: part `part` of `parts` along the first dimension of a contiguous t, each of this shape; null if t is
// undefined or has no element.
void* output(const Tensor& t, std::initializer_list<int64_t> shape, int64_t part = 0, int64_t parts = 1);
RowView rows(const Tensor& t, bool packed);
int threads();  // for a call made now

template <class Problem>
void fill(Problem& p, const Layer& layer) {
  p.size = layer.size;
  for (int d = 0; d < layer.size.D; ++d) p.weights[d] = layer.weights[d].map(input);
  if constexpr (std::is_same_v<Problem, ForwardProblem>) {
    for (size_t d = 0; d < layer.scales.size(); ++d) p.scales[d] = scales_of(layer.scales[d]);
  }
  p.x = rows(layer.x, layer.packed);
  p.noise = {input(layer.mask_h), rows(layer.keep_h, layer.packed), rows(layer.keep_c, layer.packed)};
  p.h0 = input(layer.h0);
  p.c0 = input(layer.c0);
  p.threads = threads();
}

}  // namespace fusedrnn
