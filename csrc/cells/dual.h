// A number and its tangent: derivatives of a cell's functions, by the rules for sums and products. The functions of
// cell.h are templates of the value; with this one they give what they compute and how it changes.
#pragma once

#include "cell.h"

namespace fusedrnn {

template <class V>
struct Dual {
  V v, dot;
  Dual() = default;
  FUSEDRNN_INLINE explicit Dual(int constant) : v(V(constant)), dot(V(0)) {}
  FUSEDRNN_INLINE Dual(V value, V tangent) : v(value), dot(tangent) {}
  FUSEDRNN_INLINE friend Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.dot + b.dot}; }
  FUSEDRNN_INLINE friend Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.dot - b.dot}; }
  FUSEDRNN_INLINE friend Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.dot * b.v + a.v * b.dot}; }
};

template <class V>
FUSEDRNN_INLINE Dual<V> tanh(Dual<V> a) {
  const V t = tanh(a.v);
  return {t, (V(1) - t * t) * a.dot};
}

template <class V>
FUSEDRNN_INLINE Dual<V> relu_gradient(Dual<V> h, Dual<V> d) {
  return {relu_gradient(h.v, d.v), relu_gradient(h.v, d.dot)};
}

}  // namespace fusedrnn
