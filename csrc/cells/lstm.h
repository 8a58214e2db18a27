// Long short-term memory, gates in torch.nn's order i, f, g, o. docs/derivations.md, section L.
#pragma once

#include "cell.h"

namespace fusedrnn {

struct Lstm {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4, kStates = 2, kSaved = 4, kFirst = 4, kSplit = 0, kParameters = 0;
  static constexpr int kLate = 2, kSavedLate = 0;
  static constexpr Bound kBound = Bound::kOne;  // |o| <= 1, |tanh c| <= 1
  static constexpr bool kProjectable = true;

  template <class V>
  FUSEDRNN_INLINE static void forward(const Values<V, 4>& x, const Values<V, 4>& rec, Values<V, 2>& state,
                                      Values<V, 4>& saved, Values<V, 2>& late) {
    const V i = sigmoid(x[0] + rec[0]);  // (L1)
    const V f = sigmoid(x[1] + rec[1]);  // (L2)
    const V g = tanh(x[2] + rec[2]);     // (L3)
    const V o = sigmoid(x[3] + rec[3]);  // (L4)
    state[1] = f * state[1] + i * g;     // (L5)
    late[0] = o, late[1] = state[1];
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  template <class V>
  FUSEDRNN_INLINE static void finish(const Values<V, 2>& late, Values<V, 2>& state, Values<V, 4>&) {
    state[0] = late[0] * tanh(late[1]);  // (L6)
  }

  template <class V>
  FUSEDRNN_INLINE static V dc_of(const Values<V, 4>& saved, const Values<V, 2>& cur, const Values<V, 2>& d) {
    const V tanh_c = tanh(cur[1]);                             // (L6)
    return d[1] + d[0] * saved[3] * (V(1) - tanh_c * tanh_c);  // (L8)
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const Values<V, 4>& saved, const Values<V, 2>& prev, const Values<V, 2>& cur,
                                       Values<V, 2>& d, Values<V, 4>& dx, Values<V, 4>& drec) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V one = V(1), tanh_c = tanh(cur[1]);        // (L6)
    const V dc = dc_of(saved, cur, d);                // (L8)
    dx[0] = drec[0] = dc * g * i * (one - i);         // (L9)
    dx[1] = drec[1] = dc * prev[1] * f * (one - f);   // (L10)
    dx[2] = drec[2] = dc * i * (one - g * g);         // (L11)
    dx[3] = drec[3] = d[0] * tanh_c * o * (one - o);  // (L12)
    d[1] = dc * f;                                    // (L13)
    d[0] = V(0);                                      // (L14): h_{t-1} only through W_hh
  }

  template <class V>
  FUSEDRNN_INLINE static void tangent(const Values<V, 4>& saved, const Values<V, 2>& prev, const Values<V, 2>& cur,
                                      const Values<V, 4>& x, const Values<V, 4>& rec, Values<V, 2>& dot,
                                      Values<V, 4>& saved_dot) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V one = V(1), tanh_c = tanh(cur[1]);                                               // (L6)
    const V i_dot = i * (one - i) * (x[0] + rec[0]);                                         // (T12)
    const V f_dot = f * (one - f) * (x[1] + rec[1]);                                         // (T12)
    const V g_dot = (one - g * g) * (x[2] + rec[2]);                                         // (T12)
    const V o_dot = o * (one - o) * (x[3] + rec[3]);                                         // (T12)
    dot[1] = f_dot * prev[1] + f * dot[1] + i_dot * g + i * g_dot;                           // (T13)
    dot[0] = o_dot * tanh_c + o * (one - tanh_c * tanh_c) * dot[1];                          // (T14)
    saved_dot[0] = i_dot, saved_dot[1] = f_dot, saved_dot[2] = g_dot, saved_dot[3] = o_dot;  // (T12)
  }

  template <class V>
  FUSEDRNN_INLINE static V candidate(const Values<V, 4>& saved, const Values<V, 2>& prev) {
    return saved[1] * prev[1] + saved[0] * saved[2];  // (L5)
  }

  template <class V>
  FUSEDRNN_INLINE static V output(const Values<V, 4>& saved, const Values<V, 2>& cur) {
    return saved[3] * tanh(cur[1]);  // (L6)
  }
};

}  // namespace fusedrnn
