// See second_order.h.
#include "second_order.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <iterator>

#include "borrowed.h"
#include "cells/dual.h"
#include "cells/registry.h"

namespace fusedrnn {
namespace {

using torch::autograd::AutogradContext;
using List = torch::autograd::variable_list;

// The elementwise part of a step, [B, *] each, of type S; null: zeros. G gates, of which the last `split` have two
// gradients, as in BackwardProblem::dgates.
struct StepTangents {
  int64_t B, H, saved_stride;
  const void *saved, *h, *c, *y;           // c: before the step
  const void *dh, *dc;                     // gradients of the next states
  const void *x_dot, *rec_dot, *prev_dot;  // tangents of the two products [B, G*H], and of the state around them [B, H]
  void* gates_dot;                         // of the gates' gradients [B, (G + split)*H]
  void *h_dot, *c_dot;                     // of the next states
  void* direct_dot;                        // of the gradient that goes around the products, [B, H]
};

template <class S>
S value_at(const void* row, int64_t i) {
  return row ? static_cast<const S*>(row)[i] : S(0);
}

// Forward once more, as tangents, then the backward pass of numbers and their tangents.
template <class Cell, class S>
void tangents_of_rows(const StepTangents& p, int64_t first, int64_t last) {
  constexpr int G = Cell::kGates, K = Cell::kSaved, Z = Cell::kStates, kSplit = Cell::kSplit;
  using D = Dual<S>;
  const int64_t H = p.H;
  for (int64_t b = first; b < last; ++b) {
    const S* const saved_row = static_cast<const S*>(p.saved) + b * p.saved_stride;
    S* const gates_row = static_cast<S*>(p.gates_dot) + b * (G + kSplit) * H;
    for (int64_t u = 0; u < H; ++u) {
      const int64_t i = b * H + u;
      Values<S, K> saved, saved_dot;
      Values<S, Z> prev, cur, dot;
      Values<S, G> x, rec;
      for (int k = 0; k < K; ++k) saved[k] = saved_row[k * H + u];
      for (int g = 0; g < G; ++g) {
        x[g] = value_at<S>(p.x_dot, (b * G + g) * H + u);
        rec[g] = value_at<S>(p.rec_dot, (b * G + g) * H + u);
      }
      prev[0] = value_at<S>(p.h, i), cur[0] = value_at<S>(p.y, i), dot[0] = Z == 1 ? value_at<S>(p.prev_dot, i) : S(0);
      if constexpr (Z > 1)
        prev[1] = value_at<S>(p.c, i), cur[1] = saved_row[K * H + u], dot[1] = value_at<S>(p.prev_dot, i);
      Values<D, K> saved_both;
      Values<D, Z> prev_both, cur_both, d;
      Values<D, G> dx, drec;
      for (int z = 0; z < Z; ++z) prev_both[z] = {prev[z], dot[z]};
      Cell::tangent(saved, prev, cur, x, rec, dot, saved_dot);
      for (int k = 0; k < K; ++k) saved_both[k] = {saved[k], saved_dot[k]};
      for (int z = 0; z < Z; ++z) cur_both[z] = {cur[z], dot[z]}, d[z] = {value_at<S>(z ? p.dc : p.dh, i), S(0)};
      Cell::backward(saved_both, prev_both, cur_both, d, dx, drec);
      for (int g = 0; g < G; ++g) gates_row[g * H + u] = drec[g].dot;
      for (int g = G - kSplit; g < G; ++g) gates_row[(g + kSplit) * H + u] = dx[g].dot;
      static_cast<S*>(p.h_dot)[i] = dot[0];
      if constexpr (Z > 1) static_cast<S*>(p.c_dot)[i] = dot[1];
      static_cast<S*>(p.direct_dot)[i] = d[Z - 1].dot;
    }
  }
}

using Rows = void (*)(const StepTangents&, int64_t, int64_t);
struct OfCell {
  Rows float32, float64;
};

template <class Cell>
constexpr OfCell of_cell() {
  if constexpr (requires(Values<float, Cell::kSaved>& s, Values<float, Cell::kStates>& z,
                         Values<float, Cell::kGates>& g) { Cell::tangent(s, z, z, g, g, z, s); }) {
    return {tangents_of_rows<Cell, float>, tangents_of_rows<Cell, double>};
  } else {
    return {nullptr, nullptr};
  }
}

template <class... Cells>
Rows rows_of(int cell, at::ScalarType type, CellList<Cells...>) {
  static constexpr OfCell table[] = {of_cell<Cells>()...};
  return type == at::kFloat ? table[cell].float32 : type == at::kDouble ? table[cell].float64 : nullptr;
}
Rows rows_of(const CellStep& step) { return rows_of(step.cell, step.x.scalar_type(), Registry{}); }

void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  if (!a.defined() || !b.defined()) return;
  if (sum.defined()) sum.addmm_(a, b);
  else sum = at::mm(a, b);
}
at::Tensor turned(const at::Tensor& t) { return t.defined() ? t.t() : t; }
void* data_of(at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }
const void* read(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

// One for each of x, the states that are given and the weights; undefined: zero, or not wanted.
struct Leaves {
  at::Tensor x, h, c, w_ih, w_hh, b_ih, b_hh;
  static Leaves of(const List& list, size_t states) {
    const auto get = [&](size_t i) { return i < list.size() ? list[i] : at::Tensor(); };
    const size_t w = 1 + states;
    return {list[0],
            states > 0 ? list[1] : at::Tensor(),
            states > 1 ? list[2] : at::Tensor(),
            get(w),
            get(w + 1),
            get(w + 2),
            get(w + 3)};
  }
};

// A product that gates take: the columns of the gates' gradients, and the rows of its weights.
struct Part {
  int64_t column, row, size;
};

constexpr const char* kChanged =
    "fusedrnn: what a cell had saved for its second derivative has another shape or type now";

struct Twice {
  CellStep step;
  at::Tensor y, saved, gates, dh, dc;  // gates: their gradients

  // The Hessian's product with v by the leaves, those of `wanted`, and the tangents of the next states.
  std::pair<List, List> product(const List& vector, const std::vector<bool>& wanted) {
    const CellConstants& cell = training_library().constants(step.cell);
    const size_t states = step.states.size();
    List leaves = {step.x};
    leaves.insert(leaves.end(), step.states.begin(), step.states.end());
    leaves.insert(leaves.end(), step.weights.begin(), step.weights.end());
    const Leaves leaf = Leaves::of(leaves, states), v = Leaves::of(vector, states);
    const int64_t B = leaf.x.size(0), H = leaf.w_hh.size(1), all = cell.gates * H, split = cell.split * H;

    at::Tensor x_dot, rec_dot;                      // (T3)
    at::Tensor& rec = split > 0 ? rec_dot : x_dot;  // one sum serves both
    const auto add = [&](at::Tensor& sum, const at::Tensor& bias) {
      if (bias.defined()) sum = sum.defined() ? sum.add_(bias) : bias.repeat({B, 1});
    };
    add_product(x_dot, v.x, turned(leaf.w_ih));
    add_product(x_dot, leaf.x, turned(v.w_ih));
    add(x_dot, v.b_ih);
    add_product(rec, v.h, turned(leaf.w_hh));
    add_product(rec, leaf.h, turned(v.w_hh));
    add(rec, v.b_hh);

    const auto empty = [&](int64_t columns) { return at::empty({B, columns}, leaf.x.options()); };
    at::Tensor gates_dot = empty(all + split), h_dot = empty(H), direct = empty(H), c_dot;
    if (cell.states > 1) c_dot = empty(H);
    const auto of_units = [&](const at::Tensor& t) { return checked(t, {B, H}); };
    const at::Tensor h = of_units(leaf.h), c = of_units(leaf.c), y_rows = of_units(y), dh_rows = of_units(dh),
                     dc_rows = of_units(dc), prev_dot = of_units(cell.states > 1 ? v.c : v.h),
                     of_x = checked(x_dot, {B, all}), of_h = checked(rec_dot, {B, all}),
                     saved_rows = checked(saved, {1, B, saved.size(-1)});
    TORCH_CHECK(saved.size(-1) >= (cell.saved + cell.states - 1) * H, kChanged);
    const StepTangents elements = {.B = B,
                                   .H = H,
                                   .saved_stride = saved.size(-1),
                                   .saved = read(saved_rows),
                                   .h = read(h),
                                   .c = read(c),
                                   .y = read(y_rows),
                                   .dh = read(dh_rows),
                                   .dc = read(dc_rows),
                                   .x_dot = read(of_x),
                                   .rec_dot = read(of_h),
                                   .prev_dot = read(prev_dot),
                                   .gates_dot = data_of(gates_dot),
                                   .h_dot = data_of(h_dot),
                                   .c_dot = data_of(c_dot),
                                   .direct_dot = data_of(direct)};
    const Rows rows = rows_of(step);
    constexpr int64_t kElements = 4096;  // that are worth a thread
    at::parallel_for(0, B, std::max<int64_t>(1, kElements / std::max<int64_t>(1, H)),
                     [&](int64_t first, int64_t last) { rows(elements, first, last); });

    // (T9)
    std::vector<Part> inputs = {{0, 0, all - split}};
    if (split > 0) inputs.push_back({all, all - split, split});
    const Part recurrent = {0, 0, all};
    const auto of = [](const at::Tensor& gates, const Part& part) { return gates.narrow(1, part.column, part.size); };
    const auto rows_of_part = [](const at::Tensor& w, const Part& part) {
      return w.defined() ? w.narrow(0, part.row, part.size) : w;
    };
    List result(leaves.size());
    const auto by_operand = [&](at::Tensor& sum, const Part& part, const at::Tensor& w, const at::Tensor& w_dot) {
      add_product(sum, of(gates_dot, part), rows_of_part(w, part));
      add_product(sum, of(gates, part), rows_of_part(w_dot, part));
    };
    const auto by_weight = [&](const at::Tensor& sum, const Part& part, const at::Tensor& operand,
                               const at::Tensor& operand_dot) {
      at::Tensor own = rows_of_part(sum, part);
      if (operand.defined()) at::mm_out(own, of(gates_dot, part).t(), operand);
      else own.zero_();
      add_product(own, of(gates, part).t(), operand_dot);
    };
    const size_t w = 1 + states;
    if (wanted[0]) {
      for (const Part& part : inputs) by_operand(result[0], part, leaf.w_ih, v.w_ih);
    }
    if (states > 0 && wanted[1]) {
      by_operand(result[1], recurrent, leaf.w_hh, v.w_hh);
      if (cell.states == 1) result[1].add_(direct);
    }
    if (states > 1 && wanted[2]) result[2] = direct;
    if (wanted[w]) {
      result[w] = at::empty_like(leaf.w_ih, at::MemoryFormat::Contiguous);
      for (const Part& part : inputs) by_weight(result[w], part, leaf.x, v.x);
    }
    if (wanted[w + 1]) {
      result[w + 1] = at::empty_like(leaf.w_hh, at::MemoryFormat::Contiguous);
      by_weight(result[w + 1], recurrent, leaf.h, v.h);
    }
    if (leaf.b_ih.defined() && (wanted[w + 2] || wanted[w + 3])) {
      const at::Tensor sums = gates_dot.sum(0);
      result[w + 3] = sums.narrow(0, 0, all).clone();
      result[w + 2] = result[w + 3].clone();
      if (split > 0) result[w + 2].narrow(0, all - split, split).copy_(sums.narrow(0, all, split));
    }
    return {std::move(result), {h_dot, c_dot}};
  }

  // Whose memory is read: a hook of saved tensors may have given another.
  at::Tensor checked(const at::Tensor& t, at::IntArrayRef sizes) const {
    if (!t.defined()) return t;
    TORCH_CHECK(plain(t) && t.is_cpu() && t.sizes() == sizes && t.scalar_type() == step.x.scalar_type(), kChanged);
    return t.contiguous();
  }
};

struct StepGradient : torch::autograd::Function<StepGradient> {
  // leaves: x, the states that are given, the weights; from: those of of.from that are defined. Returns the gradients
  // that are wanted.
  static List forward(AutogradContext* ctx, const StepGradients& of, at::TensorList leaves, at::TensorList from) {
    ctx->set_materialize_grads(false);
    CellStep step = of.step;
    at::Tensor h = of.h, saved = of.saved;
    List given = of.from;
    const size_t states = step.states.size(), w = 1 + states;
    const bool weights =
        std::any_of(of.wanted.begin() + static_cast<int64_t>(w), of.wanted.end(), [](bool b) { return b; });
    OptionalTensor cotangents[2];
    for (size_t i = 0; i < given.size(); ++i) {
      if (given[i].defined()) cotangents[i] = borrowed(given[i]);
    }
    const LayerGradients g = training_library().backward(call_of(step), cotangents[0], cotangents[1], borrowed(h),
                                                         borrowed(saved), {of.wanted[0], weights, true, false});
    List to_save(leaves.begin(), leaves.end());
    to_save.insert(to_save.end(), from.begin(), from.end());
    // A cell that saves nothing reads h again; of a layer it is a view of y, which its caller may write.
    const bool reads_h = training_library().constants(step.cell).saved == 0;
    to_save.insert(to_save.end(), {reads_h ? h.is_view() ? h.clone() : h : step.x, saved, without_first(g.gates)});
    ctx->save_for_backward(std::move(to_save));
    ctx->saved_data["cell"] = std::string(training_library().constants(step.cell).name);
    ctx->saved_data["states"] = static_cast<int64_t>(states);
    c10::List<bool> wanted, of_states;
    for (const bool one : of.wanted) wanted.push_back(one);
    for (const at::Tensor& t : of.from) of_states.push_back(t.defined());
    ctx->saved_data["wanted"] = wanted;
    ctx->saved_data["from"] = of_states;
    List all = {of.wanted[0] ? without_first(g.x) : at::Tensor()};
    if (states > 0) all.push_back(without_first(g.h0));
    if (states > 1) all.push_back(without_first(g.c0));
    for (size_t i = 0; i < step.weights.size(); ++i) all.push_back(weights ? as_torch(g.weights[i]) : at::Tensor());
    List result;
    for (size_t i = 0; i < all.size(); ++i) {
      if (of.wanted[i]) result.push_back(all[i]);
    }
    return result;
  }

  static List backward(AutogradContext* ctx, List v) {
    List saved = ctx->get_saved_variables();
    const int cell = training_library().find_cell(ctx->saved_data["cell"].toStringRef());
    const int64_t states = ctx->saved_data["states"].toInt(), outputs = training_library().constants(cell).states;
    const c10::List<bool> first = ctx->saved_data["wanted"].toBoolList(), of = ctx->saved_data["from"].toBoolList();
    const auto leaves = static_cast<int64_t>(first.size());
    const auto begin = saved.begin(), weights = begin + 1 + states, end = begin + leaves, last = saved.end() - 3;
    List from(outputs);
    std::vector<bool> wanted;  // of the leaves, then of the gradients that came
    for (int64_t i = 0; i < last - begin; ++i) wanted.push_back(ctx->needs_input_grad(i));
    for (int64_t i = 0, next = 0; i < outputs; ++i) {
      if (of[i]) from[i] = end[next++];
    }
    List vector(leaves);
    for (int64_t i = 0, next = 0; i < leaves; ++i) {
      if (first[i]) vector[i] = v[next++];
    }
    const bool reads_h = training_library().constants(cell).saved == 0;
    Twice twice = {{cell, saved[0], {begin + 1, weights}, {weights, end}},
                   reads_h ? last[0] : at::Tensor(),
                   last[1],
                   last[2],
                   from[0],
                   outputs > 1 ? from[1] : at::Tensor()};
    List result(1 + wanted.size());  // the arguments: of, the leaves, from
    if (std::none_of(v.begin(), v.end(), [](const at::Tensor& t) { return t.defined(); })) return result;
    List found;
    if (at::GradMode::is_enabled() || !all_plain(v, saved)) {
      std::vector<bool> needed;
      for (int64_t i = 0; i < leaves; ++i) needed.push_back(first[i]);
      found = long_way_twice(twice, from, needed, vector, wanted);
    } else {
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      auto [by_leaf, tangents] = twice.product(vector, wanted);
      found = std::move(by_leaf);
      for (int64_t i = 0; i < outputs; ++i) {
        if (of[i]) found.push_back(tangents[i]);
      }
    }
    for (size_t i = 0; i < found.size(); ++i) {
      if (wanted[i]) result[1 + i] = found[i];
    }
    return result;
  }

  // Of tensors that are functions of the leaves: what autograd makes of the long way.
  static List long_way_twice(const Twice& twice, const List& from, const std::vector<bool>& first, const List& vector,
                             const std::vector<bool>& wanted) {
    const bool graph = at::GradMode::is_enabled();
    const c10::AutoGradMode with_graph(true);
    List given = {twice.step.x};
    given.insert(given.end(), twice.step.states.begin(), twice.step.states.end());
    given.insert(given.end(), twice.step.weights.begin(), twice.step.weights.end());
    for (const at::Tensor& t : from) {
      if (t.defined()) given.push_back(t);
    }
    List inputs, cotangents(from.size());
    for (size_t i = 0; i < given.size(); ++i) {
      given[i] = given[i].view_as(given[i]);  // one may be computed from another
      if (wanted[i]) inputs.push_back(given[i]);
    }
    const size_t states = twice.step.states.size(), leaves = first.size();
    const auto begin = given.begin(), end = begin + static_cast<int64_t>(leaves);
    const auto weights = begin + 1 + static_cast<int64_t>(states);
    const CellStep step{twice.step.cell, given[0], {begin + 1, weights}, {weights, end}};
    for (size_t i = 0, next = 0; i < from.size(); ++i) {
      if (from[i].defined()) cotangents[i] = end[static_cast<int64_t>(next++)];
    }
    // (Where a graph is wanted it reads no y, which is not there for every cell.)
    const at::Tensor y = twice.y.defined() ? twice.y : at::zeros_like(twice.gates);
    const List found = way_of_python()({step, y, twice.saved, cotangents, first});
    List outputs, vectors;
    for (size_t i = 0; i < leaves; ++i) {
      if (!vector[i].defined() || !found[i].defined() || !found[i].requires_grad()) continue;
      outputs.push_back(found[i]);
      vectors.push_back(vector[i]);
    }
    List result(given.size());
    if (outputs.empty() || inputs.empty()) return result;
    const List gradients = torch::autograd::grad(outputs, inputs, vectors, graph, graph, true);
    for (size_t i = 0, next = 0; i < given.size(); ++i) {
      if (wanted[i]) result[i] = gradients[next++];
    }
    return result;
  }
};

}  // namespace

bool differentiates_twice(const CellStep& step) { return step.x.is_cpu() && rows_of(step); }

List gradients_with_graph(const StepGradients& of) {
  List leaves = {of.step.x};
  leaves.insert(leaves.end(), of.step.states.begin(), of.step.states.end());
  leaves.insert(leaves.end(), of.step.weights.begin(), of.step.weights.end());
  List result(leaves.size());
  const auto given = [](const at::Tensor& t) { return t.defined(); };
  const bool some = std::any_of(of.wanted.begin(), of.wanted.end(), [](bool w) { return w; });
  if (!some || std::none_of(of.from.begin(), of.from.end(), given)) return result;
  List from;
  std::copy_if(of.from.begin(), of.from.end(), std::back_inserter(from), given);
  const List found = StepGradient::apply(of, at::TensorList(leaves), at::TensorList(from));
  for (size_t i = 0, next = 0; i < result.size(); ++i) {
    if (of.wanted[i]) result[i] = found[next++];
  }
  return result;
}

}  // namespace fusedrnn
