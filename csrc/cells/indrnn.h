// Independently recurrent units: a diagonal in the place of W_hh, with tanh or relu. docs/derivations.md, section I.
#pragma once

#include "cell.h"

namespace fusedrnn {

struct IndRnnTanh {
  static constexpr const char* kName = "indrnn_tanh";
  static constexpr int kGates = 1, kStates = 1, kSaved = 0, kFirst = 0, kSplit = 0, kParameters = 1, kLate = 0;
  static constexpr Bound kBound = Bound::kOne;
  static constexpr bool kProjectable = false;

  template <class V>
  FUSEDRNN_INLINE static void forward(const Values<V, 1>& x, const Values<V, 1>& rec, Values<V, 1>& state,
                                      Values<V, 0>&, const Values<V, 1>& unit) {
    state[0] = tanh(x[0] + rec[0] + unit[0] * state[0]);  // (I1), (I2)
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const Values<V, 0>&, const Values<V, 1>& prev, const Values<V, 1>& cur,
                                       Values<V, 1>& d, Values<V, 1>& dx, Values<V, 1>& drec, const Values<V, 1>& unit,
                                       Values<V, 1>& dunit) {
    dx[0] = drec[0] = d[0] * (V(1) - cur[0] * cur[0]);  // (I4)
    dunit[0] = dx[0] * prev[0];                         // (I5)
    d[0] = dx[0] * unit[0];                             // (I6)
  }
};

struct IndRnnRelu {
  static constexpr const char* kName = "indrnn_relu";
  static constexpr int kGates = 1, kStates = 1, kSaved = 0, kFirst = 0, kSplit = 0, kParameters = 1, kLate = 0;
  static constexpr Bound kBound = Bound::kNone;
  static constexpr bool kProjectable = false;

  template <class V>
  FUSEDRNN_INLINE static void forward(const Values<V, 1>& x, const Values<V, 1>& rec, Values<V, 1>& state,
                                      Values<V, 0>&, const Values<V, 1>& unit) {
    state[0] = relu(x[0] + rec[0] + unit[0] * state[0]);  // (I1), (I3)
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const Values<V, 0>&, const Values<V, 1>& prev, const Values<V, 1>& cur,
                                       Values<V, 1>& d, Values<V, 1>& dx, Values<V, 1>& drec, const Values<V, 1>& unit,
                                       Values<V, 1>& dunit) {
    dx[0] = drec[0] = relu_gradient(cur[0], d[0]);  // (I4)
    dunit[0] = dx[0] * prev[0];                     // (I5)
    d[0] = dx[0] * unit[0];                         // (I6)
  }
};

}  // namespace fusedrnn
