// Minimal gated unit, gates f, n. docs/derivations.md, section U.
#pragma once

#include "cell.h"

namespace fusedrnn {

struct Mgu {
  static constexpr const char* kName = "mgu";
  static constexpr int kGates = 2, kStates = 1, kSaved = 2, kFirst = 1, kSplit = 0, kParameters = 0, kLate = 0;
  static constexpr Bound kBound = Bound::kPrevious;
  static constexpr bool kProjectable = false;

  template <class V>
  FUSEDRNN_INLINE static void forward_first(const Values<V, 2>& x, const Values<V, 2>& rec, const Values<V, 1>& prev,
                                            Values<V, 2>& saved, V& q) {
    saved[0] = sigmoid(x[0] + rec[0]);  // (U1)
    q = saved[0] * prev[0];             // (U2)
  }

  template <class V>
  FUSEDRNN_INLINE static void forward(const Values<V, 2>& x, const Values<V, 2>& rec, Values<V, 1>& state,
                                      Values<V, 2>& saved) {
    const V f = saved[0];
    const V n = tanh(x[1] + rec[1]);           // (U3), rec_n = W_hn q + b_hn
    state[0] = state[0] + f * (n - state[0]);  // (U4)
    saved[1] = n;
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const Values<V, 2>& saved, const Values<V, 1>& prev, const Values<V, 1>&,
                                       Values<V, 1>& d, Values<V, 2>& dx, Values<V, 2>& drec) {
    const V f = saved[0], n = saved[1], one = V(1);
    dx[1] = drec[1] = d[0] * f * (one - n * n);              // (U5)
    dx[0] = drec[0] = d[0] * (n - prev[0]) * f * (one - f);  // (U6), its part by (U4)
    d[0] = d[0] - d[0] * f;                                  // (U9), the part by (U4)
  }

  template <class V>
  FUSEDRNN_INLINE static void backward_first(const Values<V, 2>& saved, const Values<V, 1>& prev, const V& dq,
                                             Values<V, 1>& d, Values<V, 2>& dx, Values<V, 2>& drec) {
    const V f = saved[0];
    dx[0] = drec[0] = drec[0] + dq * prev[0] * f * (V(1) - f);  // (U8), dq by (U7)
    d[0] = d[0] + dq * f;                                       // (U9), the part by (U2)
  }

  template <class V>
  FUSEDRNN_INLINE static V recurrent_operand(const Values<V, 2>& saved, const Values<V, 1>& prev) {
    return saved[0] * prev[0];  // (U2)
  }
};

}  // namespace fusedrnn
