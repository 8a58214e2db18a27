// The simple recurrent cell with tanh or relu, and its residual form. docs/derivations.md, sections R and S.
#pragma once

#include "cell.h"

namespace fusedrnn {

struct RnnTanh {
  static constexpr const char* kName = "rnn_tanh";
  static constexpr int kGates = 1, kStates = 1, kSaved = 0, kFirst = 1, kSplit = 0, kParameters = 0, kLate = 0;
  static constexpr Bound kBound = Bound::kOne;
  static constexpr bool kProjectable = false;

  template <class V>
  FUSEDRNN_INLINE static void forward(const Values<V, 1>& x, const Values<V, 1>& rec, Values<V, 1>& state,
                                      Values<V, 0>&) {
    state[0] = tanh(x[0] + rec[0]);  // (R1), (R2)
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const Values<V, 0>&, const Values<V, 1>&, const Values<V, 1>& cur,
                                       Values<V, 1>& d, Values<V, 1>& dx, Values<V, 1>& drec) {
    dx[0] = drec[0] = d[0] * (V(1) - cur[0] * cur[0]);  // (R4)
    d[0] = V(0);                                        // (R5): only through W_hh
  }

  template <class V>
  FUSEDRNN_INLINE static void tangent(const Values<V, 0>&, const Values<V, 1>&, const Values<V, 1>& cur,
                                      const Values<V, 1>& x, const Values<V, 1>& rec, Values<V, 1>& dot,
                                      Values<V, 0>&) {
    dot[0] = (V(1) - cur[0] * cur[0]) * (x[0] + rec[0]);  // (T10)
  }
};

struct RnnRelu {
  static constexpr const char* kName = "rnn_relu";
  static constexpr int kGates = 1, kStates = 1, kSaved = 0, kFirst = 1, kSplit = 0, kParameters = 0, kLate = 0;
  static constexpr Bound kBound = Bound::kNone;
  static constexpr bool kProjectable = false;

  template <class V>
  FUSEDRNN_INLINE static void forward(const Values<V, 1>& x, const Values<V, 1>& rec, Values<V, 1>& state,
                                      Values<V, 0>&) {
    state[0] = relu(x[0] + rec[0]);  // (R1), (R3)
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const Values<V, 0>&, const Values<V, 1>&, const Values<V, 1>& cur,
                                       Values<V, 1>& d, Values<V, 1>& dx, Values<V, 1>& drec) {
    dx[0] = drec[0] = relu_gradient(cur[0], d[0]);  // (R4)
    d[0] = V(0);                                    // (R5)
  }

  template <class V>
  FUSEDRNN_INLINE static void tangent(const Values<V, 0>&, const Values<V, 1>&, const Values<V, 1>& cur,
                                      const Values<V, 1>& x, const Values<V, 1>& rec, Values<V, 1>& dot,
                                      Values<V, 0>&) {
    dot[0] = relu_gradient(cur[0], x[0] + rec[0]);  // (T10)
  }
};

struct ResidualRnn {
  static constexpr const char* kName = "residual_rnn";
  static constexpr int kGates = 1, kStates = 1, kSaved = 1, kFirst = 1, kSplit = 0, kParameters = 0, kLate = 0;
  static constexpr Bound kBound = Bound::kNone;
  static constexpr bool kProjectable = false;

  template <class V>
  FUSEDRNN_INLINE static void forward(const Values<V, 1>& x, const Values<V, 1>& rec, Values<V, 1>& state,
                                      Values<V, 1>& saved) {
    saved[0] = tanh(x[0] + rec[0]);  // (S1)
    state[0] = state[0] + saved[0];  // (S2)
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const Values<V, 1>& saved, const Values<V, 1>&, const Values<V, 1>&,
                                       Values<V, 1>& d, Values<V, 1>& dx, Values<V, 1>& drec) {
    dx[0] = drec[0] = d[0] * (V(1) - saved[0] * saved[0]);  // (S3)
    // (S4): d[0] stays, the identity path to h_{t-1}
  }

  template <class V>
  FUSEDRNN_INLINE static void tangent(const Values<V, 1>& saved, const Values<V, 1>&, const Values<V, 1>&,
                                      const Values<V, 1>& x, const Values<V, 1>& rec, Values<V, 1>& dot,
                                      Values<V, 1>& saved_dot) {
    saved_dot[0] = (V(1) - saved[0] * saved[0]) * (x[0] + rec[0]);  // (T10)
    dot[0] = dot[0] + saved_dot[0];                                 // (T11)
  }
};

}  // namespace fusedrnn
