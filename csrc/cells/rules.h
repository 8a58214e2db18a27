// What a layer does to states and gradients around a cell: masks, zoneout, clipping, norms. Pure functions of values,
// as the cells are (cell.h), for both drivers. Each line names its equation in docs/derivations.md, sections P and Z.
#pragma once

#include <cstdint>

#include "cell.h"

namespace fusedrnn {

// Columns of a row of norms: where that of what each state gets from later steps begins; from all sides; of each gate's
// gradient; and how many there are.
struct NormColumns {
  int sent, total, gates, count;
};
FUSEDRNN_INLINE constexpr NormColumns norm_columns(int states, int gates) {
  return {0, states, 2 * states, 2 * states + gates};
}

FUSEDRNN_INLINE float lesser(float v, float limit) { return v > limit ? limit : v; }  // NaN stays NaN
FUSEDRNN_INLINE double lesser(double v, double limit) { return v > limit ? limit : v; }
FUSEDRNN_INLINE float greater(float v, float limit) { return v < limit ? limit : v; }
FUSEDRNN_INLINE double greater(double v, double limit) { return v < limit ? limit : v; }
FUSEDRNN_INLINE float square_root(float v) { return std::sqrt(v); }
FUSEDRNN_INLINE double square_root(double v) { return std::sqrt(v); }

// h_{t-1} as the products read it, or what the products send back to it.
template <class V>
FUSEDRNN_INLINE V masked(V v, V mask) {
  return v * mask;  // (Z1), (Z4)
}

// The state of a step, between the state before it and what the cell gives.
template <class V>
FUSEDRNN_INLINE V zoneout(V keep, V previous, V next) {
  return keep * previous + (V(1) - keep) * next;  // (Z2)
}

// d: in dL/d(state t), out dL/d of what the cell gave. Returns what goes past the cell to dL/d(state t-1).
template <class V>
FUSEDRNN_INLINE V zoneout_backward(V keep, V& d) {
  const V past = keep * d;  // (Z3)
  d = d - past;             // (Z3)
  return past;
}

// What a step sends to the state before it, clipped by value.
template <class V>
FUSEDRNN_INLINE V clipped(V sent, V limit) {
  return greater(lesser(sent, limit), V(0) - limit);  // (P5)
}

// The factor that brings the gradient sent to one sample's state, of this norm, down to the limit.
template <class S>
FUSEDRNN_INLINE S clip_factor(S length, S limit) {
  return length > limit ? limit / length : S(1);  // (P5)
}

// The sum of squares of n values; at(j) gives the values j to j + lanes - 1.
template <class V, class At>
FUSEDRNN_INLINE V sum_of_squares(int64_t n, int64_t lanes, const At& at) {
  V sum(0);
  for (int64_t j = 0; j < n; j += lanes) {
    const V v = at(j);
    sum = sum + v * v;  // (P6)
  }
  return sum;
}

template <class S>
FUSEDRNN_INLINE S norm(S sum_of_squares) {
  return square_root(sum_of_squares);  // (P6)
}

}  // namespace fusedrnn
