// The element-wise kernels of the stepwise road, as bodies: body(s, row, column) does one element of slot s (a
// direction of the layer), or nothing where the slot has no such row. A device runs a body over all elements, in any
// order: on the GPU one thread each (device.cu), in the tests a loop on the CPU (host.cpp). The equations are the
// cells'.
//
// T is the type of x, weights and results, S the one they are computed in (element.h). Buffers of the driver
// (stepwise.h) have a slot's rows together: h [slots][B][R].
#pragma once

#include "element.h"
#include "slots.h"

namespace fusedrnn {

template <class T>
using PerSlot = T[kMaxSlots];

// Rows of [T, B, *] or [N, *] as in problem.h: sample b of step t at data[t * time + b * batch].
template <class T>
struct StepView {
  const T* data;  // of this step and slot, or null
  int64_t batch;
};

// What a step keeps of a state before it (problem.h). Columns from the direction's first on.
template <class T>
struct Keeps {
  PerSlot<StepView<T>> h, c;  // [rows, R], [rows, H]

  template <class S>
  FUSEDRNN_INLINE static S of(const StepView<T>& keep, int64_t b, int64_t j) {
    return widen(keep.data[b * keep.batch + j]);
  }
};

// One matrix of each slot, [rows][columns], side by side.
template <class T>
struct Beside {
  int64_t rows, columns;
  PerSlot<const T*> from;
  T* to;  // [slots][rows][columns]

  FUSEDRNN_INLINE void operator()(int s, int64_t row, int64_t j) const {
    to[(s * rows + row) * columns + j] = from[s][row * columns + j];
  }
};

// The matrices of all slots in the wide type, the first `shift` columns after the others.
template <class S, class T>
struct Rotated {
  int64_t rows, columns, shift;
  const T* from;  // [slots][rows][columns]
  S* to;          // [slots][rows][columns]

  FUSEDRNN_INLINE void operator()(int s, int64_t row, int64_t j) const {
    const int64_t last = columns - shift;
    to[(s * rows + row) * columns + j] = widen(from[(s * rows + row) * columns + (j < last ? j + shift : j - last)]);
  }
};

// ---- states, or their gradients ---------------------------------------------------------------------------------

// From the tensors of a call into the driver's buffers; zeros where there are none.
template <class S, class T>
struct LoadStates {
  int64_t B, R, H;
  T* operand;                 // [slots][B][R]: h as a product reads it, or null
  S* h;                       // [slots][B][R], or null
  S* c;                       // [slots][B][H], or null
  PerSlot<const T*> from_h;   // [B, R] or null
  PerSlot<const T*> from_c;   // [B, H] or null
  PerSlot<const T*> mask;     // [B, R] or null: of the operand

  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t j) const {
    if (j < R) {
      const T value = from_h[s] ? from_h[s][b * R + j] : narrow<T>(0);
      if (operand) {
        operand[(s * B + b) * R + j] = mask[s] ? narrow<T>(widen(value) * widen(mask[s][b * R + j])) : value;
      }
      if (h) h[(s * B + b) * R + j] = widen(value);
    }
    if (c && j < H) c[(s * B + b) * H + j] = from_c[s] ? widen(from_c[s][b * H + j]) : S(0);
  }
};

// And back. E: the type of h, T or S.
template <class E, class S, class T>
struct StoreStates {
  int64_t B, R, H;
  const E* h;         // [slots][B][R]
  const S* c;         // [slots][B][H], or null
  PerSlot<T*> to_h;   // [B, R]
  PerSlot<T*> to_c;   // [B, H]

  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t j) const {
    if (j < R) {
      const E value = h[(s * B + b) * R + j];
      if constexpr (std::is_same_v<E, T>) to_h[s][b * R + j] = value;
      else to_h[s][b * R + j] = narrow<T>(value);
    }
    if (c && j < H) to_c[s][b * H + j] = narrow<T>(c[(s * B + b) * H + j]);
  }
};

// ---- forward ----------------------------------------------------------------------------------------------------

// What the steps of a forward pass share.
template <class S, class T>
struct ForwardBuffers {
  int64_t B, H, R, width;     // width: of a row of y, D * R
  PerSlot<const T*> b_ih;     // [G*H] or null
  PerSlot<const T*> b_hh;     // [G*H] or null
  PerSlot<T*> y;              // [N, width], from the direction's first column on
  PerSlot<S*> saved;          // [N, saved_stride] or null
  int64_t saved_stride;
  S* kept;                    // [slots][B][kSaved*H]: the saved values of this step alone, if `saved` is null
  const S* rec;               // [slots][B][G*H]: W_hh h_{t-1}
  PerSlot<const T*> mask;     // [B, R] or null: of the operand
  T* operand;                 // [slots][B][R]: h as the next product reads it
  S* h;                       // [slots][B][R], or null: operand is it
  S* c;                       // [slots][B][H]
  T* q;                       // [slots][B][H]: the operand of the second product, or the output before its projection
};

template <class Cell, class S, class T>
struct ForwardElement {
  ForwardBuffers<S, T> u;
  StepRows at;
  Keeps<T> keep;
  PerSlot<const S*> x;  // [rows, G*H]: W_ih x_t

  static constexpr int G = Cell::kGates;

  FUSEDRNN_INLINE S* saved_row(int s, int64_t b) const {
    return u.saved[s] ? u.saved[s] + (at.first[s] + b) * u.saved_stride
                      : u.kept ? u.kept + (s * u.B + b) * Cell::kSaved * u.H : nullptr;
  }
  FUSEDRNN_INLINE S x_gate(int s, int64_t b, int64_t j, int g) const {
    const S product = x[s][(b * G + g) * u.H + j];
    return u.b_ih[s] ? product + widen(u.b_ih[s][g * u.H + j]) : product;
  }
  FUSEDRNN_INLINE S rec_gate(int s, int64_t b, int64_t j, int g) const {
    const S product = u.rec[((s * u.B + b) * G + g) * u.H + j];
    return u.b_hh[s] ? product + widen(u.b_hh[s][g * u.H + j]) : product;
  }
  FUSEDRNN_INLINE S previous_h(int64_t i) const { return u.h ? u.h[i] : widen(u.operand[i]); }
};

// Between what a cell gives and the state before it, where zoneout says.
template <class S>
FUSEDRNN_INLINE S between(S keep, S before, S next) {
  return keep * before + (S(1) - keep) * next;  // (Z2)
}

// h of a sample's unit j, element i of the driver's buffers, as what comes after finds it: h_{t-1} is there still.
template <class S, class T>
FUSEDRNN_INLINE void publish(const ForwardBuffers<S, T>& u, const StepRows& at, const Keeps<T>& keep, int s, int64_t b,
                             int64_t j, S h) {
  const int64_t i = (s * u.B + b) * u.R + j;
  if (keep.h[s].data) h = between(Keeps<T>::template of<S>(keep.h[s], b, j), u.h[i], h);
  const T rounded = narrow<T>(h);
  u.operand[i] = u.mask[s] ? narrow<T>(h * widen(u.mask[s][b * u.R + j])) : rounded;
  if (u.h) u.h[i] = h;
  u.y[s][(at.first[s] + b) * u.width + j] = rounded;
}

// The first gates and q, of cells with two products a step.
template <class Cell, class S, class T>
struct ForwardFirst : ForwardElement<Cell, S, T> {
  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t j) const {
    if (b >= this->at.rows[s]) return;
    const int64_t H = this->u.H, i = (s * this->u.B + b) * H + j;
    Values<S, Cell::kGates> x, rec;
    for (int g = 0; g < Cell::kFirst; ++g) x[g] = this->x_gate(s, b, j, g), rec[g] = this->rec_gate(s, b, j, g);
    Values<S, 1> previous = {this->u.mask[s] ? widen(this->u.operand[i]) : this->previous_h(i)};
    Values<S, Cell::kSaved> saved;
    S q;
    Cell::forward_first(x, rec, previous, saved, q);
    S* row = this->saved_row(s, b);
    for (int k = 0; k < Cell::kFirst; ++k) row[k * H + j] = saved[k];
    this->u.q[i] = narrow<T>(q);
  }
};

template <class Cell, class S, class T, bool kProjected>
struct ForwardStep : ForwardElement<Cell, S, T> {
  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t j) const {
    if (b >= this->at.rows[s]) return;
    const auto& u = this->u;
    const int64_t H = u.H, i = (s * u.B + b) * H + j;
    S* row = this->saved_row(s, b);
    Values<S, Cell::kGates> x, rec;
    Values<S, Cell::kSaved> saved;
    if constexpr (Cell::kFirst < Cell::kGates) {
      for (int k = 0; k < Cell::kFirst; ++k) saved[k] = row[k * H + j];
      for (int g = 0; g < Cell::kFirst; ++g) x[g] = rec[g] = S(0);  // not read again
    }
    for (int g = Cell::kFirst < Cell::kGates ? Cell::kFirst : 0; g < Cell::kGates; ++g) {
      x[g] = this->x_gate(s, b, j, g);
      rec[g] = this->rec_gate(s, b, j, g);
    }
    Values<S, Cell::kStates> state;
    state[0] = kProjected ? S(0) : this->previous_h(i);  // no cell that is projected reads it
    if constexpr (Cell::kStates == 2) state[1] = u.c[i];
    if constexpr (Cell::kLate > 0) {
      Values<S, Cell::kLate> late;
      Cell::forward(x, rec, state, saved, late);
      Cell::finish(late, state, saved);
    } else {
      Cell::forward(x, rec, state, saved);
    }
    if constexpr (Cell::kStates == 2) {
      const StepView<T>& keep = this->keep.c[s];
      if (keep.data) state[1] = between(Keeps<T>::template of<S>(keep, b, j), u.c[i], state[1]);
      u.c[i] = state[1];
    }
    if (u.saved[s]) {
      for (int k = 0; k < Cell::kSaved; ++k) row[k * H + j] = saved[k];
      if constexpr (Cell::kStates == 2) row[Cell::kSaved * H + j] = state[1];
      if (Cell::kSaved == 0 && this->keep.h[s].data) row[j] = state[0];
    }
    if constexpr (kProjected) u.q[i] = narrow<T>(state[0]);
    else publish(u, this->at, this->keep, s, b, j, state[0]);
  }
};

// h and y of a projected layer, from the product that is in the place of what the next step reads.
template <class S, class T>
struct PublishProjected {
  ForwardBuffers<S, T> u;
  StepRows at;
  Keeps<T> keep;

  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t r) const {
    if (b >= at.rows[s]) return;
    publish(u, at, keep, s, b, r, widen(u.operand[(s * u.B + b) * u.R + r]));
  }
};

// ---- backward ---------------------------------------------------------------------------------------------------

// What the steps of a backward pass share. A row of dg holds first the gradients of x for the last kSplit gates, then
// those of rec for all gates, kSplit + kGates blocks of H.
template <class S, class T>
struct BackwardBuffers {
  int64_t B, H, R, width;
  PerSlot<const T*> h0;        // [B, R] or null
  PerSlot<const T*> c0;        // [B, H] or null
  PerSlot<const T*> y;         // [N, width], from the direction's first column on
  PerSlot<const S*> saved;     // [N, saved_stride]
  int64_t saved_stride;
  PerSlot<T*> dg;              // [N, (kSplit + G)*H]
  PerSlot<const T*> mask;      // [B, R] or null
  PerSlot<T*> before;          // [N, R]: mask * h_{t-1} of each row, or null
  PerSlot<T*> q;               // [N, H]: operand of the second product or output before its projection; or null
  PerSlot<T*> dy_rows;         // [N, R]: dL/d(W_hr (o * tanh(c))) of a projected layer
  PerSlot<S*> dh_rows;         // [N, R]: dL/dh_t by all ways, or null
  PerSlot<S*> dc_rows;         // [N, H]: dL/dc_t likewise, or null
  S* dh;                       // [slots][B][R]: dL/dh of this step but for dy
  S* dc;                       // [slots][B][H]
  S* through;                  // [slots][B][H]: dL/dq, or the gradient through the projection
};

template <class S, class T>
struct BackwardElement {
  BackwardBuffers<S, T> u;
  StepRows at;
  PerSlot<StepView<T>> dy;
  PerSlot<StepView<T>> dc;
  Keeps<T> keep;

  FUSEDRNN_INLINE S masked(int s, int64_t b, int64_t r, S v) const {
    return u.mask[s] ? v * widen(u.mask[s][b * u.R + r]) : v;
  }
  // As the products read it.
  FUSEDRNN_INLINE S previous_operand(int s, int64_t b, int64_t r) const {
    return masked(s, b, r, widen(previous_h(s, b, r)));
  }
  // Of a gradient what goes past the cell to the state before.
  FUSEDRNN_INLINE static S direct(const StepView<T>& keep, int64_t b, int64_t j, S d) {
    return keep.data ? d * Keeps<T>::template of<S>(keep, b, j) : S(0);  // (Z3)
  }
  FUSEDRNN_INLINE T previous_h(int s, int64_t b, int64_t r) const {
    return b < at.carried[s] ? u.y[s][(at.previous[s] + b) * u.width + r]
                             : u.h0[s] ? u.h0[s][b * u.R + r] : narrow<T>(0);
  }
  FUSEDRNN_INLINE S total_dh(int s, int64_t b, int64_t r) const {
    const S dh = u.dh[(s * u.B + b) * u.R + r];
    return dy[s].data ? dh + widen(dy[s].data[b * dy[s].batch + r]) : dh;
  }
  FUSEDRNN_INLINE const S* saved_row(int s, int64_t b) const { return u.saved[s] + (at.first[s] + b) * u.saved_stride; }
};

// dL/dy of a projected layer, as its product reads it, and h_{t-1}.
template <class S, class T>
struct BackwardProjected : BackwardElement<S, T> {
  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t r) const {
    if (b >= this->at.rows[s]) return;
    const int64_t i = (this->at.first[s] + b) * this->u.R + r;
    const S dh = this->total_dh(s, b, r), direct = this->direct(this->keep.h[s], b, r, dh);
    this->u.dy_rows[s][i] = narrow<T>(dh - direct);
    this->u.dh[(s * this->u.B + b) * this->u.R + r] = direct;
    if (this->u.dh_rows[s]) this->u.dh_rows[s][i] = dh;
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
    Values<S, Cell::kSaved> saved;
    for (int k = 0; k < Cell::kSaved; ++k) saved[k] = row[k * H + j];
    Values<S, Cell::kStates> previous, current, d;
    S direct_h = S(0), direct_c = S(0);
    if constexpr (kProjected) {
      previous[0] = current[0] = S(0);  // no cell that is projected reads them
      d[0] = u.through[i];
    } else {
      const StepView<T>& keep = this->keep.h[s];
      if (u.before[s]) u.before[s][n * H + j] = narrow<T>(this->previous_operand(s, b, j));
      previous[0] = widen(this->previous_h(s, b, j));
      current[0] = Cell::kSaved == 0 && keep.data ? row[j] : widen(u.y[s][n * u.width + j]);
      d[0] = this->total_dh(s, b, j);
      if (u.dh_rows[s]) u.dh_rows[s][n * H + j] = d[0];
      direct_h = this->direct(keep, b, j, d[0]);
      d[0] -= direct_h;
    }
    if constexpr (Cell::kStates == 2) {
      const int64_t before = (this->at.previous[s] + b) * u.saved_stride + Cell::kSaved * H + j;
      previous[1] = b < this->at.carried[s] ? u.saved[s][before] : u.c0[s] ? widen(u.c0[s][b * H + j]) : S(0);
      const StepView<T>& keep = this->keep.c[s];
      current[1] = keep.data ? Cell::candidate(saved, previous) : row[Cell::kSaved * H + j];
      d[1] = u.dc[i];
      const StepView<T>& dc = this->dc[s];
      if (dc.data) d[1] += widen(dc.data[b * dc.batch + j]);
      if (u.dc_rows[s]) u.dc_rows[s][n * H + j] = keep.data ? d[1] : Cell::dc_of(saved, current, d);
      direct_c = this->direct(keep, b, j, d[1]);
      d[1] -= direct_c;
    }
    if constexpr (Cell::kFirst < Cell::kGates) {
      const Values<S, 1> operand = {this->previous_operand(s, b, j)};
      if (u.q[s]) u.q[s][n * H + j] = narrow<T>(Cell::recurrent_operand(saved, operand));
    }
    if constexpr (kProjected) {
      if (u.q[s]) u.q[s][n * H + j] = narrow<T>(Cell::output(saved, current));
    }
    Values<S, Cell::kGates> dx = {}, drec = {};
    Cell::backward(saved, previous, current, d, dx, drec);
    T* out = u.dg[s] + n * (Cell::kSplit + Cell::kGates) * H + j;
    for (int k = 0; k < Cell::kSplit; ++k) out[k * H] = narrow<T>(dx[Cell::kGates - Cell::kSplit + k]);
    for (int g = 0; g < Cell::kGates; ++g) out[(Cell::kSplit + g) * H] = narrow<T>(drec[g]);
    if constexpr (!kProjected) u.dh[i] = d[0] + direct_h;
    if constexpr (Cell::kStates == 2) u.dc[i] = d[1] + direct_c;
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
    T* out = u.dg[s] + (this->at.first[s] + b) * (Cell::kSplit + Cell::kGates) * H + Cell::kSplit * H + j;
    Values<S, Cell::kSaved> saved;
    for (int k = 0; k < Cell::kSaved; ++k) saved[k] = row[k * H + j];
    const Values<S, 1> previous = {this->previous_operand(s, b, j)};
    Values<S, 1> d = {S(0)};
    Values<S, Cell::kGates> dx = {}, drec = {};
    for (int g = 0; g < Cell::kFirst; ++g) dx[g] = drec[g] = widen(out[g * H]);
    Cell::backward_first(saved, previous, u.through[i], d, dx, drec);
    for (int g = 0; g < Cell::kFirst; ++g) out[g * H] = narrow<T>(drec[g]);
    u.dh[i] += this->masked(s, b, j, d[0]);
  }
};

// What the products send back to a masked h, beside the direct path.
template <class S, class T>
struct AddMasked : BackwardElement<S, T> {
  const S* sent;  // [slots][B][R]

  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t r) const {
    if (b >= this->at.rows[s]) return;
    const int64_t i = (s * this->u.B + b) * this->u.R + r;
    this->u.dh[i] += this->masked(s, b, r, sent[i]);
  }
};

// ---- after the steps --------------------------------------------------------------------------------------------

// ---- what a step sends back, limited; norms ----------------------------------------------------------------------

template <class S>
FUSEDRNN_INLINE S norm_of(const S* row, int64_t n) {
  S sum = S(0);
  for (int64_t j = 0; j < n; ++j) sum += row[j] * row[j];
  return std::sqrt(sum);
}

// Of each sample that sends: the factors that make its dL/dh and dL/dc no longer than `most`. Column 0 or 1.
template <class S>
struct Lengths {
  int64_t B, R, H;
  StepRows at;
  S most;
  const S* dh;  // [slots][B][R]
  const S* dc;  // [slots][B][H], or null
  S* scale;     // [slots][B][2]

  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t column) const {
    if (b >= at.rows[s] || (column && !dc)) return;
    const int64_t i = s * B + b;
    const S length = column ? norm_of(dc + i * H, H) : norm_of(dh + i * R, R);
    scale[i * 2 + column] = length > most ? most / length : S(1);
  }
};

// What a step has left in dh and dc, as the step before may have it.
template <class S>
struct Limit {
  int64_t B, R, H;
  StepRows at;
  PerSlot<bool> sever;  // samples that have a step before this one send nothing
  S most;               // of each element, or 0
  const S* scale;       // [slots][B][2], or null
  S* dh;                // [slots][B][R]
  S* dc;                // [slots][B][H], or null

  FUSEDRNN_INLINE S limited(int s, int64_t b, int column, S v) const {
    if (sever[s] && b < at.carried[s]) return S(0);
    if (scale) return v * scale[(s * B + b) * 2 + column];
    if (most == S(0)) return v;
    return v > most ? most : v < -most ? -most : v;
  }
  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t j) const {
    if (b >= at.rows[s]) return;
    if (S* v = dh + (s * B + b) * R + j; j < R) *v = limited(s, b, 0, *v);
    if (S* v = dc + (s * B + b) * H + j; dc && j < H) *v = limited(s, b, 1, *v);
  }
};

// The norms of a row: of dL/dh_t, dL/dc_t and each gate's gradient. dg as in BackwardBuffers.
template <class S, class T, int kStates, int kGates, int kSplit>
struct RowNorms {
  int64_t N, R, H;
  PerSlot<const S*> dh;  // [N, R]
  PerSlot<const S*> dc;  // [N, H]
  PerSlot<const T*> dg;  // [N, (kSplit + kGates)*H]
  S* to;                 // [slots][N][kStates + kGates]

  FUSEDRNN_INLINE void operator()(int s, int64_t n, int64_t column) const {
    S& result = to[(s * N + n) * (kStates + kGates) + column];
    if (column == 0) result = norm_of(dh[s] + n * R, R);
    else if (column < kStates) result = norm_of(dc[s] + n * H, H);
    else {
      const int64_t g = column - kStates;
      const T* row = dg[s] + (n * (kSplit + kGates) + (g < kGates - kSplit ? g + kSplit : g - (kGates - kSplit))) * H;
      S sum = S(0);
      for (int64_t j = 0; j < H; ++j) sum += widen(row[j]) * widen(row[j]);
      result = std::sqrt(sum);
    }
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

// The bias gradients: column j of a row of dg is a gate's gradient of x, of rec, or of both.
template <class S, class T, int kGates, int kSplit>
struct BiasGradients {
  int64_t H, parts;
  PerSlot<const S*> part;  // [parts, (kSplit + kGates)*H]
  PerSlot<T*> db_ih;       // [G*H]
  PerSlot<T*> db_hh;       // [G*H]

  FUSEDRNN_INLINE void operator()(int s, int64_t, int64_t j) const {
    constexpr int kBlocks = kSplit + kGates;
    S sum = S(0);
    for (int64_t p = 0; p < parts; ++p) sum += part[s][p * kBlocks * H + j];
    const T value = narrow<T>(sum);
    if (j < kSplit * H) {
      db_ih[s][(kGates - kSplit) * H + j] = value;
    } else {
      const int64_t gate = j - kSplit * H;
      db_hh[s][gate] = value;
      if (gate < (kGates - kSplit) * H) db_ih[s][gate] = value;
    }
  }
};

template <class S, class T>
struct Round {
  int64_t columns;
  const S* from;
  T* to;
  FUSEDRNN_INLINE void operator()(int, int64_t row, int64_t j) const {
    to[row * columns + j] = narrow<T>(from[row * columns + j]);
  }
};

}  // namespace fusedrnn
