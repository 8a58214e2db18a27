// The bodies (step.h) of the forward pass.
#pragma once

#include "step.h"

namespace fusedrnn {

// What the steps of a forward pass share.
template <class S, class T>
struct ForwardBuffers {
  int64_t B, H, R, width;    // width: of a row of y, D * R
  PerSlot<const T*> b_ih;    // [G*H] or null
  PerSlot<const T*> b_hh;    // [G*H] or null
  PerSlot<const T*> w_unit;  // [U*H] or null
  PerSlot<T*> y;             // [N, width], from the direction's first column on
  PerSlot<S*> saved;         // [N, saved_stride] or null
  int64_t saved_stride;
  S* kept;                 // [slots][B][kSaved*H]: the saved values of this step alone, if `saved` is null
  const S* rec;            // [slots][B][G*H]: W_hh h_{t-1}
  PerSlot<const T*> mask;  // [B, R] or null: of the operand
  T* operand;              // [slots][B][R]: h as the next product reads it
  S* h;                    // [slots][B][R], or null: operand is it
  S* c;                    // [slots][B][kStates - 1][H]
  T* q;                    // [slots][B][H]: the operand of the second product, or the output before its projection
};

template <class Cell, class S, class T>
struct ForwardElement {
  ForwardBuffers<S, T> u;
  StepRows at;
  StepNoise<S, T> noise;
  PerSlot<const S*> x;  // [rows, G*H]: W_ih x_t

  static constexpr int G = Cell::kGates;

  FUSEDRNN_INLINE S* saved_row(int s, int64_t b) const {
    return u.saved[s] ? u.saved[s] + (at.first[s] + b) * u.saved_stride
           : u.kept   ? u.kept + (s * u.B + b) * Cell::kSaved * u.H
                      : nullptr;
  }
  FUSEDRNN_INLINE S x_gate(int s, int64_t b, int64_t j, int g) const {
    const S product = x[s][(b * G + g) * u.H + j];
    return u.b_ih[s] ? product + widen(u.b_ih[s][g * u.H + j]) : product;
  }
  FUSEDRNN_INLINE S rec_gate(int s, int64_t b, int64_t j, int g) const {
    const S product = Cell::kFirst > 0 ? u.rec[((s * u.B + b) * G + g) * u.H + j] : S(0);
    return u.b_hh[s] ? product + widen(u.b_hh[s][g * u.H + j]) : product;
  }
  FUSEDRNN_INLINE S previous_h(int64_t i) const { return u.h ? u.h[i] : widen(u.operand[i]); }
  // As a product reads it.
  FUSEDRNN_INLINE S masked_h(int s, int64_t i) const { return u.mask[s] ? widen(u.operand[i]) : previous_h(i); }
  FUSEDRNN_INLINE UnitParameters<Cell, S> parameters(int s, int64_t j) const {
    return UnitParameters<Cell, S>::of([&](int k) { return widen(u.w_unit[s][k * u.H + j]); });
  }
};

// h of a sample's unit j, element i of the driver's buffers, as what comes after finds it: h_{t-1} is there still.
template <class S, class T>
FUSEDRNN_INLINE void publish(const ForwardBuffers<S, T>& u, const StepRows& at, const StepNoise<S, T>& noise, int s,
                             int64_t b, int64_t j, S h) {
  const int64_t i = (s * u.B + b) * u.R + j;
  if (noise.h[s]) h = zoneout(noise.h[s](b, j), u.h[i], h);  // without noise there may be no u.h
  const T rounded = narrow<T>(h);
  u.operand[i] = u.mask[s] ? narrow<T>(masked(h, widen(u.mask[s][b * u.R + j]))) : rounded;
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
    Values<S, 1> previous = {this->masked_h(s, i)};
    Values<S, Cell::kSaved> saved;
    S q;
    this->parameters(s, j).forward_first(x, rec, previous, saved, q);
    S* row = this->saved_row(s, b);
    for (int k = 0; k < Cell::kFirst; ++k) row[k * H + j] = saved[k];
    this->u.q[i] = narrow<T>(q);
  }
};

// A cell's step, both halves of it.
template <class Cell, class V>
FUSEDRNN_INLINE void forward_step(const Values<V, Cell::kGates>& x, const Values<V, Cell::kGates>& rec,
                                  const UnitParameters<Cell, V>& parameters, Values<V, Cell::kStates>& state,
                                  Values<V, Cell::kSaved>& saved) {
  if constexpr (Cell::kLate > 0) {
    Values<V, Cell::kLate> late;
    parameters.forward(x, rec, state, saved, late);
    Cell::finish(late, state, saved);
  } else {
    parameters.forward(x, rec, state, saved);
  }
}

template <class Cell, class S, class T, bool kProjected>
struct ForwardStep : ForwardElement<Cell, S, T> {
  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t j) const {
    if (b >= this->at.rows[s]) return;
    const auto& u = this->u;
    const int64_t H = u.H, i = (s * u.B + b) * H + j;
    S* row = this->saved_row(s, b);
    Values<S, Cell::kGates> x, rec;
    Values<S, Cell::kSaved> saved;
    if constexpr (0 < Cell::kFirst && Cell::kFirst < Cell::kGates) {
      for (int k = 0; k < Cell::kFirst; ++k) saved[k] = row[k * H + j];
      for (int g = 0; g < Cell::kFirst; ++g) x[g] = rec[g] = S(0);  // not read again
    }
    for (int g = Cell::kFirst < Cell::kGates ? Cell::kFirst : 0; g < Cell::kGates; ++g) {
      x[g] = this->x_gate(s, b, j, g);
      rec[g] = this->rec_gate(s, b, j, g);
    }
    Values<S, Cell::kStates> state;
    // No cell that is projected reads it.
    state[0] = kProjected ? S(0) : Cell::kFirst > 0 ? this->previous_h(i) : this->masked_h(s, i);
    constexpr int kBeside = Cell::kStates - 1;
    S* const c = u.c + (s * u.B + b) * kBeside * H + j;
    for (int k = 0; k < kBeside; ++k) state[k + 1] = c[k * H];
    forward_step<Cell>(x, rec, this->parameters(s, j), state, saved);
    if constexpr (kBeside == 1) {
      if (this->noise.c[s]) state[1] = zoneout(this->noise.c[s](b, j), *c, state[1]);
    }
    for (int k = 0; k < kBeside; ++k) c[k * H] = state[k + 1];
    if (u.saved[s]) {
      for (int k = 0; k < Cell::kSaved; ++k) row[k * H + j] = saved[k];
      for (int k = 0; k < kBeside; ++k) row[(Cell::kSaved + k) * H + j] = state[k + 1];
      if (Cell::kSaved == 0 && this->noise.h[s]) row[j] = state[0];
    }
    if constexpr (kProjected) u.q[i] = narrow<T>(state[0]);
    else publish(u, this->at, this->noise, s, b, j, state[0]);
  }
};

// h and y of a projected layer, from the product that is in the place of what the next step reads.
template <class S, class T>
struct PublishProjected {
  ForwardBuffers<S, T> u;
  StepRows at;
  StepNoise<S, T> noise;

  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t r) const {
    if (b >= at.rows[s]) return;
    publish(u, at, noise, s, b, r, widen(u.operand[(s * u.B + b) * u.R + r]));
  }
};

}  // namespace fusedrnn
