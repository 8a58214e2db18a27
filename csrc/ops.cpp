// The ops: schemas, allocation, the road to the backend. The checks are in layer.cpp; no torch below these.
//
//   layer_forward   one layer, all its directions: y, h_n, c_n and what backward needs (`saved`, empty if not asked)
//   layer_backward  its hand-derived gradients
//
// float16 on the CPU is computed by the kernels of float32.
// weights: for each direction w_ih, w_hh[, b_ih, b_hh][, w_hr], as torch.nn lays them out. x is [T, B, I], or [N, I]
// with batch_sizes (a PackedSequence's). Outputs never alias inputs or one another.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "layer.h"
#if defined(FUSEDRNN_CUDA)
#include "cuda/launch.h"
#endif

namespace fusedrnn {
namespace {

using at::Tensor;

void run(const Layer& layer, const ForwardProblem& p) {
#if defined(FUSEDRNN_CUDA)
  if (layer.x.is_cuda()) return cuda_forward(layer, p);
#endif
  check_memory(kernels().forward[layer.cell][layer.kernel_dtype()](p));
}

void run(const Layer& layer, const BackwardProblem& p) {
#if defined(FUSEDRNN_CUDA)
  if (layer.x.is_cuda()) return cuda_backward(layer, p);
#endif
  check_memory(kernels().backward[layer.cell][layer.kernel_dtype()](p));
}

// A row for each step and sample: [T, B, columns] or [N, columns], as x lies.
Tensor empty_rows(const Layer& layer, int64_t columns) {
  const LayerSizes& z = layer.size;
  const auto options = layer.x.options();
  return layer.packed ? at::empty({z.N, columns}, options) : at::empty({z.T, z.B, columns}, options);
}

void* output_rows(const Tensor& t, const Layer& layer, int64_t columns) {
  const LayerSizes& z = layer.size;
  return layer.packed ? output(t, {z.N, columns}) : output(t, {z.T, z.B, columns});
}

// In the type of the caller's tensors, from that of a layer that was widened.
Tensor narrowed(const Tensor& t, const Tensor& like) { return t.to(like.scalar_type()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_forward(const Tensor& x, const OptionalTensor& batch_sizes,
                                                         const OptionalTensor& h0, const OptionalTensor& c0,
                                                         at::TensorList weights, c10::string_view cell,
                                                         bool bidirectional, bool save, const OptionalTensor& mask_h,
                                                         const OptionalTensor& keep_h, const OptionalTensor& keep_c) {
  Layer layer = read_layer(x, batch_sizes, h0, c0, weights, cell, bidirectional, {mask_h, keep_h, keep_c});
  layer.widen_without_kernel();
  const LayerSizes& z = layer.size;
  const int64_t width = z.D * z.R;
  const auto options = layer.x.options();
  Tensor y = empty_rows(layer, width);
  Tensor h_n = at::empty({z.D, z.B, z.R}, options);
  Tensor c_n = at::empty({layer.constants().states == 2 ? z.D : 0, z.B, z.H}, options);
  Tensor saved = at::empty({z.D, save ? z.N : 0, layer.saved_width()}, options.dtype(layer.compute_type()));
  if (z.B > 0) {
    ForwardProblem p;
    fill(p, layer);
    p.y = output_rows(y, layer, width);
    p.h_n = output(h_n, {z.D, z.B, z.R});
    p.c_n = output(c_n, {z.D, z.B, z.H});
    p.saved = output(saved, {z.D, z.N, layer.saved_width()});
    p.saved_stride = layer.saved_width();
    run(layer, p);
  }
  return {narrowed(y, x), narrowed(h_n, x), narrowed(c_n, x), saved};
}

// need_*: which gradients are wanted beside those of h0 and c0; the others come back empty. The rest as in problem.h.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>, Tensor, Tensor, Tensor> layer_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const OptionalTensor& dc_rows,
    const Tensor& x, const OptionalTensor& batch_sizes, const OptionalTensor& h0, const OptionalTensor& c0,
    at::TensorList weights, const Tensor& y, const Tensor& saved, c10::string_view cell, bool bidirectional,
    bool need_x, bool need_weights, bool need_gates, bool need_norms, int64_t bptt_steps, double clip,
    bool clip_by_norm, const OptionalTensor& mask_h, const OptionalTensor& keep_h, const OptionalTensor& keep_c) {
  Layer layer = read_layer(x, batch_sizes, h0, c0, weights, cell, bidirectional, {mask_h, keep_h, keep_c});
  const LayerSizes& z = layer.size;
  const bool two_states = layer.constants().states == 2;
  check_there(y, "y");
  check_there(saved, "saved");
  check_rows(y, layer, "y", z.R);
  TORCH_CHECK(saved.scalar_type() == layer.compute_type() && saved.device() == x.device(),
              "saved must be what layer_forward returned");
  TORCH_CHECK(saved.sizes() == at::IntArrayRef({z.D, z.N, layer.saved_width()}),
              "saved must be what layer_forward(save=True) returned, of shape ",
              at::IntArrayRef({z.D, z.N, layer.saved_width()}), ", got ", saved.sizes());
  Tensor dy_rows = check_rows(dy, layer, "dy", z.R), dc_views = check_rows(dc_rows, layer, "dc", z.H);
  TORCH_CHECK_VALUE(two_states || !dc_views.defined(), cell, " has no c to have a gradient dc");
  TORCH_CHECK_VALUE(bptt_steps >= 0, "bptt_steps must not be negative, got ", bptt_steps);
  TORCH_CHECK_VALUE(clip >= 0 && std::isfinite(clip), "clip must be finite and not negative, got ", clip);
  Tensor dh = check_optional(dh_n, x, "dh_n", {z.D, z.B, z.R});
  Tensor dc = check_optional(dc_n, x, "dc_n", {two_states ? z.D : 0, z.B, z.H});
  layer.widen_without_kernel();
  const auto options = layer.x.options();
  const auto widened = [&](const Tensor& t) {
    return t.defined() && t.scalar_type() != layer.dtype ? widened_to_float(t) : t;
  };
  dy_rows = widened(dy_rows), dc_views = widened(dc_views);
  dh = widened(dh), dc = widened(dc);
  const Tensor y_rows = aligned(widened(y).contiguous()), saved_rows = aligned(saved.contiguous());

  const auto compute = options.dtype(layer.compute_type());
  Tensor dx = need_x ? empty_rows(layer, z.I) : at::empty({0}, options);
  Tensor dx_part[2];  // the directions are worked on at the same time
  const bool wide = layer.compute_type() == layer.dtype, cuda = x.is_cuda();
  if (need_x) dx_part[0] = wide && (cuda || z.D == 1) ? dx : at::empty({z.N, z.I}, compute);
  if (need_x && z.D == 2 && !cuda) dx_part[1] = at::empty({z.N, z.I}, compute);
  Tensor dh0 = at::empty({z.D, z.B, z.R}, options);
  Tensor dc0 = at::empty({two_states ? z.D : 0, z.B, z.H}, options);
  const CellConstants& cell_of = layer.constants();
  const int64_t rows_of_gates = need_gates ? z.N : 0;
  Tensor dgates = at::empty({z.D, rows_of_gates, (cell_of.gates + cell_of.split) * z.H}, compute);
  Tensor dh_rows = at::empty({z.D, z.projected ? rows_of_gates : 0, z.R}, compute);
  Tensor norms = at::empty({z.D, need_norms ? z.N : 0, 2 * cell_of.states + cell_of.gates}, compute);
  std::vector<Tensor> dw;
  for (const Tensor& w : weights) {
    if (need_weights) dw.push_back(z.B > 0 ? at::empty(w.sizes(), options) : at::zeros(w.sizes(), options));
  }
  if (z.B > 0) {
    BackwardProblem p;
    fill(p, layer);
    p.dy = rows(dy_rows, layer.packed);
    p.dc = rows(dc_views, layer.packed);
    p.y = input(y_rows);
    p.saved = input(saved_rows);
    p.saved_stride = layer.saved_width();
    p.dh_n = input(dh);
    p.dc_n = two_states ? input(dc) : nullptr;
    p.dx = need_x ? output_rows(dx, layer, z.I) : nullptr;
    for (int d = 0; d < 2; ++d) p.dx_part[d] = dx_part[d].is_same(dx) ? p.dx : output(dx_part[d], {z.N, z.I});
    p.dh0 = output(dh0, {z.D, z.B, z.R});
    p.dc0 = output(dc0, {z.D, z.B, z.H});
    p.dgates = output(dgates, {z.D, z.N, (cell_of.gates + cell_of.split) * z.H});
    p.dh = output(dh_rows, {z.D, z.N, z.R});
    p.norms = output(norms, {z.D, z.N, 2 * cell_of.states + cell_of.gates});
    p.bptt_steps = bptt_steps;
    // Not to become 0, which is no limit, in the compute type.
    const double least = layer.dtype == at::kDouble ? 0 : std::numeric_limits<float>::denorm_min();
    p.clip = clip > 0 ? std::max(clip, least) : 0;
    p.clip_by_norm = clip_by_norm && clip > 0;
    p.weight_gradients = need_weights;
    const size_t each = weights.size() / z.D;
    for (int d = 0; need_weights && d < z.D; ++d) {
      const Tensor* g = &dw[d * each];
      const bool bias = each >= 4;
      const int64_t units = cell_of.gates * z.H;
      p.dw[d] = {output(g[0], {units, z.I}), output(g[1], {units, z.R}), bias ? output(g[2], {units}) : nullptr,
                 bias ? output(g[3], {units}) : nullptr, z.projected ? output(g[each - 1], {z.R, z.H}) : nullptr};
    }
    run(layer, p);
  }
  for (Tensor& g : dw) g = narrowed(g, x);
  return {narrowed(dx, x), narrowed(dh0, x), narrowed(dc0, x), dw, dgates, dh_rows, norms};
}

}  // namespace

TORCH_LIBRARY(fusedrnn, m) {
  m.def(
      "layer_forward(Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, str cell, "
      "bool bidirectional, bool save, Tensor? mask_h=None, Tensor? keep_h=None, Tensor? keep_c=None) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, Tensor? batch_sizes, Tensor? h0, "
      "Tensor? c0, Tensor[] weights, Tensor y, Tensor saved, str cell, bool bidirectional, bool need_x, "
      "bool need_weights, bool need_gates=False, bool need_norms=False, int bptt_steps=0, float clip=0., "
      "bool clip_by_norm=False, Tensor? mask_h=None, Tensor? keep_h=None, Tensor? keep_c=None) "
      "-> (Tensor, Tensor, Tensor, Tensor[], Tensor, Tensor, Tensor)");
}

// fusedrnn.layer.autograd differentiates layers. A call of an op by itself, from a trace say, has no gradient: an error.
TORCH_LIBRARY_IMPL(fusedrnn, Autograd, m) {
  m.impl("layer_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("layer_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("layer_forward", layer_forward);
  m.impl("layer_backward", layer_backward);
}

#if defined(FUSEDRNN_CUDA)
TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) {
  m.impl("layer_forward", layer_forward);
  m.impl("layer_backward", layer_backward);
}
#endif

}  // namespace fusedrnn
