// The kernels of cells with layer normalisation (cells/layer_norm.h), as bodies: body(block, s, row) does one row of
// slot s, by all threads of a block. A thread does the units from block.begin() on, block.step() apart; block.sum(v) is
// the sum over all threads, the same for each. What a thread has written of a unit it reads again itself.
#pragma once

#include "step_backward.h"
#include "step_forward.h"

namespace fusedrnn {

// A block of one thread.
struct OneThread {
  FUSEDRNN_INLINE int64_t begin() const { return 0; }
  FUSEDRNN_INLINE int64_t step() const { return 1; }
  template <class S>
  FUSEDRNN_INLINE S sum(S v) const {
    return v;
  }
};

// The sum of at(j) over a row of n.
template <class S, class Block, class At>
FUSEDRNN_INLINE S sum_of_row(const Block& block, int64_t n, const At& at) {
  S sum = S(0);
  for (int64_t j = block.begin(); j < n; j += block.step()) sum += at(j);
  return block.sum(sum);
}

template <class S, class Block, class At>
FUSEDRNN_INLINE Moments<S> moments_of_row(const Block& block, int64_t n, const At& at) {
  const S mean = mean_of(sum_of_row<S>(block, n, at), n);
  const S squares = sum_of_row<S>(block, n, [&](int64_t j) {
    const S d = without_mean(at(j), mean);
    return d * d;
  });
  return {mean, scale_of_squares(squares, n)};
}

template <class Cell, class S, class T>
struct ForwardRow : ForwardElement<Cell, S, T> {
  S* late;  // [slots][B][kLate*H], with a norm of c

  using Norms = NormsOf<Cell>;
  static constexpr int G = Cell::kGates, K = Cell::kSaved, Z = Cell::kStates;

  template <class Block>
  FUSEDRNN_INLINE void operator()(const Block& block, int s, int64_t b) const {
    if (b >= this->at.rows[s]) return;
    const auto& u = this->u;
    const int64_t H = u.H, first = (s * u.B + b) * H;
    S* const saved_row = u.saved[s] ? u.saved[s] + (this->at.first[s] + b) * u.saved_stride : nullptr;
    const S *const x_row = this->x[s] + b * G * H, *const rec_row = u.rec + (s * u.B + b) * G * H;
    const Moments<S> of_x = moments_of_row<S>(block, G * H, [&](int64_t j) { return x_row[j]; });
    const Moments<S> of_rec = moments_of_row<S>(block, G * H, [&](int64_t j) { return rec_row[j]; });
    S* const late_row = Norms::kOfState ? late + first * Cell::kLate : nullptr;
    const auto gain = [&](int k, int64_t j) { return widen(u.w_unit[s][k * H + j]); };
    const auto bias = [&](const T* of, int64_t j) { return of ? widen(of[j]) : S(0); };
    for (int64_t j = block.begin(); j < H; j += block.step()) {
      Values<S, G> x, rec;
      Values<S, K> saved;
      Values<S, Z> state;
      Values<S, Cell::kLate> second;
      for (int g = 0; g < G; ++g) {
        const S x_normed = normalised(x_row[g * H + j], of_x.mean, of_x.scale);
        const S rec_normed = normalised(rec_row[g * H + j], of_rec.mean, of_rec.scale);
        if (saved_row) saved_row[(Norms::kOwnSaved + g) * H + j] = x_normed;
        if (saved_row) saved_row[(Norms::kOwnSaved + G + g) * H + j] = rec_normed;
        x[g] = with_gain(x_normed, gain(Norms::kGainOfX + g, j), bias(u.b_ih[s], g * H + j));
        rec[g] = with_gain(rec_normed, gain(Norms::kGainOfRec + g, j), bias(u.b_hh[s], g * H + j));
      }
      state[0] = this->previous_h(first + j);
      if constexpr (Z == 2) state[1] = u.c[first + j];
      Cell::forward(x, rec, state, saved, second);
      if constexpr (Norms::kOfState) {
        for (int i = 0; i < Cell::kLate; ++i) late_row[i * H + j] = second[i];
        if (this->noise.c[s]) state[1] = zoneout(this->noise.c[s](b, j), u.c[first + j], state[1]);
        u.c[first + j] = state[1];
        if (saved_row) saved_row[K * H + j] = state[1];
      } else {
        Cell::finish(second, state, saved);
        publish(u, this->at, this->noise, s, b, j, state[0]);
      }
      for (int k = 0; saved_row && k < Norms::kOwnSaved; ++k) saved_row[k * H + j] = saved[k];
    }
    S* const numbers = saved_row && block.begin() == 0 ? saved_row + (K + Z - 1) * H : nullptr;
    if (numbers) numbers[Norms::kScaleOfX] = of_x.scale, numbers[Norms::kScaleOfRec] = of_rec.scale;
    for (int64_t j = (K + Z - 1) * H + Norms::kRowValues + block.begin(); saved_row && j < u.saved_stride;
         j += block.step()) {
      saved_row[j] = S(0);
    }
    if constexpr (Norms::kOfState) {
      const Moments<S> of_c = moments_of_row<S>(block, H, [&](int64_t j) { return late_row[H + j]; });
      if (numbers) numbers[Norms::kMeanOfState] = of_c.mean, numbers[Norms::kScaleOfState] = of_c.scale;
      for (int64_t j = block.begin(); j < H; j += block.step()) {
        Values<S, K> saved;
        Values<S, Z> state;
        state[0] = this->previous_h(first + j);
        const S normed = normalised(late_row[H + j], of_c.mean, of_c.scale);
        const Values<S, Cell::kLate> second = {
            late_row[j], with_gain(normed, gain(Norms::kGainOfState, j), gain(Norms::kBiasOfState, j))};
        Cell::finish(second, state, saved);
        publish(u, this->at, this->noise, s, b, j, state[0]);
      }
    }
  }
};

template <class Cell, class S, class T>
struct BackwardRow : BackwardElement<S, T> {
  using Norms = NormsOf<Cell>;
  static constexpr int G = Cell::kGates, K = Cell::kSaved, Z = Cell::kStates;

  // Of one unit: the gradients of the gates' arguments and of what is sent back, and what they were computed with.
  struct Unit {
    Values<S, Cell::kSaved> saved;
    Values<S, Z> previous, current, d;
    Values<S, G> dx, drec;
    S normed_c, d_normed, direct_h, direct_c, sent_c, all_c;
  };

  FUSEDRNN_INLINE S gain(int s, int k, int64_t j) const { return widen(this->u.w_unit[s][k * this->u.H + j]); }

  // All of it but the cell's own gradients.
  FUSEDRNN_INLINE void read(int s, int64_t b, int64_t j, Unit& unit) const {
    const auto& u = this->u;
    const int64_t H = u.H, i = (s * u.B + b) * H + j;
    const S* const row = this->saved_row(s, b);
    for (int k = 0; k < Norms::kOwnSaved; ++k) unit.saved[k] = row[k * H + j];
    unit.previous[0] = widen(this->previous_h(s, b, j)), unit.current[0] = S(0);  // not read
    unit.d[0] = this->total_dh(s, b, j);
    unit.direct_h = this->past(this->noise.h[s], b, j, unit.d[0]);
    if constexpr (Norms::kOfState) {
      const int64_t before = (this->at.previous[s] + b) * u.saved_stride + K * H + j;
      unit.previous[1] = b < this->at.carried[s] ? u.saved[s][before] : u.c0[s] ? widen(u.c0[s][b * H + j]) : S(0);
      const S c = this->noise.c[s] ? Cell::candidate(unit.saved, unit.previous) : row[K * H + j];
      const S* const numbers = row + (K + Z - 1) * H;
      unit.normed_c = normalised(c, numbers[Norms::kMeanOfState], numbers[Norms::kScaleOfState]);
      unit.current[1] = with_gain(unit.normed_c, gain(s, Norms::kGainOfState, j), gain(s, Norms::kBiasOfState, j));
      unit.d_normed = Cell::normed_gradient(unit.saved, unit.current, unit.d);
      unit.sent_c = unit.d[1] = u.dc[i];
      const StepView<T>& dc = this->dc[s];
      if (dc.data) unit.d[1] += widen(dc.data[b * dc.batch + j]);
      unit.all_c = unit.d[1];
      unit.direct_c = this->past(this->noise.c[s], b, j, unit.d[1]);
    }
  }
  // dL/d(the normalised c).
  FUSEDRNN_INLINE S through_c(int s, int64_t j, const Unit& unit) const {
    return through_gain(unit.d_normed, gain(s, Norms::kGainOfState, j));
  }

  template <class Block>
  FUSEDRNN_INLINE void operator()(const Block& block, int s, int64_t b) const {
    if (b >= this->at.rows[s]) return;
    const auto& u = this->u;
    const int64_t H = u.H, n = this->at.first[s] + b;
    const S* const row = this->saved_row(s, b);
    const S *const x_row = row + Norms::kOwnSaved * H, *const rec_row = x_row + G * H;
    const S* const numbers = row + (K + Z - 1) * H;
    S mean_c = S(0), product_c = S(0);
    if constexpr (Norms::kOfState) {
      S sum = S(0), product = S(0);
      for (int64_t j = block.begin(); j < H; j += block.step()) {
        Unit unit;
        read(s, b, j, unit);
        sum += through_c(s, j, unit);
        product += through_c(s, j, unit) * unit.normed_c;
      }
      mean_c = mean_of(block.sum(sum), H), product_c = mean_of(block.sum(product), H);
    }
    const auto gradients = [&](int64_t j, Unit& unit) {
      read(s, b, j, unit);
      if constexpr (Norms::kOfState) {
        unit.d[1] +=
            normalised_backward(through_c(s, j, unit), unit.normed_c, mean_c, product_c, numbers[Norms::kScaleOfState]);
        if (!this->noise.c[s]) unit.all_c = unit.d[1];
      }
      Cell::backward(unit.saved, unit.previous, unit.current, unit.d, unit.dx, unit.drec);
    };
    const auto d_x = [&](int g, int64_t j, const Unit& unit) {
      return through_gain(unit.dx[g], gain(s, Norms::kGainOfX + g, j));
    };
    const auto d_rec = [&](int g, int64_t j, const Unit& unit) {
      return through_gain(unit.drec[g], gain(s, Norms::kGainOfRec + g, j));
    };
    S sum_x = S(0), product_x = S(0), sum_rec = S(0), product_rec = S(0);
    for (int64_t j = block.begin(); j < H; j += block.step()) {
      Unit unit;
      gradients(j, unit);
      for (int g = 0; g < G; ++g) {
        sum_x += d_x(g, j, unit), product_x += d_x(g, j, unit) * x_row[g * H + j];
        sum_rec += d_rec(g, j, unit), product_rec += d_rec(g, j, unit) * rec_row[g * H + j];
      }
    }
    const S mean_x = mean_of(block.sum(sum_x), G * H), mean_product_x = mean_of(block.sum(product_x), G * H);
    const S mean_rec = mean_of(block.sum(sum_rec), G * H), mean_product_rec = mean_of(block.sum(product_rec), G * H);
    for (int64_t j = block.begin(); j < H; j += block.step()) {
      const int64_t i = (s * u.B + b) * H + j;
      Unit unit;
      gradients(j, unit);
      if (u.before[s]) u.before[s][n * H + j] = narrow<T>(this->previous_operand(s, b, j));
      if (u.dh_rows[s]) u.dh_rows[s][n * H + j] = u.dh[i];
      T* const out = u.dg[s] + n * Norms::kColumns * H + j;
      const auto put = [&](int column, S v) { out[column * H] = narrow<T>(v); };
      for (int g = 0; g < G; ++g) {
        const S x = x_row[g * H + j], rec = rec_row[g * H + j];
        put(g, normalised_backward(d_rec(g, j, unit), rec, mean_rec, mean_product_rec, numbers[Norms::kScaleOfRec]));
        put(G + g, normalised_backward(d_x(g, j, unit), x, mean_x, mean_product_x, numbers[Norms::kScaleOfX]));
        put(Norms::kFactors + Norms::kGainOfX + g, through_gain(unit.dx[g], x));
        put(Norms::kFactors + Norms::kGainOfRec + g, through_gain(unit.drec[g], rec));
        put(Norms::kFirstArgument + g, unit.drec[g]);
        if (g >= G - Norms::kGateSplit) put(Norms::argument(g), unit.dx[g]);
      }
      u.dh[i] = unit.d[0] + unit.direct_h;
      if constexpr (Norms::kOfState) {
        put(Norms::kFactors + Norms::kGainOfState, through_gain(unit.d_normed, unit.normed_c));
        put(Norms::kFactors + Norms::kBiasOfState, unit.d_normed);
        if (u.sent_dc[s]) u.sent_dc[s][n * H + j] = unit.sent_c;
        if (u.dc_rows[s]) u.dc_rows[s][n * H + j] = unit.all_c;
        u.dc[i] = unit.d[1] + unit.direct_c;
      }
    }
  }
};

}  // namespace fusedrnn
