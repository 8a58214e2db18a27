// GRU with layer normalisation, gates r, z, n, the reset gate after the product. docs/derivations.md, section N.
#pragma once

#include "layer_norm.h"

namespace fusedrnn {

struct LayerNormGru {
  static constexpr const char* kName = "layer_norm_gru";
  static constexpr int kGates = 3, kStates = 1, kSaved = 10, kFirst = 3, kSplit = 3, kParameters = 6;
  static constexpr int kLate = 2, kSavedLate = 1, kNorms = 1, kGateSplit = 1;
  static constexpr Bound kBound = Bound::kPrevious;  // as the GRU's
  static constexpr bool kProjectable = false;

  template <class V>
  FUSEDRNN_INLINE static void forward(const Values<V, 3>& x, const Values<V, 3>& rec, Values<V, 1>& state,
                                      Values<V, 10>& saved, Values<V, 2>& late) {
    const V r = sigmoid(x[0] + rec[0]);  // (N25)
    const V z = sigmoid(x[1] + rec[1]);  // (N26)
    late[0] = x[2] + r * rec[2];         // (N27)
    late[1] = z;
    saved[0] = r, saved[1] = z, saved[2] = rec[2];
  }

  template <class V>
  FUSEDRNN_INLINE static void finish(const Values<V, 2>& late, Values<V, 1>& state, Values<V, 10>& saved) {
    const V n = tanh(late[0]), z = late[1];  // (N27)
    state[0] = n + z * (state[0] - n);       // (N28)
    saved[3] = n;
  }

  template <class V>
  FUSEDRNN_INLINE static void backward(const Values<V, 10>& saved, const Values<V, 1>& prev, const Values<V, 1>&,
                                       Values<V, 1>& d, Values<V, 3>& dx, Values<V, 3>& drec) {
    const V r = saved[0], z = saved[1], rec_n = saved[2], n = saved[3], one = V(1);
    dx[2] = (d[0] - d[0] * z) * (one - n * n);               // (N29), as (G5)
    drec[2] = dx[2] * r;                                     // (N30)
    dx[0] = drec[0] = dx[2] * rec_n * r * (one - r);         // (N31)
    dx[1] = drec[1] = d[0] * (prev[0] - n) * z * (one - z);  // (N32)
    d[0] = d[0] * z;                                         // (N33): the direct path to h_{t-1}
  }
};

}  // namespace fusedrnn
