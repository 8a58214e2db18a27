// The backward pass of the stepwise driver (loop.h): back through the steps, which leaves dG of all of them; then the
// gradients that are sums over rows. `run` takes device memory of `bytes`.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../persistent/span.h"
#include "loop.h"
#include "row_stage.h"
#include "step_backward.h"

namespace fusedrnn {

template <class CellOfLayer, class Type>
struct StepwiseBackward {
  using Problem = BackwardProblem;
  using Cell = CellOfLayer;
  using T = Type;
  using S = Compute<T>;
  static constexpr DType kDType = Element<T>::kDType;
  using Norms = NormsOf<Cell>;
  static constexpr int G = Cell::kGates, kSplit = Cell::kSplit, kBlocks = Norms::kColumns, Z = Cell::kStates,
                       kBeside = Z - 1;
  static constexpr bool kProduct = Cell::kFirst > 0, kTwoProducts = kProduct && Cell::kFirst < G;
  static constexpr bool kOneType = std::is_same_v<S, T>;
  // Whether there is a kernel for many steps (persistent/backward.h); and whether it can do those of p.
  static constexpr bool kPersistent = persistent::is_persistent<Cell> && !std::is_same_v<T, double>;
  static bool can_persist(const BackwardProblem& p) {
    return kPersistent && !p.size.projected && !p.noise.mask_h && !p.noise.keep_h.data && !p.noise.keep_c.data &&
           !p.norms && !p.clip_by_norm;
  }

  // Rows that a bias gradient adds up at a time; then it adds as many such sums: short sums are exact ones.
  static int64_t rows_of_part(int64_t N) { return static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(N)))); }
  static int64_t parts(int64_t N) { return (N + rows_of_part(N) - 1) / rows_of_part(N); }

  struct Work {
    S* dh;            // [slots][B][R]
    S* sent;          // [slots][B][R] or null: what the products send back to a masked h
    S* dc;            // [slots][B][kBeside*H] or null
    S* through;       // [slots][B][H] or null
    T* dg;            // [slots][N][kBlocks*H]
    T* before;        // [slots][N][R] or null
    T* q;             // [slots][N][H] or null
    T* dy_rows;       // [slots][N][R] or null
    S* part;          // [slots][parts][kBlocks*H] or null
    S* scale;         // [slots][B][Z] or null
    S* dh_rows;       // [slots][N][R] or null
    S* sent_dc;       // [slots][N][kBeside*H] or null
    S* dc_rows;       // [slots][N][kBeside*H] or null
    T* w_hh;          // [2][G*H][R], of two directions
    T* w_hr;          // [2][R][H]
    int32_t* active;  // [T] or null: what one kernel for all steps reads of size.active
  };

  template <class Device>
  static Work arrange(Arena& arena, const BackwardProblem& p) {
    const LayerSizes& z = p.size;
    Work w = {};
    w.dh = arena.take<S>(z.D * z.B * z.R);
    if (p.noise.mask_h) w.sent = arena.take<S>(z.D * z.B * z.R);
    if (kBeside > 0) w.dc = arena.take<S>(z.D * z.B * kBeside * z.H);
    if (kTwoProducts || z.projected) w.through = arena.take<S>(z.D * z.B * z.H);
    w.dg = arena.take<T>(z.D * z.N * kBlocks * z.H);
    if (p.weight_gradients && kProduct) w.before = arena.take<T>(z.D * z.N * z.R);
    if (p.weight_gradients && (kTwoProducts || z.projected)) w.q = arena.take<T>(z.D * z.N * z.H);
    if (z.projected) w.dy_rows = arena.take<T>(z.D * z.N * z.R);
    if (z.D == 2 && kProduct) w.w_hh = arena.take<T>(2 * G * z.H * z.R);
    if (z.D == 2 && z.projected) w.w_hr = arena.take<T>(2 * z.R * z.H);
    if (p.weight_gradients && (p.dw[0].b_ih || p.dw[0].w_unit))
      w.part = arena.take<S>(z.D * parts(z.N) * kBlocks * z.H);
    if (can_persist(p) && is_ragged(z)) w.active = arena.take<int32_t>(z.T);
    if (p.clip_by_norm) w.scale = arena.take<S>(z.D * z.B * Z);
    if (p.norms) w.dh_rows = arena.take<S>(z.D * z.N * z.R);
    if (p.norms && kBeside > 0) w.sent_dc = arena.take<S>(z.D * z.N * kBeside * z.H);
    if (p.norms && kBeside > 0) w.dc_rows = arena.take<S>(z.D * z.N * kBeside * z.H);
    return w;
  }

  template <class Device>
  static int64_t bytes(const BackwardProblem& p) {
    Arena counting(nullptr);
    arrange<Device>(counting, p);
    return counting.used();
  }

  template <class Device>
  static void run(const BackwardProblem& p, void* memory, Device& device) {
    const LayerSizes& z = p.size;
    const Slots slots(z);
    Arena arena(memory);
    const Work w = arrange<Device>(arena, p);
    const int64_t H = z.H, R = z.R, B = z.B, N = z.N, C = kBeside * H;
    const T* const w_hh = kProduct ? side_by_side(device, p, &LayerWeights::w_hh, w.w_hh, G * H, R) : nullptr;
    const T* const w_hr = z.projected ? side_by_side(device, p, &LayerWeights::w_hr, w.w_hr, R, H) : nullptr;
    LoadStates<S, T> begin = {B, R, C, nullptr, w.dh, w.dc, {}, {}, {}};
    StoreStates<S, T> finish = {B, R, C, nullptr, w.dh, w.dc, {}, {}};
    BackwardBuffers<S, T> u = {};
    u.B = B, u.H = H, u.R = R, u.width = z.D * R;
    u.saved_stride = p.saved_stride;
    u.dh = w.dh, u.dc = w.dc, u.through = w.through;
    for (int s = 0; s < slots.count; ++s) {
      begin.from_h[s] = typed<T>(p.dh_n, s * B * R);
      begin.from_c[s] = typed<T>(p.dc_n, s * B * C);
      finish.to_h[s] = typed<T>(p.dh0, s * B * R);
      finish.to_c[s] = typed<T>(p.dc0, s * B * C);
      u.mask[s] = typed<T>(p.noise.mask_h, s * B * R);
      u.h0[s] = typed<T>(p.h0, s * B * R);
      u.c0[s] = typed<T>(p.c0, s * B * C);
      u.w_unit[s] = typed<T>(p.weights[s].w_unit);
      u.y[s] = typed<T>(p.y, s * R);
      u.saved[s] = typed<S>(p.saved, s * N * p.saved_stride);
      u.dg[s] = w.dg + s * N * kBlocks * H;
      u.before[s] = w.before ? w.before + s * N * R : nullptr;
      u.q[s] = w.q ? w.q + s * N * H : nullptr;
      u.dy_rows[s] = w.dy_rows ? w.dy_rows + s * N * R : nullptr;
      u.dh_rows[s] = w.dh_rows ? w.dh_rows + s * N * R : nullptr;
      u.sent_dc[s] = w.sent_dc ? w.sent_dc + s * N * C : nullptr;
      u.dc_rows[s] = w.dc_rows ? w.dc_rows + s * N * C : nullptr;
    }
    device.each(slots.count, B, std::max(C, R), begin);
    int64_t steps = z.T;
    if constexpr (kPersistent) {
      if (can_persist(p) && device.template persists<StepwiseBackward>(p)) {
        if (w.active) write_active(device, z, w.active);
        device.template run_steps<Cell>(steps_as_one(p, slots, w, w_hh, u));
        steps = 0;
      }
    }
    for (int64_t i = steps - 1; i >= 0; --i) {
      step(device, p, slots, w_hh, w_hr, u, w.sent, i);
      if (p.clip > 0 || p.bptt_steps > 0) limit(device, p, slots, w, u, i);
    }
    device.each(slots.count, B, std::max(C, R), finish);
    if (p.weight_gradients) weight_gradients(device, p, slots, w, u);
    if (p.dx) input_gradient(device, p, slots, u);
    if (p.norms) {
      RowNorms<Cell, S, T> norms = {N, B, R, H, p.dy, {}, {}, {}, {}, typed<S>(p.norms)};
      for (int s = 0; s < slots.count; ++s) {
        norms.dh[s] = u.dh_rows[s], norms.sent_dc[s] = u.sent_dc[s], norms.dc[s] = u.dc_rows[s], norms.dg[s] = u.dg[s];
      }
      device.each(slots.count, N, norm_columns(Cell::kStates, G).count, norms);
    }
    if (p.dgates) {
      device.each(z.D, N, kBlocks * H, Cast<T, S>{N, kBlocks * H, w.dg, typed<S>(p.dgates)});
      if (z.projected) device.each(z.D, N, R, Cast<T, S>{N, R, w.dy_rows, typed<S>(p.dh)});
    }
  }

 private:
  struct Columns {  // [first, first + length) of a matrix whose rows have `width`
    int64_t width, first, length;
  };

  static persistent::BackwardSpan<T> steps_as_one(const BackwardProblem& p, const Slots& slots, const Work& w,
                                                  const T* w_hh, const BackwardBuffers<S, T>& u) {
    const LayerSizes& z = p.size;
    persistent::BackwardSpan<T> all = {{0, z.T, z.T, z.B, w.active, {}}, u,           p.dy, p.dc, w_hh,
                                       static_cast<S>(p.clip),           p.bptt_steps};
    for (int s = 0; s < slots.count; ++s) all.steps.first_row[s] = z.offset[slots.time(z, s, z.T - 1)];
    return all;
  }

  template <class Device>
  static void step(Device& device, const BackwardProblem& p, const Slots& slots, const T* w_hh, const T* w_hr,
                   const BackwardBuffers<S, T>& u, S* sent, int64_t i) {
    const LayerSizes& z = p.size;
    const int64_t H = z.H, R = z.R, width = kBlocks * H;
    const StepRows at = slots.rows(z, i);
    const int64_t rows = slots.most_rows(at);
    BackwardElement<S, T> element = {u, at, {}, {}, noise_of_step<S, T>(p.noise, z, slots, i)};
    view_step(p.dy, z, slots, i, R, element.dy);
    view_step(p.dc, z, slots, i, kBeside * H, element.dc);
    // to [slots][B][columns] = or += the columns `of` of this step's rows of `from`, times a matrix [of.length,
    // columns] at `weight`, of weights `distance` apart.
    const auto multiply = [&](const T* from, Columns of, const T* weight, int64_t distance, int64_t columns, S* to,
                              bool add) {
      Product product = {0, columns, of.length, 0, kDType};
      product.a = from + at.first[0] * of.width + of.first, product.lda = of.width;
      product.a_stride = (z.N + at.first[1] - at.first[0]) * of.width;
      product.b = weight, product.ldb = columns, product.b_stride = distance;
      product.c = to, product.ldc = columns, product.c_stride = z.B * columns;
      product.c_compute = true, product.add = add;
      product_of_rows(device, slots, at.rows, product);
    };
    if (z.projected) {
      if constexpr (Cell::kProjectable) {
        device.each(slots.count, rows, R, BackwardProjected<S, T>{element});
        multiply(u.dy_rows[0], {R, 0, R}, w_hr, R * H, H, u.through, false);
        device.each(slots.count, rows, H, BackwardStep<Cell, S, T, true>{element});
      }
    } else if constexpr (Norms::kAny) {
      device.each_block(slots.count, rows, BackwardRow<Cell, S, T>{element});
    } else {
      device.each(slots.count, rows, H, BackwardStep<Cell, S, T, false>{element});
    }
    if constexpr (kTwoProducts) {
      multiply(u.dg[0], {width, Cell::kFirst * H, (G - Cell::kFirst) * H}, w_hh + Cell::kFirst * H * R, G * H * R, H,
               u.through, false);
      device.each(slots.count, rows, H, BackwardFirst<Cell, S, T>{element});
    }
    if (!kProduct) return;
    // The direct path to h_{t-1} is in dh already.
    multiply(u.dg[0], {width, 0, Cell::kFirst * H}, w_hh, G * H * R, R, sent ? sent : u.dh, !sent);
    if (sent) device.each(slots.count, rows, R, AddMasked<S, T>{element, sent});
  }

  // What step i sends to step i - 1.
  template <class Device>
  static void limit(Device& device, const BackwardProblem& p, const Slots& slots, const Work& w,
                    const BackwardBuffers<S, T>& u, int64_t i) {
    const LayerSizes& z = p.size;
    const StepRows at = slots.rows(z, i);
    const int64_t rows = slots.most_rows(at);
    const S most = static_cast<S>(p.clip);
    if (p.clip_by_norm) device.each(slots.count, rows, Z, Lengths<S>{z.B, z.R, z.H, Z, at, most, u.dh, u.dc, w.scale});
    Limit<S> limit = {z.B, z.R, z.H, Z, at, {}, most, p.clip_by_norm ? w.scale : nullptr, u.dh, u.dc};
    for (int s = 0; p.bptt_steps > 0 && i > 0 && s < slots.count; ++s) {
      limit.sever[s] = std::max(slots.time(z, s, i), slots.time(z, s, i - 1)) % p.bptt_steps == 0;
    }
    device.each(slots.count, rows, std::max(z.H, z.R), limit);
  }

  template <class Device>
  static void weight_gradients(Device& device, const BackwardProblem& p, const Slots& slots, const Work& w,
                               const BackwardBuffers<S, T>& u) {
    const LayerSizes& z = p.size;
    const int64_t H = z.H, R = z.R, I = z.I, width = kBlocks * H;
    // to [of.length, by.length], from its element `at` on: the columns `of` of `from`, transposed, times those of
    // `right`. A product a direction: they are large, and lie where torch put them.
    const auto outer = [&](T* const* from, Columns of, const T* const* right, Columns by, void* WeightGradients::* to,
                           int64_t at) {
      if (of.length == 0) return;
      Product product = {of.length, by.length, z.N, 1, kDType};
      product.lda = of.width, product.ldb = by.width, product.ldc = by.length;
      product.a_transposed = true;
      for (int s = 0; s < slots.count; ++s) {
        product.a = from[s] + of.first;
        product.b = right[s] + by.first;
        product.c = typed<T>(p.dw[s].*to, at);
        device.product(product);
      }
    };
    const T* const x = typed<T>(p.x.data);
    const T* const xs[kMaxSlots] = {x, x};
    const int64_t own = (G - kSplit) * H;  // gates whose dx is drec
    const Columns of_x = {row_stride(p.x, z), 0, I}, of_h = {R, 0, R}, of_q = {H, 0, H};
    outer(u.dg, {width, 0, own}, xs, of_x, &WeightGradients::w_ih, 0);
    outer(u.dg, {width, G * H, kSplit * H}, xs, of_x, &WeightGradients::w_ih, own * I);
    outer(u.dg, {width, 0, Cell::kFirst * H}, u.before, of_h, &WeightGradients::w_hh, 0);  // none of no gate
    if (kTwoProducts) {
      outer(u.dg, {width, Cell::kFirst * H, (G - Cell::kFirst) * H}, u.q, of_q, &WeightGradients::w_hh,
            Cell::kFirst * H * R);
    }
    if (z.projected) outer(u.dy_rows, of_h, u.q, of_q, &WeightGradients::w_hr, 0);
    if (w.part) sums_of_gates(device, p, slots, w, u);
  }

  template <class Device>
  static void sums_of_gates(Device& device, const BackwardProblem& p, const Slots& slots, const Work& w,
                            const BackwardBuffers<S, T>& u) {
    const LayerSizes& z = p.size;
    const int64_t width = kBlocks * z.H, count = parts(z.N);
    SumRows<S, T> sums = {z.N, width, rows_of_part(z.N), {}, {}};
    SumsOfGates<Cell, S, T> gradients = {z.H, count, {}, {}, {}, {}};
    for (int s = 0; s < slots.count; ++s) {
      const WeightGradients& dw = p.dw[s];
      sums.dg[s] = u.dg[s];
      gradients.part[s] = sums.part[s] = w.part + s * count * width;
      gradients.db_ih[s] = typed<T>(dw.b_ih);
      gradients.db_hh[s] = typed<T>(dw.b_hh);
      gradients.dw_unit[s] = typed<T>(dw.w_unit);
    }
    device.each(slots.count, count, width, sums);
    device.each(slots.count, 1, width, gradients);
  }

  // dx = the sum over directions of dL/d(W_ih x) W_ih, in the compute type, then rounded.
  template <class Device>
  static void input_gradient(Device& device, const BackwardProblem& p, const Slots& slots,
                             const BackwardBuffers<S, T>& u) {
    const LayerSizes& z = p.size;
    const int64_t H = z.H, own = (G - kSplit) * H, width = kBlocks * H;
    const bool rounded = !kOneType && z.D * (kSplit ? 2 : 1) > 1;
    bool first = true;
    const auto add = [&](int s, int64_t offset, int64_t length, int64_t weight_row) {
      if (length == 0) return;
      Product product = {z.N, z.I, length, 1, kDType};
      product.a = u.dg[s] + offset, product.lda = width;
      product.b = typed<T>(p.weights[s].w_ih, weight_row * z.I), product.ldb = z.I;
      product.c = rounded ? p.dx_part[0] : p.dx, product.ldc = z.I;
      product.c_compute = rounded || kOneType;
      product.add = !first;
      first = false;
      device.product(product);
    };
    for (int s = 0; s < slots.count; ++s) {
      add(s, 0, own, 0);
      add(s, G * H, kSplit * H, own);
    }
    if (rounded) device.each(1, z.N, z.I, Cast<S, T>{z.N, z.I, typed<S>(p.dx_part[0]), typed<T>(p.dx)});
  }
};

}  // namespace fusedrnn
