// The ops: schemas, every check, allocation, the road to the backend. torch lives here and nowhere below.
//
//   layer_forward   one layer, all its directions: y, h_n, c_n and what backward needs (`saved`, empty if not asked)
//   layer_backward  its hand-derived gradients
//
// weights: for each direction w_ih, w_hh[, b_ih, b_hh][, w_hr], as torch.nn lays them out. x is [T, B, I], or [N, I]
// with batch_sizes (a PackedSequence's). Outputs never alias inputs or one another.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "problem.h"

namespace fusedrnn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct DirectionWeights {
  Tensor w_ih, w_hh, b_ih, b_hh, w_hr;  // biases and projection may be undefined
};

// A layer's arguments, checked, with contiguous weights and states; owns what a problem points to.
struct Layer {
  int cell;
  LayerSizes size;
  at::ScalarType dtype;
  Tensor x, h0, c0;  // h0, c0 may be undefined
  std::vector<int64_t> active, offset;  // what size.active and size.offset point to
  std::vector<DirectionWeights> weights;
  bool packed;

  const CellConstants& constants() const { return cell_constants(cell); }
  at::ScalarType compute_type() const { return dtype == at::kBFloat16 ? at::kFloat : dtype; }
  int64_t saved_width() const {
    const int64_t width = (constants().saved + constants().states - 1) * size.H;
    return spread_stride(width, at::elementSize(compute_type()));
  }
};

void check_tensor(const Tensor& t, const Tensor& x, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.device() == x.device(), name, " must be on the device of the input, ", x.device(), ", got ",
              t.device());
  TORCH_CHECK_VALUE(t.scalar_type() == x.scalar_type(), name, " must have the dtype of the input, ", x.scalar_type(),
                    ", got ", t.scalar_type());
  TORCH_CHECK(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
}

Tensor check_optional(const OptionalTensor& t, const Tensor& x, const char* name, at::IntArrayRef shape) {
  if (!t.has_value() || !t->defined()) return {};
  check_tensor(*t, x, name, shape);
  return t->contiguous();
}

// The steps of a batch: given by batch_sizes, or T steps of B samples.
void read_steps(Layer& layer, const OptionalTensor& batch_sizes) {
  LayerSizes& z = layer.size;
  layer.packed = batch_sizes.has_value() && batch_sizes->defined();
  if (layer.packed) {
    const Tensor& sizes = *batch_sizes;
    TORCH_CHECK(layer.x.dim() == 2, "input with batch_sizes must have 2 dimensions, got ", layer.x.dim());
    TORCH_CHECK(sizes.device().is_cpu() && sizes.scalar_type() == at::kLong && sizes.dim() == 1,
                "batch_sizes must be a 1-D int64 tensor on the CPU, got ", sizes.dim(), "-D ", sizes.scalar_type(),
                " on ", sizes.device());
    z.T = sizes.size(0);
    const Tensor values = sizes.contiguous();
    const int64_t* first = values.const_data_ptr<int64_t>();
    layer.active.assign(first, first + z.T);
  } else {
    TORCH_CHECK(layer.x.dim() == 3, "input must have 3 dimensions, got ", layer.x.dim());
    z.T = layer.x.size(0);
    layer.active.assign(z.T, layer.x.size(1));
  }
  TORCH_CHECK(z.T > 0, "Expected sequence length to be larger than 0 in RNN");
  layer.offset.resize(z.T);
  z.N = 0;
  for (int64_t t = 0; t < z.T; ++t) {
    const int64_t rows = layer.active[t];
    TORCH_CHECK(!layer.packed || (rows > 0 && (t == 0 || rows <= layer.active[t - 1])),
                "batch_sizes must be positive and not increase, got ", rows, " at step ", t);
    TORCH_CHECK(!layer.packed || rows <= layer.x.size(0) - z.N, "batch_sizes must add up to the rows of the input, ",
                layer.x.size(0), ", got more by step ", t);
    layer.offset[t] = z.N;
    z.N += rows;
  }
  TORCH_CHECK(!layer.packed || z.N == layer.x.size(0), "batch_sizes must add up to the rows of the input, ",
              layer.x.size(0), ", got ", z.N);
  z.B = layer.active[0];
  z.active = layer.active.data();
  z.offset = layer.offset.data();
}

void read_weights(Layer& layer, at::TensorList weights, int directions) {
  const int64_t each = weights.size() / directions;
  TORCH_CHECK(each * directions == static_cast<int64_t>(weights.size()) && each >= 2 && each <= 5,
              "weights must hold w_ih, w_hh[, b_ih, b_hh][, w_hr] for each of ", directions, " direction(s), got ",
              weights.size(), " tensors");
  const bool bias = each >= 4;
  LayerSizes& z = layer.size;
  z.D = directions;
  z.projected = each % 2 == 1;
  z.I = layer.x.size(-1);
  const int64_t G = layer.constants().gates;
  TORCH_CHECK(!z.projected || layer.constants().states == 2, "cell ", layer.constants().name,
              " cannot be projected: w_hr given");
  const Tensor& first = weights[1];  // w_hh: [G*H, R]
  TORCH_CHECK(first.dim() == 2 && first.size(0) % G == 0 && first.size(0) > 0, "w_hh must have shape [", G,
              "*H, H], got ", first.sizes());
  z.H = first.size(0) / G;
  z.R = z.projected ? first.size(1) : z.H;
  for (int d = 0; d < directions; ++d) {
    const auto at = [&](int64_t i) { return weights[d * each + i]; };
    DirectionWeights w;
    check_tensor(at(0), layer.x, "w_ih", {G * z.H, z.I});
    check_tensor(at(1), layer.x, "w_hh", {G * z.H, z.R});
    w.w_ih = at(0).contiguous();
    w.w_hh = at(1).contiguous();
    if (bias) {
      check_tensor(at(2), layer.x, "b_ih", {G * z.H});
      check_tensor(at(3), layer.x, "b_hh", {G * z.H});
      w.b_ih = at(2).contiguous();
      w.b_hh = at(3).contiguous();
    }
    if (z.projected) {
      check_tensor(at(each - 1), layer.x, "w_hr", {z.R, z.H});
      w.w_hr = at(each - 1).contiguous();
    }
    layer.weights.push_back(w);
  }
}

Layer read_layer(const Tensor& x, const OptionalTensor& batch_sizes, const OptionalTensor& h0,
                 const OptionalTensor& c0, at::TensorList weights, c10::string_view cell, bool bidirectional) {
  Layer layer;
  layer.cell = find_cell(std::string(cell).c_str());
  TORCH_CHECK_VALUE(layer.cell >= 0, "unknown cell '", cell, "'");
  layer.dtype = x.scalar_type();
  TORCH_CHECK_TYPE(layer.dtype == at::kFloat || layer.dtype == at::kDouble || layer.dtype == at::kBFloat16,
                   "fusedrnn on the CPU supports float32, float64 and bfloat16, got ", layer.dtype);
  layer.x = x.dim() > 0 && x.stride(-1) == 1 ? x : x.contiguous();
  read_steps(layer, batch_sizes);
  const int directions = bidirectional ? 2 : 1;
  read_weights(layer, weights, directions);
  const LayerSizes& z = layer.size;
  layer.h0 = check_optional(h0, x, "h0", {directions, z.B, z.R});
  layer.c0 = check_optional(c0, x, "c0", {directions, z.B, z.H});
  TORCH_CHECK(layer.constants().states == 2 || !layer.c0.defined(), "cell ", layer.constants().name, " has no c0");
  return layer;
}

const void* pointer(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* result(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

DType kernel_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat ? DType::kFloat32 : dtype == at::kDouble ? DType::kFloat64 : DType::kBFloat16;
}

RowView rows(const Tensor& t, bool packed) {
  if (!t.defined()) return {nullptr, 0, 0};
  return packed ? RowView{t.const_data_ptr(), -1, t.stride(0)} : RowView{t.const_data_ptr(), t.stride(0), t.stride(1)};
}

template <class Problem>
void fill(Problem& p, const Layer& layer) {
  p.size = layer.size;
  for (int d = 0; d < layer.size.D; ++d) {
    const DirectionWeights& w = layer.weights[d];
    p.weights[d] = {pointer(w.w_ih), pointer(w.w_hh), pointer(w.b_ih), pointer(w.b_hh), pointer(w.w_hr)};
  }
  p.x = rows(layer.x, layer.packed);
  p.h0 = pointer(layer.h0);
  p.c0 = pointer(layer.c0);
  p.threads = at::in_parallel_region() || forked() ? 1 : at::get_num_threads();
}

void check_memory(bool enough) { TORCH_CHECK(enough, "fusedrnn: not enough memory for the layer's working space"); }

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_forward(const Tensor& x, const OptionalTensor& batch_sizes,
                                                         const OptionalTensor& h0, const OptionalTensor& c0,
                                                         at::TensorList weights, c10::string_view cell,
                                                         bool bidirectional, bool save) {
  const Layer layer = read_layer(x, batch_sizes, h0, c0, weights, cell, bidirectional);
  const LayerSizes& z = layer.size;
  const int64_t width = z.D * z.R;
  Tensor y = layer.packed ? at::empty({z.N, width}, x.options()) : at::empty({z.T, z.B, width}, x.options());
  Tensor h_n = at::empty({z.D, z.B, z.R}, x.options());
  Tensor c_n = at::empty({layer.constants().states == 2 ? z.D : 0, z.B, z.H}, x.options());
  Tensor saved = at::empty({z.D, save ? z.N : 0, layer.saved_width()}, x.options().dtype(layer.compute_type()));
  if (z.B > 0) {
    ForwardProblem p;
    fill(p, layer);
    p.y = result(y);
    p.h_n = result(h_n);
    p.c_n = result(c_n);
    p.saved = saved.numel() > 0 ? result(saved) : nullptr;
    p.saved_stride = layer.saved_width();
    check_memory(kernels().forward[layer.cell][static_cast<int>(kernel_dtype(layer.dtype))](p));
  }
  return {y, h_n, c_n, saved};
}

// needs: whether the gradients of x, (h0, c0), weights are wanted; the others come back empty.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> layer_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& x,
    const OptionalTensor& batch_sizes, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
    const Tensor& y, const Tensor& saved, c10::string_view cell, bool bidirectional, bool need_x, bool need_weights) {
  const Layer layer = read_layer(x, batch_sizes, h0, c0, weights, cell, bidirectional);
  const LayerSizes& z = layer.size;
  const bool two_states = layer.constants().states == 2;
  std::vector<int64_t> y_sizes = layer.packed ? std::vector<int64_t>{z.N, z.D * z.R}
                                              : std::vector<int64_t>{z.T, z.B, z.D * z.R};
  check_tensor(y, x, "y", y_sizes);
  TORCH_CHECK(saved.scalar_type() == layer.compute_type() && saved.device() == x.device(),
              "saved must be what layer_forward returned");
  TORCH_CHECK(saved.sizes() == at::IntArrayRef({z.D, z.N, layer.saved_width()}),
              "saved must be what layer_forward(save=True) returned, of shape ",
              at::IntArrayRef({z.D, z.N, layer.saved_width()}), ", got ", saved.sizes());
  Tensor dy_rows;
  if (dy.has_value() && dy->defined()) {
    check_tensor(*dy, x, "dy", y_sizes);
    dy_rows = dy->stride(-1) == 1 || dy->size(-1) == 1 ? *dy : dy->contiguous();
  }
  const Tensor dh = check_optional(dh_n, x, "dh_n", {z.D, z.B, z.R});
  const Tensor dc = check_optional(dc_n, x, "dc_n", {two_states ? z.D : 0, z.B, z.H});
  const Tensor y_rows = y.contiguous(), saved_rows = saved.contiguous();

  const auto compute = x.options().dtype(layer.compute_type());
  Tensor dx = at::empty(need_x ? x.sizes() : at::IntArrayRef{0}, x.options());
  Tensor dx_part[2];  // the directions are worked on at the same time
  if (need_x) dx_part[0] = z.D == 1 && layer.compute_type() == layer.dtype ? dx : at::empty({z.N, z.I}, compute);
  if (need_x && z.D == 2) dx_part[1] = at::empty({z.N, z.I}, compute);
  Tensor dh0 = at::empty({z.D, z.B, z.R}, x.options());
  Tensor dc0 = at::empty({two_states ? z.D : 0, z.B, z.H}, x.options());
  std::vector<Tensor> dw;
  for (const Tensor& w : weights) {
    if (need_weights) dw.push_back(z.B > 0 ? at::empty(w.sizes(), x.options()) : at::zeros(w.sizes(), x.options()));
  }
  if (z.B > 0) {
    BackwardProblem p;
    fill(p, layer);
    p.dy = rows(dy_rows, layer.packed);
    p.y = pointer(y_rows);
    p.saved = pointer(saved_rows);
    p.saved_stride = layer.saved_width();
    p.dh_n = pointer(dh);
    p.dc_n = two_states ? pointer(dc) : nullptr;
    p.dx = need_x ? result(dx) : nullptr;
    p.dx_part[0] = result(dx_part[0]);
    p.dx_part[1] = result(dx_part[1]);
    p.dh0 = result(dh0);
    p.dc0 = two_states ? result(dc0) : nullptr;
    p.weight_gradients = need_weights;
    const size_t each = weights.size() / z.D;
    for (int d = 0; need_weights && d < z.D; ++d) {
      const Tensor* g = &dw[d * each];
      const bool bias = each >= 4;
      p.dw[d] = {result(g[0]), result(g[1]), bias ? result(g[2]) : nullptr, bias ? result(g[3]) : nullptr,
                 z.projected ? result(g[each - 1]) : nullptr};
    }
    check_memory(kernels().backward[layer.cell][static_cast<int>(kernel_dtype(layer.dtype))](p));
  }
  return {dx, dh0, dc0, dw};
}

}  // namespace

TORCH_LIBRARY(fusedrnn, m) {
  m.def(
      "layer_forward(Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, str cell, "
      "bool bidirectional, bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0, "
      "Tensor[] weights, Tensor y, Tensor saved, str cell, bool bidirectional, bool need_x, bool need_weights) "
      "-> (Tensor, Tensor, Tensor, Tensor[])");
}

TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("layer_forward", layer_forward);
  m.impl("layer_backward", layer_backward);
}

}  // namespace fusedrnn
