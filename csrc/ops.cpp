// The ops: schemas, allocation, the call of the backend. The checks are in layer.cpp; no torch below these.
//
//   layer_forward   one layer, all its directions: y, h_n, c_n and what backward needs (`saved`, empty if not asked)
//   layer_backward  its hand-derived gradients
//
// float16 on the CPU is computed by the kernels of float32.
// weights: for each direction w_ih, w_hh[, b_ih, b_hh][, w_hr], as torch.nn lays them out. x is [T, B, I], or [N, I]
// with batch_sizes (a PackedSequence's). Outputs never alias inputs or one another.
#include "target.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "backend.h"

namespace fusedrnn {
namespace {

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

// The arguments of an op as they lie on torch's stack, taken in the order of the schema: all of them, for they are
// given up to the kernel. Then their place is for the results.
class Stack {
 public:
  explicit Stack(StableIValue* stack) : next_(stack), result_(stack) {}

  Tensor tensor() { return Tensor::take(to<AtenTensorHandle>(*next_++)); }
  OptionalTensor optional() {
    const std::unique_ptr<StableIValue> given(to<StableIValue*>(*next_++));
    if (!given) return std::nullopt;
    return Tensor::take(to<AtenTensorHandle>(*given));
  }
  Tensors tensors() {
    const auto list = to<StableListHandle>(*next_++);
    const std::unique_ptr<StableListOpaque, void (*)(StableListHandle)> held(
        list, [](StableListHandle l) { torch_delete_list(l); });
    size_t size = 0;
    read(torch_list_size(list, &size));
    Tensors result(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item = 0;
      read(torch_list_get_item(list, i, &item));
      result[i] = Tensor::take(to<AtenTensorHandle>(item));
    }
    return result;
  }
  std::string text() {
    const auto given = to<StringHandle>(*next_++);
    const std::unique_ptr<StringOpaque, void (*)(StringHandle)> held(given,
                                                                     [](StringHandle s) { torch_delete_string(s); });
    const char* text = "";
    size_t size = 0;
    read(torch_string_length(given, &size));
    read(torch_string_c_str(given, &text));
    return std::string(text, size);
  }
  bool flag() { return to<bool>(*next_++); }
  int64_t integer() { return to<int64_t>(*next_++); }
  double number() { return to<double>(*next_++); }

  void give(const Tensor& t) { *result_++ = handed_over(t); }
  void give(const Tensors& list) {
    StableListHandle made = nullptr;
    const auto taken = [](AOTITorchError error) { done(error, "fusedrnn: torch takes no result"); };
    taken(torch_new_list_reserve_size(list.size(), &made));
    for (const Tensor& t : list) taken(torch_list_push_back(made, handed_over(t)));
    *result_++ = torch::stable::detail::from(made);
  }

 private:
  template <class T>
  static T to(StableIValue value) {
    return torch::stable::detail::to<T>(value);
  }
  static void read(AOTITorchError error) { done(error, "fusedrnn: torch does not tell an argument"); }
  static StableIValue handed_over(const Tensor& t) { return torch::stable::detail::from(t.new_handle()); }

  StableIValue *next_, *result_;
};

void layer_forward(StableIValue* stack, uint64_t, uint64_t) {
  Stack given(stack);
  const Tensor x = given.tensor();
  const OptionalTensor batch_sizes = given.optional(), h0 = given.optional(), c0 = given.optional();
  const Tensors weights = given.tensors();
  const std::string cell = given.text();
  const bool bidirectional = given.flag(), save = given.flag();
  const Noise noise{given.optional(), given.optional(), given.optional()};
  Layer layer = read_layer(x, batch_sizes, h0, c0, weights, cell, bidirectional, noise);
  layer.widen_without_kernel();
  const LayerSizes& z = layer.size;
  const int64_t width = z.D * z.R;
  Tensor y = empty_rows(layer, width);
  Tensor h_n = empty({z.D, z.B, z.R}, layer.x);
  Tensor c_n = empty({layer.constants().states == 2 ? z.D : 0, z.B, z.H}, layer.x);
  Tensor saved = empty({z.D, save ? z.N : 0, layer.saved_width()}, layer.compute_type(), layer.x.device());
  if (z.B > 0) {
    ForwardProblem p;
    fill(p, layer);
    p.y = output_rows(y, layer, width);
    p.h_n = output(h_n, {z.D, z.B, z.R});
    p.c_n = output(c_n, {z.D, z.B, z.H});
    p.saved = output(saved, {z.D, z.N, layer.saved_width()});
    p.saved_stride = layer.saved_width();
    backend_of(layer.x).forward(layer, p);
  }
  for (const Tensor& t : {y, h_n, c_n}) given.give(narrowed(t, x.elements()));
  given.give(saved);
}

// What later computations send back; each may be undefined.
struct Cotangents {
  Tensor y, h_n, c_n, c;  // rows, states, states, rows
};

// Which gradients are wanted besides those of h0 and c0.
struct Needs {
  bool x, weights, gates, norms;
};

struct Limits {
  int64_t bptt_steps;
  double clip;
  bool by_norm;
};

// As layer_backward returns them; what is not wanted is empty.
struct Gradients {
  Tensor x, h0, c0;
  Tensors weights;
  Tensor gates, h, norms;
  Tensor x_part[2];  // the directions are worked on at the same time
};

Gradients empty_gradients(const Layer& layer, const Tensors& weights, const Needs& need) {
  const LayerSizes& z = layer.size;
  const CellConstants& cell = layer.constants();
  const Tensor& x = layer.x;
  const bool wide = layer.compute_type() == layer.dtype, added = backend_of(x).adds_directions;
  const auto computed = [&](std::initializer_list<int64_t> sizes) {
    return empty(sizes, layer.compute_type(), x.device());
  };
  const int64_t rows_of_gates = need.gates ? z.N : 0;
  Gradients g;
  g.x = need.x ? empty_rows(layer, z.I) : empty({0}, x);
  if (need.x) g.x_part[0] = wide && (added || z.D == 1) ? g.x : computed({z.N, z.I});
  if (need.x && z.D == 2 && !added) g.x_part[1] = computed({z.N, z.I});
  g.h0 = empty({z.D, z.B, z.R}, x);
  g.c0 = empty({cell.states == 2 ? z.D : 0, z.B, z.H}, x);
  g.gates = computed({z.D, rows_of_gates, (cell.gates + cell.split) * z.H});
  g.h = computed({z.D, z.projected ? rows_of_gates : 0, z.R});
  g.norms = computed({z.D, need.norms ? z.N : 0, 2 * cell.states + cell.gates});
  for (const Tensor& w : weights) {
    if (!need.weights) continue;
    g.weights.push_back(empty(w.sizes(), x.elements(), x.device()));
    if (z.B == 0) g.weights.back().set_to_zero();
  }
  return g;
}

void fill_results(BackwardProblem& p, const Layer& layer, const Gradients& g, const Needs& need) {
  const LayerSizes& z = layer.size;
  const CellConstants& cell = layer.constants();
  p.dx = need.x ? output_rows(g.x, layer, z.I) : nullptr;
  for (int d = 0; d < 2; ++d) {
    p.dx_part[d] = g.x_part[d].handle() == g.x.handle() ? p.dx : output(g.x_part[d], {z.N, z.I});
  }
  p.dh0 = output(g.h0, {z.D, z.B, z.R});
  p.dc0 = output(g.c0, {z.D, z.B, z.H});
  p.dgates = output(g.gates, {z.D, z.N, (cell.gates + cell.split) * z.H});
  p.dh = output(g.h, {z.D, z.N, z.R});
  p.norms = output(g.norms, {z.D, z.N, 2 * cell.states + cell.gates});
  p.weight_gradients = need.weights;
  if (!need.weights) return;
  const WeightOrder order = *WeightOrder::of(g.weights.size(), z.D);
  const int64_t units = cell.gates * z.H;
  const auto result = [](const Tensor* t, std::initializer_list<int64_t> shape) {
    return t ? output(*t, shape) : nullptr;
  };
  for (int d = 0; d < z.D; ++d) {
    const ListedWeights dw = order.at(g.weights.data(), d);
    p.dw[d] = {result(dw.w_ih, {units, z.I}), result(dw.w_hh, {units, z.R}), result(dw.b_ih, {units}),
               result(dw.b_hh, {units}), result(dw.w_hr, {z.R, z.H})};
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

void layer_backward(StableIValue* stack, uint64_t, uint64_t) {
  Stack given(stack);
  const OptionalTensor dy = given.optional(), dh_n = given.optional(), dc_n = given.optional(), dc = given.optional();
  const Tensor x = given.tensor();
  const OptionalTensor batch_sizes = given.optional(), h0 = given.optional(), c0 = given.optional();
  const Tensors weights = given.tensors();
  const Tensor y = given.tensor(), saved = given.tensor();
  const std::string cell = given.text();
  const bool bidirectional = given.flag();
  const Needs need{given.flag(), given.flag(), given.flag(), given.flag()};
  const Limits limits{given.integer(), given.number(), given.flag()};
  const Noise noise{given.optional(), given.optional(), given.optional()};

  Layer layer = read_layer(x, batch_sizes, h0, c0, weights, cell, bidirectional, noise);
  const LayerSizes& z = layer.size;
  const bool two_states = layer.constants().states == 2;
  check_backward(layer, y, saved, limits);
  Cotangents back{check_rows(dy, layer, "dy", z.R), check_optional(dh_n, x, "dh_n", {z.D, z.B, z.R}),
                  check_optional(dc_n, x, "dc_n", {two_states ? z.D : 0, z.B, z.H}), check_rows(dc, layer, "dc", z.H)};
  check(two_states || !back.c.defined(), cell, " has no c to have a gradient dc");
  layer.widen_without_kernel();
  const auto widened = [&](const Tensor& t) {
    return t.defined() && t.elements() != Elements(layer.dtype) ? widened_to_float(t) : t;
  };
  for (Tensor* t : {&back.y, &back.h_n, &back.c_n, &back.c}) *t = widened(*t);
  const Tensor y_rows = aligned(widened(y).contiguous()), saved_rows = aligned(saved.contiguous());
  Gradients g = empty_gradients(layer, weights, need);
  if (z.B > 0) {
    BackwardProblem p;
    fill(p, layer);
    p.dy = rows(back.y, layer.packed);
    p.dc = rows(back.c, layer.packed);
    p.y = input(y_rows);
    p.saved = input(saved_rows);
    p.saved_stride = layer.saved_width();
    p.dh_n = input(back.h_n);
    p.dc_n = two_states ? input(back.c_n) : nullptr;
    fill_results(p, layer, g, need);
    fill_limits(p, layer, limits);
    backend_of(layer.x).backward(layer, p);
  }
  for (const Tensor& t : {g.x, g.h0, g.c0}) given.give(narrowed(t, x.elements()));
  for (Tensor& w : g.weights) w = narrowed(w, x.elements());
  given.give(g.weights);
  for (const Tensor& t : {g.gates, g.h, g.norms}) given.give(t);
}

// The kernels take their arguments from the stack, where torch has them: the schema is the only list of them in C++.
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("layer_forward", &layer_forward);
  m.impl("layer_backward", &layer_backward);
}

}  // namespace

STABLE_TORCH_LIBRARY(fusedrnn, m) {
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

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) { implement(m); }

#if defined(FUSEDRNN_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) { implement(m); }
#endif

}  // namespace fusedrnn
