// LSTM with layer normalisation, gates i, f, g, o (Ba, Kiros and Hinton 2016). docs/derivations.md, section N.
#pragma once

#include "layer_norm.h"

namespace fusedrnn {

struct LayerNormLstm {
  static constexpr const char* kName = "layer_norm_lstm";
  static constexpr int kGates = 4, kStates = 2, kSaved = 12, kFirst = 4, kSplit = 4, kParameters = 10;
  static constexpr int kLate = 2, kSavedLate = 0, kNorms = 2, kGateSplit = 0;
  static constexpr Bound kBound = Bound::kOne;  // as the LSTM's
  static constexpr bool kProjectable = false;

  template <class V>
  FUSEDRNN_INLINE static void forward(const Values<V, 4>& x, const Values<V, 4>& rec, Values<V, 2>& state,
                                      Values<V, 12>& saved, Values<V, 2>& late) {
    const V i = sigmoid(x[0] + rec[0]);  // (N9)
    const V f = sigmoid(x[1] + rec[1]);  // (N10)
    const V g = tanh(x[2] + rec[2]);     // (N11)
    const V o = sigmoid(x[3] + rec[3]);  // (N12)
    state[1] = f * state[1] + i * g;     // (N13)
    late[0] = o, late[1] = state[1];
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  template <class V>
  FUSEDRNN_INLINE static void finish(const Values<V, 2>& late, Values<V, 2>& state, Values<V, 12>&) {
    state[0] = late[0] * tanh(late[1]);  // (N15): late[1] is normalised by then
  }

  template <class V>
  FUSEDRNN_INLINE static V normed_gradient(const Values<V, 12>& saved, const Values<V, 2>& cur, const Values<V, 2>& d) {
    const V tanh_m = tanh(cur[1]);                      // (N15)
    return d[0] * saved[3] * (V(1) - tanh_m * tanh_m);  // (N16)
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const Values<V, 12>& saved, const Values<V, 2>& prev, const Values<V, 2>& cur,
                                       Values<V, 2>& d, Values<V, 4>& dx, Values<V, 4>& drec) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V one = V(1), tanh_m = tanh(cur[1]);        // (N15)
    const V dc = d[1];                                // (N17)
    dx[0] = drec[0] = dc * g * i * (one - i);         // (N18)
    dx[1] = drec[1] = dc * prev[1] * f * (one - f);   // (N19)
    dx[2] = drec[2] = dc * i * (one - g * g);         // (N20)
    dx[3] = drec[3] = d[0] * tanh_m * o * (one - o);  // (N21)
    d[1] = dc * f;                                    // (N22)
    d[0] = V(0);                                      // (N24): h_{t-1} only through W_hh
  }

  template <class V>
  FUSEDRNN_INLINE static V candidate(const Values<V, 12>& saved, const Values<V, 2>& prev) {
    return saved[1] * prev[1] + saved[0] * saved[2];  // (N13)
  }
};

}  // namespace fusedrnn
