// Gated recurrent unit, gates in torch.nn's order r, z, n, in both forms. docs/derivations.md, sections G and H.
#pragma once

#include "cell.h"

namespace fusedrnn {

// torch.nn's form: the reset gate scales the product W_hn h_{t-1} + b_hn.
struct Gru {
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3, kStates = 1, kSaved = 4, kFirst = 3, kSplit = 1, kParameters = 0;
  static constexpr int kLate = 2, kSavedLate = 1;
  static constexpr Bound kBound = Bound::kPrevious;  // a mean of h_{t-1} and n
  static constexpr bool kProjectable = false;

  template <class V>
  FUSEDRNN_INLINE static void forward(const Values<V, 3>& x, const Values<V, 3>& rec, Values<V, 1>& state,
                                      Values<V, 4>& saved, Values<V, 2>& late) {
    const V r = sigmoid(x[0] + rec[0]);  // (G1)
    const V z = sigmoid(x[1] + rec[1]);  // (G2)
    late[0] = x[2] + r * rec[2];         // (G3)
    late[1] = z;
    saved[0] = r, saved[1] = z, saved[2] = rec[2];
  }

  template <class V>
  FUSEDRNN_INLINE static void finish(const Values<V, 2>& late, Values<V, 1>& state, Values<V, 4>& saved) {
    const V n = tanh(late[0]), z = late[1];  // (G3)
    state[0] = n + z * (state[0] - n);       // (G4)
    saved[3] = n;
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const Values<V, 4>& saved, const Values<V, 1>& prev, const Values<V, 1>&,
                                       Values<V, 1>& d, Values<V, 3>& dx, Values<V, 3>& drec) {
    const V r = saved[0], z = saved[1], rec_n = saved[2], n = saved[3], one = V(1);
    dx[2] = (d[0] - d[0] * z) * (one - n * n);               // (G5); of an infinite d NaN, as in torch.nn
    drec[2] = dx[2] * r;                                     // (G6)
    dx[0] = drec[0] = dx[2] * rec_n * r * (one - r);         // (G7)
    dx[1] = drec[1] = d[0] * (prev[0] - n) * z * (one - z);  // (G8)
    d[0] = d[0] * z;                                         // (G9): the direct path to h_{t-1}
  }

  template <class V>
  FUSEDRNN_INLINE static void tangent(const Values<V, 4>& saved, const Values<V, 1>& prev, const Values<V, 1>&,
                                      const Values<V, 3>& x, const Values<V, 3>& rec, Values<V, 1>& dot,
                                      Values<V, 4>& saved_dot) {
    const V r = saved[0], z = saved[1], rec_n = saved[2], n = saved[3], one = V(1);
    const V r_dot = r * (one - r) * (x[0] + rec[0]);                                          // (T15)
    const V z_dot = z * (one - z) * (x[1] + rec[1]);                                          // (T15)
    const V n_dot = (one - n * n) * (x[2] + r_dot * rec_n + r * rec[2]);                      // (T16)
    dot[0] = n_dot + z_dot * (prev[0] - n) + z * (dot[0] - n_dot);                            // (T17)
    saved_dot[0] = r_dot, saved_dot[1] = z_dot, saved_dot[2] = rec[2], saved_dot[3] = n_dot;  // (T3)
  }
};

// The original paper's form (reset_after=False): the reset gate scales h_{t-1} before the product.
struct GruResetBefore {
  static constexpr const char* kName = "gru_reset_before";
  static constexpr int kGates = 3, kStates = 1, kSaved = 3, kFirst = 2, kSplit = 0, kParameters = 0, kLate = 0;
  static constexpr Bound kBound = Bound::kPrevious;  // likewise
  static constexpr bool kProjectable = false;

  template <class V>
  FUSEDRNN_INLINE static void forward_first(const Values<V, 3>& x, const Values<V, 3>& rec, const Values<V, 1>& prev,
                                            Values<V, 3>& saved, V& q) {
    saved[0] = sigmoid(x[0] + rec[0]);  // (H1)
    saved[1] = sigmoid(x[1] + rec[1]);  // (H2)
    q = saved[0] * prev[0];             // (H3)
  }

  template <class V>
  FUSEDRNN_INLINE static void forward(const Values<V, 3>& x, const Values<V, 3>& rec, Values<V, 1>& state,
                                      Values<V, 3>& saved) {
    const V z = saved[1];
    const V n = tanh(x[2] + rec[2]);    // (H4), rec_n = W_hn q + b_hn
    state[0] = n + z * (state[0] - n);  // (H5)
    saved[2] = n;
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const Values<V, 3>& saved, const Values<V, 1>& prev, const Values<V, 1>&,
                                       Values<V, 1>& d, Values<V, 3>& dx, Values<V, 3>& drec) {
    const V z = saved[1], n = saved[2], one = V(1);
    dx[2] = drec[2] = (d[0] - d[0] * z) * (one - n * n);     // (H6), as (G5)
    dx[1] = drec[1] = d[0] * (prev[0] - n) * z * (one - z);  // (H7)
    d[0] = d[0] * z;                                         // (H8)
  }

  template <class V>
  FUSEDRNN_INLINE static void backward_first(const Values<V, 3>& saved, const Values<V, 1>& prev, const V& dq,
                                             Values<V, 1>& d, Values<V, 3>& dx, Values<V, 3>& drec) {
    const V r = saved[0];
    dx[0] = drec[0] = dq * prev[0] * r * (V(1) - r);  // (H10), dq by (H9)
    d[0] = d[0] + dq * r;                             // (H11): the path through q to h_{t-1}
  }

  template <class V>
  FUSEDRNN_INLINE static V recurrent_operand(const Values<V, 3>& saved, const Values<V, 1>& prev) {
    return saved[0] * prev[0];  // (H3)
  }
};

}  // namespace fusedrnn
