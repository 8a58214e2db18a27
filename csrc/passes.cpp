// See passes.h.
#include "target.h"

#include "passes.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "backend.h"

namespace fusedrnn {
namespace {

// A direction's elements of a row of the states besides h; of a cell without any those of the place where they were.
int64_t width_of_c(const Layer& layer) { return std::max(layer.constants().beside(), 1) * layer.size.H; }

// A row for each step and sample: [T, B, columns] or [N, columns], as x lies.
Tensor empty_rows(const Layer& layer, int64_t columns) {
  const LayerSizes& z = layer.size;
  return layer.packed ? empty({z.N, columns}, layer.x) : empty({z.T, z.B, columns}, layer.x);
}

void* output_rows(const Tensor& t, const Layer& layer, int64_t columns) {
  const LayerSizes& z = layer.size;
  return layer.packed ? output(t, {z.N, columns}) : output(t, {z.T, z.B, columns});
}

// In the type of the caller's tensors, from that of a layer that was widened.
Tensor narrowed(const Tensor& t, Elements elements) { return t.elements() == elements ? t : t.to(elements); }

LayerGradients empty_gradients(const Layer& layer, const Tensors& weights, const Needs& need) {
  const LayerSizes& z = layer.size;
  const CellConstants& cell = layer.constants();
  const Tensor& x = layer.x;
  const bool wide = layer.compute_type() == layer.dtype, added = backend_of(x).adds_directions;
  const auto computed = [&](std::initializer_list<int64_t> sizes) {
    return empty(sizes, layer.compute_type(), x.device());
  };
  const int64_t rows_of_gates = need.gates ? z.N : 0;
  LayerGradients g;
  g.x = need.x ? empty_rows(layer, z.I) : empty({0}, x);
  if (need.x) g.x_part[0] = wide && (added || z.D == 1) ? g.x : computed({z.N, z.I});
  if (need.x && z.D == 2 && !added) g.x_part[1] = computed({z.N, z.I});
  g.h0 = empty({z.D, z.B, z.R}, x);
  g.c0 = empty({cell.beside() ? z.D : 0, z.B, width_of_c(layer)}, x);
  g.gates = computed({z.D, rows_of_gates, cell.columns * z.H});
  g.h = computed({z.D, z.projected ? rows_of_gates : 0, z.R});
  g.norms = computed({z.D, need.norms ? z.N : 0, 2 * cell.states + cell.gates});
  for (const Tensor& w : weights) {
    if (!need.weights) continue;
    g.weights.push_back(empty(w.sizes(), x.elements(), x.device()));
    if (z.B == 0) g.weights.back().set_to_zero();
  }
  return g;
}

void fill_results(BackwardProblem& p, const Layer& layer, const LayerGradients& g, const Needs& need) {
  const LayerSizes& z = layer.size;
  const CellConstants& cell = layer.constants();
  p.dx = need.x ? output_rows(g.x, layer, z.I) : nullptr;
  for (int d = 0; d < 2; ++d) {
    p.dx_part[d] = g.x_part[d].handle() == g.x.handle() ? p.dx : output(g.x_part[d], {z.N, z.I});
  }
  p.dh0 = output(g.h0, {z.D, z.B, z.R});
  p.dc0 = output(g.c0, {z.D, z.B, width_of_c(layer)});
  p.dgates = output(g.gates, {z.D, z.N, cell.columns * z.H});
  p.dh = output(g.h, {z.D, z.N, z.R});
  p.norms = output(g.norms, {z.D, z.N, 2 * cell.states + cell.gates});
  p.weight_gradients = need.weights;
  if (!need.weights) return;
  const WeightOrder order = *WeightOrder::of(cell, g.weights.size(), z.D);
  const int64_t units = cell.gates * z.H;
  const auto result = [](const Tensor* t, std::initializer_list<int64_t> shape) {
    return t ? output(*t, shape) : nullptr;
  };
  for (int d = 0; d < z.D; ++d) {
    const ListedWeights dw = order.at(g.weights.data(), d);
    p.dw[d] = {result(dw.w_ih, {units, z.I}), result(dw.w_hh, {units, z.R}),
               result(dw.b_ih, {units}),      result(dw.b_hh, {units}),
               result(dw.w_hr, {z.R, z.H}),   result(dw.w_unit, {cell.parameters * z.H})};
  }
}

void fill_limits(BackwardProblem& p, const Layer& layer, const Limits& limits) {
  p.bptt_steps = limits.bptt_steps;
  // Not to become 0, which is no limit, in the compute type.
  const double least = layer.dtype == DType::kFloat64 ? 0 : std::numeric_limits<float>::denorm_min();
  p.clip = limits.clip > 0 ? std::max(limits.clip, least) : 0;
  p.clip_by_norm = limits.by_norm && limits.clip > 0;
}

// What layer_forward returned, and what comes back to it.
void check_backward(const Layer& layer, const Tensor& y, const Tensor& saved, const Limits& limits) {
  const LayerSizes& z = layer.size;
  check_there(y, "y");
  check_there(saved, "saved");
  check_rows(y, layer, "y", z.R);
  check(saved.elements() == Elements(layer.compute_type()) && saved.device() == layer.x.device(),
        "saved must be what layer_forward returned");
  check(saved.sizes() == Sizes({z.D, z.N, layer.saved_width()}),
        "saved must be what layer_forward(save=True) returned, of shape ", Sizes({z.D, z.N, layer.saved_width()}),
        ", got ", saved.sizes());
  check(limits.bptt_steps >= 0, "bptt_steps must not be negative, got ", limits.bptt_steps);
  check(limits.clip >= 0 && std::isfinite(limits.clip), "clip must be finite and not negative, got ", limits.clip);
}

}  // namespace

LayerOutputs forward_pass(const LayerArguments& given, bool save) {
  Layer layer = read_layer(given);
  layer.widen_without_kernel();
  const LayerSizes& z = layer.size;
  const int64_t width = z.D * z.R;
  const Tensor y = empty_rows(layer, width), h_n = empty({z.D, z.B, z.R}, layer.x);
  const Tensor c_n = empty({layer.constants().beside() ? z.D : 0, z.B, width_of_c(layer)}, layer.x);
  const Tensor saved = empty({z.D, save ? z.N : 0, layer.saved_width()}, layer.compute_type(), layer.x.device());
  if (z.B > 0) {
    ForwardProblem p;
    fill(p, layer);
    p.y = output_rows(y, layer, width);
    p.h_n = output(h_n, {z.D, z.B, z.R});
    p.c_n = output(c_n, {z.D, z.B, width_of_c(layer)});
    p.saved = output(saved, {z.D, z.N, layer.saved_width()});
    p.saved_stride = layer.saved_width();
    backend_of(layer.x).forward(layer, p);
  }
  const auto result = [&](const Tensor& t) { return narrowed(t, given.x.elements()); };
  return {result(y), result(h_n), result(c_n), saved};
}

LayerGradients backward_pass(const LayerArguments& given, const Cotangents& from, const Tensor& y, const Tensor& saved,
                             const Needs& need, const Limits& limits) {
  Layer layer = read_layer(given);
  const LayerSizes& z = layer.size;
  const bool has_c = layer.constants().beside() > 0;
  check_backward(layer, y, saved, limits);
  Tensor dy = check_rows(from.y, layer, "dy", z.R), dc = check_rows(from.c, layer, "dc", width_of_c(layer));
  Tensor dh_n = check_optional(from.h_n, given.x, "dh_n", {z.D, z.B, z.R});
  Tensor dc_n = check_optional(from.c_n, given.x, "dc_n", {has_c ? z.D : 0, z.B, width_of_c(layer)});
  check(has_c || !dc.defined(), given.cell, " has no c to have a gradient dc");
  layer.widen_without_kernel();
  const auto widened = [&](const Tensor& t) {
    return t.defined() && t.elements() != Elements(layer.dtype) ? widened_to_float(t) : t;
  };
  for (Tensor* t : {&dy, &dh_n, &dc_n, &dc}) *t = widened(*t);
  const Tensor y_rows = aligned(widened(y).contiguous()), saved_rows = aligned(saved.contiguous());
  LayerGradients g = empty_gradients(layer, given.weights, need);
  if (z.B > 0) {
    BackwardProblem p;
    fill(p, layer);
    p.dy = rows(dy, layer.packed);
    p.dc = rows(dc, layer.packed);
    p.y = input(y_rows);
    p.saved = input(saved_rows);
    p.saved_stride = layer.saved_width();
    p.dh_n = input(dh_n);
    p.dc_n = has_c ? input(dc_n) : nullptr;
    fill_results(p, layer, g, need);
    fill_limits(p, layer, limits);
    backend_of(layer.x).backward(layer, p);
  }
  for (Tensor* t : {&g.x, &g.h0, &g.c0}) *t = narrowed(*t, given.x.elements());
  for (Tensor& w : g.weights) w = narrowed(w, given.x.elements());
  return g;
}

}  // namespace fusedrnn
