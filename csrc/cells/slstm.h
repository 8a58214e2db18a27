// LSTM with exponential gates (Beck et al. 2024), gates i, f, z, o, states h, c, n, m. docs/derivations.md, section X.
#pragma once

#include "cell.h"
#include "functions.h"

namespace fusedrnn {

struct Slstm {
  static constexpr const char* kName = "slstm";
  static constexpr int kGates = 4, kStates = 4, kSaved = 5, kFirst = 4, kSplit = 0, kParameters = 0;
  static constexpr int kLate = 0;
  static constexpr Bound kBound = Bound::kNone;  // a given c may be larger than its n
  static constexpr bool kProjectable = false;

  template <class V>
  FUSEDRNN_INLINE static void forward(const Values<V, 4>& x, const Values<V, 4>& rec, Values<V, 4>& state,
                                      Values<V, 5>& saved) {
    const V zero(0), a_i = x[0] + rec[0], minus_a_f = zero - (x[1] + rec[1]);  // arguments of (X3), (X1)
    const auto none = state[2] <= zero;                                        // (X2): there is no state before
    const V carried = state[3] - softplus(minus_a_f);                          // (X1)
    const V m = where(none, a_i, maximum(carried, a_i));                       // (X2)
    const V i = exp(a_i - m);                                                  // (X3)
    const V f = where(none, zero, exp(carried - m));                           // (X4)
    const V z = tanh(x[2] + rec[2]);                                           // (X5)
    const V o = sigmoid(x[3] + rec[3]);                                        // (X6)
    state[1] = f * state[1] + i * z;                                           // (X7)
    state[2] = f * state[2] + i;                                               // (X8)
    state[3] = m;                                                              // (X2)
    state[0] = o * (state[1] / state[2]);                                      // (X9)
    saved[0] = i, saved[1] = f, saved[2] = z, saved[3] = o, saved[4] = sigmoid(minus_a_f);  // (X10)
  }

  template <class V>
  FUSEDRNN_INLINE static void dc_of(const Values<V, 5>& saved, const Values<V, 4>& cur, const Values<V, 4>& d,
                                    Values<V, 4>& dc) {
    const V share = d[0] * saved[3] / cur[2];          // (X11)
    dc[1] = d[1] + share;                              // (X11)
    dc[2] = d[2] - share * (cur[1] / cur[2]);          // (X12)
    dc[3] = d[3] - (dc[1] * cur[1] + dc[2] * cur[2]);  // (X13)
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const Values<V, 5>& saved, const Values<V, 4>& prev, const Values<V, 4>& cur,
                                       Values<V, 4>& d, Values<V, 4>& dx, Values<V, 4>& drec) {
    const V i = saved[0], f = saved[1], z = saved[2], o = saved[3], zero(0), one(1);
    Values<V, 4> dc;
    dc_of(saved, cur, d, dc);                                    // (X11), (X12), (X13)
    const auto of_i = f <= i;                                    // (X2): m is a_i
    const V da_i = (dc[1] * z + dc[2]) * i;                      // (X14)
    const V dl = (dc[1] * prev[1] + dc[2] * prev[2]) * f;        // (X15)
    const V dcarried = dl + where(of_i, zero, dc[3]);            // (X15)
    dx[0] = drec[0] = da_i + where(of_i, dc[3], zero);           // (X14)
    dx[1] = drec[1] = dcarried * saved[4];                       // (X16)
    dx[2] = drec[2] = dc[1] * i * (one - z * z);                 // (X17)
    dx[3] = drec[3] = d[0] * (cur[1] / cur[2]) * o * (one - o);  // (X18)
    d[1] = dc[1] * f;                                            // (X19)
    d[2] = dc[2] * f;                                            // (X19)
    d[3] = dcarried;                                             // (X19)
    d[0] = zero;                                                 // (X20): h_{t-1} only through W_hh
  }
};

}  // namespace fusedrnn
