// LSTM whose gates see the cell, gates i, f, g, o, peepholes of i, f, o. docs/derivations.md, section Q.
#pragma once

#include "cell.h"

namespace fusedrnn {

struct PeepholeLstm {
  static constexpr const char* kName = "peephole_lstm";
  static constexpr int kGates = 4, kStates = 2, kSaved = 4, kFirst = 4, kSplit = 0, kParameters = 3;
  static constexpr int kLate = 2, kSavedLate = 1;
  static constexpr Bound kBound = Bound::kOne;  // as the LSTM's
  static constexpr bool kProjectable = false;

  template <class V>
  FUSEDRNN_INLINE static void forward(const Values<V, 4>& x, const Values<V, 4>& rec, Values<V, 2>& state,
                                      Values<V, 4>& saved, Values<V, 2>& late, const Values<V, 3>& unit) {
    const V i = sigmoid(x[0] + rec[0] + unit[0] * state[1]);  // (Q1)
    const V f = sigmoid(x[1] + rec[1] + unit[1] * state[1]);  // (Q2)
    const V g = tanh(x[2] + rec[2]);                          // (Q3)
    state[1] = f * state[1] + i * g;                          // (Q4)
    late[0] = x[3] + rec[3] + unit[2] * state[1];             // (Q5)
    late[1] = state[1];
    saved[0] = i, saved[1] = f, saved[2] = g;
  }

  template <class V>
  FUSEDRNN_INLINE static void finish(const Values<V, 2>& late, Values<V, 2>& state, Values<V, 4>& saved) {
    saved[3] = sigmoid(late[0]);          // (Q5)
    state[0] = saved[3] * tanh(late[1]);  // (Q6)
  }

  template <class V>
  FUSEDRNN_INLINE static V dc_of(const Values<V, 4>& saved, const Values<V, 2>& cur, const Values<V, 2>& d,
                                 const Values<V, 3>& unit) {
    const V o = saved[3], tanh_c = tanh(cur[1]);                         // (Q6)
    const V da_o = d[0] * tanh_c * o * (V(1) - o);                       // (Q7)
    return d[1] + d[0] * o * (V(1) - tanh_c * tanh_c) + unit[2] * da_o;  // (Q8)
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const Values<V, 4>& saved, const Values<V, 2>& prev, const Values<V, 2>& cur,
                                       Values<V, 2>& d, Values<V, 4>& dx, Values<V, 4>& drec, const Values<V, 3>& unit,
                                       Values<V, 3>& dunit) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V one = V(1), tanh_c = tanh(cur[1]);          // (Q6)
    const V dc = dc_of(saved, cur, d, unit);            // (Q8)
    dx[0] = drec[0] = dc * g * i * (one - i);           // (Q9)
    dx[1] = drec[1] = dc * prev[1] * f * (one - f);     // (Q10)
    dx[2] = drec[2] = dc * i * (one - g * g);           // (Q11)
    dx[3] = drec[3] = d[0] * tanh_c * o * (one - o);    // (Q7)
    dunit[0] = dx[0] * prev[1];                         // (Q13)
    dunit[1] = dx[1] * prev[1];                         // (Q13)
    dunit[2] = dx[3] * cur[1];                          // (Q13)
    d[1] = dc * f + unit[0] * dx[0] + unit[1] * dx[1];  // (Q12)
    d[0] = V(0);                                        // (Q14): h_{t-1} only through W_hh
  }

  template <class V>
  FUSEDRNN_INLINE static V candidate(const Values<V, 4>& saved, const Values<V, 2>& prev) {
    return saved[1] * prev[1] + saved[0] * saved[2];  // (Q4)
  }
};

}  // namespace fusedrnn
