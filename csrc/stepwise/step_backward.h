// The bodies (step.h) of the backward pass: a step, the limits on what it sends back, norms, the sums after all steps.
#pragma once

#include "step.h"

namespace fusedrnn {

// What the steps of a backward pass share. A row of dg holds the gradients of rec for all gates, then those of x for
// the last kSplit gates, then what the units' parameters get, and with norms the gradients of the gates' arguments:
// kColumns (cells/layer_norm.h) blocks of H.
template <class S, class T>
struct BackwardBuffers {
  int64_t B, H, R, width;
  PerSlot<const T*> h0;     // [B, R] or null
  PerSlot<const T*> c0;     // [B, Z*H] or null, Z = kStates - 1
  PerSlot<const T*> y;      // [N, width], from the direction's first column on
  PerSlot<const S*> saved;  // [N, saved_stride]
  int64_t saved_stride;
  PerSlot<const T*> w_unit;  // [U*H] or null
  PerSlot<T*> dg;            // [N, kColumns*H]
  PerSlot<const T*> mask;    // [B, R] or null
  PerSlot<T*> before;        // [N, R]: mask * h_{t-1} of each row, or null
  PerSlot<T*> q;             // [N, H]: operand of the second product or output before its projection; or null
  PerSlot<T*> dy_rows;       // [N, R]: dL/d(W_hr (o * tanh(c))) of a projected layer
  PerSlot<S*> dh_rows;       // [N, R]: dL/dh_t but for dy, or null
  PerSlot<S*> sent_dc;       // [N, Z*H]: what the later steps and dc_n send to c_t, or null
  PerSlot<S*> dc_rows;       // [N, Z*H]: dL/dc_t by all ways, or null
  S* dh;                     // [slots][B][R]: dL/dh of this step but for dy
  S* dc;                     // [slots][B][Z][H]
  S* through;                // [slots][B][H]: dL/dq, or the gradient through the projection
};

template <class S, class T>
struct BackwardElement {
  BackwardBuffers<S, T> u;
  StepRows at;
  PerSlot<StepView<T>> dy;
  PerSlot<StepView<T>> dc;
  StepNoise<S, T> noise;

  FUSEDRNN_INLINE S with_mask(int s, int64_t b, int64_t r, S v) const {
    return u.mask[s] ? masked(v, widen(u.mask[s][b * u.R + r])) : v;
  }
  // As the products read it.
  FUSEDRNN_INLINE S previous_operand(int s, int64_t b, int64_t r) const {
    return with_mask(s, b, r, widen(previous_h(s, b, r)));
  }
  FUSEDRNN_INLINE T previous_h(int s, int64_t b, int64_t r) const {
    return b < at.carried[s] ? u.y[s][(at.previous[s] + b) * u.width + r]
           : u.h0[s]         ? u.h0[s][b * u.R + r]
                             : narrow<T>(0);
  }
  FUSEDRNN_INLINE S total_dh(int s, int64_t b, int64_t r) const {
    const S dh = u.dh[(s * u.B + b) * u.R + r];
    return dy[s].data ? dh + widen(dy[s].data[b * dy[s].batch + r]) : dh;
  }
  // What goes past the cell to the state before.
  FUSEDRNN_INLINE static S past(const typename StepNoise<S, T>::Keep& keep, int64_t b, int64_t j, S& d) {
    return keep ? zoneout_backward(keep(b, j), d) : S(0);
  }
  FUSEDRNN_INLINE const S* saved_row(int s, int64_t b) const { return u.saved[s] + (at.first[s] + b) * u.saved_stride; }
};

// dL/dy of a projected layer, as its product reads it, and h_{t-1}.
template <class S, class T>
struct BackwardProjected : BackwardElement<S, T> {
  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t r) const {
    if (b >= this->at.rows[s]) return;
    const int64_t i = (this->at.first[s] + b) * this->u.R + r;
    if (this->u.dh_rows[s]) this->u.dh_rows[s][i] = this->u.dh[(s * this->u.B + b) * this->u.R + r];
    S dh = this->total_dh(s, b, r);
    this->u.dh[(s * this->u.B + b) * this->u.R + r] = this->past(this->noise.h[s], b, r, dh);
    this->u.dy_rows[s][i] = narrow<T>(dh);
    if (this->u.before[s]) this->u.before[s][i] = narrow<T>(this->previous_operand(s, b, r));
  }
};

template <class Cell, class S, class T, bool kProjected>
struct BackwardStep : BackwardElement<S, T> {
  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t j) const {
    if (b >= this->at.rows[s]) return;
    const auto& u = this->u;
    const int64_t H = u.H, i = (s * u.B + b) * H + j, n = this->at.first[s] + b;
    const S* row = this->saved_row(s, b);
    auto parameters = UnitParameters<Cell, S>::of([&](int k) { return widen(u.w_unit[s][k * H + j]); });
    Values<S, Cell::kSaved> saved;
    for (int k = 0; k < Cell::kSaved; ++k) saved[k] = row[k * H + j];
    Values<S, Cell::kStates> previous, current, d;
    S direct_h = S(0), direct_c = S(0);
    if constexpr (kProjected) {
      previous[0] = current[0] = S(0);  // no cell that is projected reads them
      d[0] = u.through[i];
    } else {
      if (u.before[s]) u.before[s][n * H + j] = narrow<T>(this->previous_operand(s, b, j));
      previous[0] = Cell::kFirst > 0 ? widen(this->previous_h(s, b, j)) : this->previous_operand(s, b, j);
      current[0] = Cell::kSaved == 0 && this->noise.h[s] ? row[j] : widen(u.y[s][n * u.width + j]);
      if (u.dh_rows[s]) u.dh_rows[s][n * H + j] = u.dh[i];
      d[0] = this->total_dh(s, b, j);
      direct_h = this->past(this->noise.h[s], b, j, d[0]);
    }
    constexpr int kBeside = Cell::kStates - 1;
    S* const carried = u.dc + (s * u.B + b) * kBeside * H + j;
    if constexpr (kBeside > 0) {
      const StepView<T>& dc = this->dc[s];
      for (int k = 0; k < kBeside; ++k) {
        const int64_t before = (this->at.previous[s] + b) * u.saved_stride + (Cell::kSaved + k) * H + j;
        previous[k + 1] = b < this->at.carried[s] ? u.saved[s][before]
                          : u.c0[s]               ? widen(u.c0[s][(b * kBeside + k) * H + j])
                                                  : S(0);
        current[k + 1] = row[(Cell::kSaved + k) * H + j];
        d[k + 1] = carried[k * H];
        if (u.sent_dc[s]) u.sent_dc[s][(n * kBeside + k) * H + j] = d[k + 1];
        if (dc.data) d[k + 1] += widen(dc.data[b * dc.batch + k * H + j]);
      }
      if constexpr (kBeside == 1) {
        if (this->noise.c[s]) current[1] = Cell::candidate(saved, previous);
      }
      if (u.dc_rows[s]) {
        Values<S, Cell::kStates> all;
        for (int k = 1; k <= kBeside; ++k) all[k] = d[k];
        if (!this->noise.c[s]) parameters.dc_of(saved, current, d, all);
        for (int k = 0; k < kBeside; ++k) u.dc_rows[s][(n * kBeside + k) * H + j] = all[k + 1];
      }
      direct_c = this->past(this->noise.c[s], b, j, d[1]);  // none with more states than two
    }
    if constexpr (0 < Cell::kFirst && Cell::kFirst < Cell::kGates) {
      const Values<S, 1> operand = {this->previous_operand(s, b, j)};
      if (u.q[s]) u.q[s][n * H + j] = narrow<T>(Cell::recurrent_operand(saved, operand));
    }
    if constexpr (kProjected) {
      if (u.q[s]) u.q[s][n * H + j] = narrow<T>(Cell::output(saved, current));
    }
    Values<S, Cell::kGates> dx = {}, drec = {};
    parameters.backward(saved, previous, current, d, dx, drec);
    if constexpr (Cell::kFirst == 0) d[0] = this->with_mask(s, b, j, d[0]);
    constexpr int kFactors = Cell::kGates + Cell::kSplit;
    T* out = u.dg[s] + n * (kFactors + Cell::kParameters) * H + j;
    for (int g = 0; g < Cell::kGates; ++g) out[g * H] = narrow<T>(drec[g]);
    for (int g = Cell::kGates - Cell::kSplit; g < Cell::kGates; ++g) out[(g + Cell::kSplit) * H] = narrow<T>(dx[g]);
    for (int k = 0; k < Cell::kParameters; ++k) out[(kFactors + k) * H] = narrow<T>(parameters.gradient[k]);
    if constexpr (!kProjected) u.dh[i] = d[0] + direct_h;
    for (int k = 0; k < kBeside; ++k) carried[k * H] = k ? d[k + 1] : d[1] + direct_c;
  }
};

// The first gates of cells with two products a step, from dL/dq.
template <class Cell, class S, class T>
struct BackwardFirst : BackwardElement<S, T> {
  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t j) const {
    if (b >= this->at.rows[s]) return;
    const auto& u = this->u;
    const int64_t H = u.H, i = (s * u.B + b) * H + j;
    const S* row = this->saved_row(s, b);
    constexpr int kFactors = Cell::kGates + Cell::kSplit;
    T* out = u.dg[s] + (this->at.first[s] + b) * (kFactors + Cell::kParameters) * H + j;
    auto parameters = UnitParameters<Cell, S>::of([&](int k) { return widen(u.w_unit[s][k * H + j]); });
    for (int k = 0; k < Cell::kParameters; ++k) parameters.gradient[k] = widen(out[(kFactors + k) * H]);
    Values<S, Cell::kSaved> saved;
    for (int k = 0; k < Cell::kSaved; ++k) saved[k] = row[k * H + j];
    const Values<S, 1> previous = {this->previous_operand(s, b, j)};
    Values<S, 1> d = {S(0)};
    Values<S, Cell::kGates> dx = {}, drec = {};
    for (int g = 0; g < Cell::kFirst; ++g) dx[g] = drec[g] = widen(out[g * H]);
    parameters.backward_first(saved, previous, u.through[i], d, dx, drec);
    for (int g = 0; g < Cell::kFirst; ++g) out[g * H] = narrow<T>(drec[g]);
    for (int k = 0; k < Cell::kParameters; ++k) out[(kFactors + k) * H] = narrow<T>(parameters.gradient[k]);
    u.dh[i] += this->with_mask(s, b, j, d[0]);
  }
};

// What the products send back to a masked h, in addition to the direct path.
template <class S, class T>
struct AddMasked : BackwardElement<S, T> {
  const S* sent;  // [slots][B][R]

  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t r) const {
    if (b >= this->at.rows[s]) return;
    const int64_t i = (s * this->u.B + b) * this->u.R + r;
    this->u.dh[i] += this->with_mask(s, b, r, sent[i]);
  }
};

// ---- what a step sends back, limited; norms ----------------------------------------------------------------------

template <class S>
FUSEDRNN_INLINE S norm_of(const S* row, int64_t n) {
  return norm(sum_of_squares<S>(n, 1, [&](int64_t j) { return row[j]; }));
}

// Of each sample that sends: the factors that make its dL/dh and dL/dc no longer than `most`, a column for each of Z
// states.
template <class S>
struct Lengths {
  int64_t B, R, H, Z;
  StepRows at;
  S most;
  const S* dh;  // [slots][B][R]
  const S* dc;  // [slots][B][Z - 1][H], or null
  S* scale;     // [slots][B][Z]

  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t column) const {
    if (b >= at.rows[s]) return;
    const int64_t i = s * B + b;
    const S length = column ? norm_of(dc + (i * (Z - 1) + column - 1) * H, H) : norm_of(dh + i * R, R);
    scale[i * Z + column] = clip_factor(length, most);
  }
};

// What a step has left in dh and dc, as the step before may have it.
template <class S>
struct Limit {
  int64_t B, R, H, Z;
  StepRows at;
  PerSlot<bool> sever;  // samples that have a step before this one send nothing
  S most;               // of each element, or 0
  const S* scale;       // [slots][B][Z], or null
  S* dh;                // [slots][B][R]
  S* dc;                // [slots][B][Z - 1][H], or null

  FUSEDRNN_INLINE S limited(int s, int64_t b, int column, S v) const {
    if (sever[s] && b < at.carried[s]) return S(0);
    if (scale) return v * scale[(s * B + b) * Z + column];
    return most == S(0) ? v : clipped(v, most);
  }
  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t j) const {
    if (b >= at.rows[s]) return;
    if (S* v = dh + (s * B + b) * R + j; j < R) *v = limited(s, b, 0, *v);
    for (int column = 1; column < Z && j < H; ++column) {
      S* const v = dc + ((s * B + b) * (Z - 1) + column - 1) * H + j;
      *v = limited(s, b, column, *v);
    }
  }
};

// The norms of a row (NormColumns). dg as in BackwardBuffers.
template <class Cell, class S, class T>
struct RowNorms {
  int64_t N, B, R, H;
  RowView dy;
  PerSlot<const S*> dh;           // [N, R]
  PerSlot<const S*> sent_dc, dc;  // [N, (kStates - 1)*H]
  PerSlot<const T*> dg;           // [N, kColumns*H]
  S* to;                          // [slots][N][columns]

  static constexpr int G = Cell::kGates, kBeside = Cell::kStates - 1;

  FUSEDRNN_INLINE void operator()(int s, int64_t n, int64_t column) const {
    constexpr NormColumns at = norm_columns(Cell::kStates, G);
    S& result = to[(s * N + n) * at.count + column];
    if (column == at.sent || (column == at.total && !dy.data)) result = norm_of(dh[s] + n * R, R);
    else if (column < at.total) result = norm_of(sent_dc[s] + (n * kBeside + column - at.sent - 1) * H, H);
    else if (column == at.total) result = norm_with_dy(s, n);
    else if (column < at.gates) result = norm_of(dc[s] + (n * kBeside + column - at.total - 1) * H, H);
    else result = norm_of_gate(s, n, column - at.gates);
  }

  FUSEDRNN_INLINE S norm_with_dy(int s, int64_t n) const {
    const int64_t at = dy.time < 0 ? n * dy.batch : n / B * dy.time + n % B * dy.batch;
    const S* sent = dh[s] + n * R;
    const T* more = static_cast<const T*>(dy.data) + at + s * R;
    return norm(sum_of_squares<S>(R, 1, [&](int64_t j) { return sent[j] + widen(more[j]); }));
  }
  FUSEDRNN_INLINE S norm_of_gate(int s, int64_t n, int64_t g) const {
    const T* row = dg[s] + (n * NormsOf<Cell>::kColumns + NormsOf<Cell>::argument(static_cast<int>(g))) * H;
    return norm(sum_of_squares<S>(H, 1, [&](int64_t j) { return widen(row[j]); }));
  }
};

// Sums of the rows of dg in an order that depends on N alone: row p of `part` sums rows [p * step, (p + 1) * step).
template <class S, class T>
struct SumRows {
  int64_t N, columns, step;
  PerSlot<const T*> dg;  // [N, columns]
  PerSlot<S*> part;      // [parts, columns]

  FUSEDRNN_INLINE void operator()(int s, int64_t p, int64_t j) const {
    const int64_t end = (p + 1) * step < N ? (p + 1) * step : N;
    S sum = S(0);
    for (int64_t n = p * step; n < end; ++n) sum += widen(dg[s][n * columns + j]);
    part[s][p * columns + j] = sum;
  }
};

// The gradients of the biases, which may be null, and of the units' parameters: column j of a row of dg is a gate's
// gradient of x, of rec, or of both, or that of a unit's parameter.
template <class Cell, class S, class T>
struct SumsOfGates {
  int64_t H, parts;
  PerSlot<const S*> part;  // [parts, kColumns*H]
  PerSlot<T*> db_ih;       // [G*H]
  PerSlot<T*> db_hh;       // [G*H]
  PerSlot<T*> dw_unit;     // [U*H]

  using Norms = NormsOf<Cell>;
  static constexpr int G = Cell::kGates, kSplit = Norms::kGateSplit, kFactors = Norms::kFactors;

  FUSEDRNN_INLINE void operator()(int s, int64_t, int64_t column) const {
    S sum = S(0);
    for (int64_t p = 0; p < parts; ++p) sum += part[s][p * Norms::kColumns * H + column];
    const T value = narrow<T>(sum);
    const int64_t u = column - kFactors * H, j = column - Norms::kFirstArgument * H;
    if (u >= 0 && u < Cell::kParameters * H) dw_unit[s][u] = value;
    if (!db_ih[s] || j < 0) return;
    if (j < G * H) db_hh[s][j] = value;
    if (j < (G - kSplit) * H) db_ih[s][j] = value;
    if (G * H <= j && j < (G + kSplit) * H) db_ih[s][j - kSplit * H] = value;
  }
};

}  // namespace fusedrnn
