// The forward pass of the stepwise driver (loop.h): the products W_ih x of a span of steps, then step by step W_hh h
// and the cell. `run` takes device memory of `bytes`.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../persistent/span.h"
#include "loop.h"
#include "row_stage.h"
#include "step_forward.h"

namespace fusedrnn {

template <class CellOfLayer, class Type>
struct StepwiseForward {
  using Problem = ForwardProblem;
  using Cell = CellOfLayer;
  using T = Type;
  using S = Compute<T>;
  static constexpr DType kDType = Element<T>::kDType;
  using Norms = NormsOf<Cell>;
  static constexpr int G = Cell::kGates, kBeside = Cell::kStates - 1;
  static constexpr bool kProduct = Cell::kFirst > 0, kTwoProducts = kProduct && Cell::kFirst < G;
  static constexpr bool kOneType = std::is_same_v<S, T>;
  // Whether there is a kernel for many steps (persistent/forward.h); and whether it can do those of p.
  static constexpr bool kPersistent = persistent::is_persistent<Cell> && !std::is_same_v<T, double>;
  static bool can_persist(const ForwardProblem& p) {
    return kPersistent && !p.size.projected && !p.noise.mask_h && !p.noise.keep_h.data && !p.noise.keep_c.data;
  }

  struct Work {
    S* x;             // [slots][limit][G*H]
    S* rec;           // [slots][B][G*H] or null
    T* operand;       // [slots][B][R]
    S* h;             // [slots][B][R], or null: `operand` is all there is to know of it
    S* c;             // [slots][B][kBeside*H] or null
    T* q;             // [slots][B][H] or null
    S* kept;          // [slots][B][kSaved*H] or null
    S* late;          // [slots][B][kLate*H] or null
    T* w_ih;          // [2][G*H][I], of two directions, as all the weights here
    T* w_hh;          // [2][G*H][R]
    T* w_hr;          // [2][R][H]
    int32_t* active;  // [T] or null: what one kernel for many steps reads of size.active
    int64_t limit;
  };

  template <class Device>
  static Work arrange(Arena& arena, const ForwardProblem& p) {
    const LayerSizes& z = p.size;
    Work w = {};
    const int64_t row = z.D * G * z.H;
    w.limit = std::min(z.N, std::max(z.B, Device::kProjectionBytes / (row * static_cast<int64_t>(sizeof(S)))));
    w.x = arena.take<S>(w.limit * row);
    if (kProduct) w.rec = arena.take<S>(z.B * row);
    w.operand = arena.take<T>(z.D * z.B * z.R);
    if ((!kOneType && !z.projected) || p.noise.mask_h || p.noise.changes_h()) w.h = arena.take<S>(z.D * z.B * z.R);
    if (kBeside > 0) w.c = arena.take<S>(z.D * z.B * kBeside * z.H);
    if (kTwoProducts || z.projected) w.q = arena.take<T>(z.D * z.B * z.H);
    if (kTwoProducts && !p.saved) w.kept = arena.take<S>(z.D * z.B * Cell::kSaved * z.H);
    if (Norms::kOfState) w.late = arena.take<S>(z.D * z.B * Cell::kLate * z.H);
    if (z.D == 2) {
      w.w_ih = arena.take<T>(row * z.I);
      if (kProduct) w.w_hh = arena.take<T>(row * z.R);
      if (z.projected) w.w_hr = arena.take<T>(2 * z.R * z.H);
    }
    if (can_persist(p) && is_ragged(z)) w.active = arena.take<int32_t>(z.T);
    return w;
  }

  template <class Device>
  static int64_t bytes(const ForwardProblem& p) {
    Arena counting(nullptr);
    arrange<Device>(counting, p);
    return counting.used();
  }

  template <class Device>
  static void run(const ForwardProblem& p, void* memory, Device& device) {
    const LayerSizes& z = p.size;
    const Slots slots(z);
    Arena arena(memory);
    const Work w = arrange<Device>(arena, p);
    const int64_t H = z.H, R = z.R, B = z.B, C = kBeside * H;
    const Weights weights = {side_by_side(device, p, &LayerWeights::w_ih, w.w_ih, G * H, z.I),
                             kProduct ? side_by_side(device, p, &LayerWeights::w_hh, w.w_hh, G * H, R) : nullptr,
                             z.projected ? side_by_side(device, p, &LayerWeights::w_hr, w.w_hr, R, H) : nullptr};
    LoadStates<S, T> begin = {B, R, C, w.operand, w.h, w.c, {}, {}, {}};
    StoreStates<S, T> finish = {B, R, C, w.operand, w.h, w.c, {}, {}};
    ForwardBuffers<S, T> u = {};
    u.B = B, u.H = H, u.R = R, u.width = z.D * R;
    u.saved_stride = p.saved_stride;
    u.kept = w.kept, u.rec = w.rec, u.operand = w.operand, u.h = w.h, u.c = w.c, u.q = w.q;
    for (int s = 0; s < slots.count; ++s) {
      begin.from_h[s] = typed<T>(p.h0, s * B * R);
      begin.from_c[s] = typed<T>(p.c0, s * B * C);
      finish.to_h[s] = typed<T>(p.h_n, s * B * R);
      finish.to_c[s] = typed<T>(p.c_n, s * B * C);
      u.mask[s] = begin.mask[s] = typed<T>(p.noise.mask_h, s * B * R);
      u.b_ih[s] = typed<T>(p.weights[s].b_ih);
      u.b_hh[s] = typed<T>(p.weights[s].b_hh);
      u.w_unit[s] = typed<T>(p.weights[s].w_unit);
      u.y[s] = typed<T>(p.y, s * R);
      u.saved[s] = typed<S>(p.saved, s * z.N * p.saved_stride);
    }
    device.each(slots.count, B, std::max(C, R), begin);
    bool persists = false;
    if constexpr (kPersistent) persists = can_persist(p) && device.template persists<StepwiseForward>(p);
    if (persists && w.active) write_active(device, z, w.active);
    for (int64_t i = 0; i < z.T;) {
      const int64_t chunk = i, end = slots.span_end(z, i, w.limit);
      const StepRows span = slots.span(z, chunk, end);
      project(device, p, slots, w, weights, span);
      if constexpr (kPersistent) {
        if (persists) {
          device.template run_steps<Cell>(steps_as_one(z, slots, w, weights, u, span, chunk, end));
          i = end;
        }
      }
      for (; i < end; ++i) step(device, p, slots, w, weights, u, span, i);
    }
    device.each(slots.count, B, std::max(C, R), finish);
  }

 private:
  struct Weights {
    const T* w_ih;
    const T* w_hh;
    const T* w_hr;
  };

  // W_ih x of the rows of a span.
  template <class Device>
  static void project(Device& device, const ForwardProblem& p, const Slots& slots, const Work& w,
                      const Weights& weights, const StepRows& span) {
    const LayerSizes& z = p.size;
    Product product = {0, G * z.H, z.I, 0, kDType};
    product.lda = row_stride(p.x, z), product.ldb = z.I, product.ldc = G * z.H;
    product.a = typed<T>(p.x.data, span.first[0] * product.lda);
    product.a_stride = (span.first[1] - span.first[0]) * product.lda;
    product.b = weights.w_ih, product.b_stride = G * z.H * z.I;
    product.c = w.x, product.c_stride = w.limit * G * z.H;
    product.b_transposed = product.c_compute = true;
    product_of_rows(device, slots, span.rows, product);
  }

  static persistent::ForwardSpan<T> steps_as_one(const LayerSizes& z, const Slots& slots, const Work& w,
                                                 const Weights& weights, const ForwardBuffers<S, T>& u,
                                                 const StepRows& span, int64_t begin, int64_t end) {
    persistent::ForwardSpan<T> all = {
        {begin, end, z.T, z.B, w.active, {}}, u, w.x, w.limit * G * z.H, {}, weights.w_hh};
    for (int s = 0; s < slots.count; ++s) {
      all.steps.first_row[s] = z.offset[slots.time(z, s, begin)];
      all.first_x[s] = span.first[s];
    }
    return all;
  }

  template <class Device>
  static void step(Device& device, const ForwardProblem& p, const Slots& slots, const Work& w, const Weights& weights,
                   const ForwardBuffers<S, T>& u, const StepRows& span, int64_t i) {
    const LayerSizes& z = p.size;
    const int64_t H = z.H, R = z.R;
    const StepRows at = slots.rows(z, i);
    const int64_t rows = slots.most_rows(at);
    ForwardElement<Cell, S, T> element = {u, at, noise_of_step<S, T>(p.noise, z, slots, i), {}};
    for (int s = 0; s < slots.count; ++s) element.x[s] = w.x + (s * w.limit + at.first[s] - span.first[s]) * G * H;
    Product product = {0, Cell::kFirst * H, R, 0, kDType};
    product.a = w.operand, product.lda = R, product.a_stride = z.B * R;
    product.b = weights.w_hh, product.ldb = R, product.b_stride = G * H * R;
    product.c = w.rec, product.ldc = G * H, product.c_stride = z.B * G * H;
    product.b_transposed = product.c_compute = true;
    if constexpr (kProduct) product_of_rows(device, slots, at.rows, product);
    if constexpr (kTwoProducts) {
      device.each(slots.count, rows, H, ForwardFirst<Cell, S, T>{element});
      product.n = (G - Cell::kFirst) * H;
      product.a = w.q, product.a_stride = z.B * H;
      product.b = weights.w_hh + Cell::kFirst * H * R;
      product.c = w.rec + Cell::kFirst * H;
      product_of_rows(device, slots, at.rows, product);
    }
    if constexpr (Cell::kProjectable) {
      if (z.projected) {
        device.each(slots.count, rows, H, ForwardStep<Cell, S, T, true>{element});
        return project_output(device, p, slots, w, weights, element);
      }
    }
    if constexpr (Norms::kAny) device.each_block(slots.count, rows, ForwardRow<Cell, S, T>{element, w.late});
    else device.each(slots.count, rows, H, ForwardStep<Cell, S, T, false>{element});
  }

  // h = W_hr (o * tanh(c)), where the next product reads it; then y.
  template <class Device>
  static void project_output(Device& device, const ForwardProblem& p, const Slots& slots, const Work& w,
                             const Weights& weights, const ForwardElement<Cell, S, T>& element) {
    const LayerSizes& z = p.size;
    Product product = {0, z.R, z.H, 0, kDType};
    product.a = w.q, product.lda = z.H, product.a_stride = z.B * z.H;
    product.b = weights.w_hr, product.ldb = z.H, product.b_stride = z.R * z.H;
    product.c = w.operand, product.ldc = z.R, product.c_stride = z.B * z.R;
    product.b_transposed = true;
    product_of_rows(device, slots, element.at.rows, product);
    const PublishProjected<S, T> body = {element.u, element.at, element.noise};
    device.each(slots.count, slots.most_rows(element.at), z.R, body);
  }
};

}  // namespace fusedrnn
