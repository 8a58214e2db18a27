// The functions of a user's cell (../cells/functions.h) on the values of the kernels for many steps.
#pragma once

#include "../cells/functions.h"

namespace fusedrnn {

template <class Self>
using IfReal = std::enable_if_t<std::is_base_of_v<Real<Self>, Self>, Self>;

template <class Self>
FUSEDRNN_INLINE IfReal<Self> operator/(Self a, Self b) {
  return Self(a.v / b.v);
}
template <class Self, class = IfReal<Self>>
FUSEDRNN_INLINE bool operator<(Self a, Self b) {
  return a.v < b.v;
}
template <class Self, class = IfReal<Self>>
FUSEDRNN_INLINE bool operator<=(Self a, Self b) {
  return a.v <= b.v;
}
template <class Self>
FUSEDRNN_INLINE IfReal<Self> exp(Self a) {
  return Self(exp(a.v));
}
template <class Self>
FUSEDRNN_INLINE IfReal<Self> log(Self a) {
  return Self(log(a.v));
}
template <class Self>
FUSEDRNN_INLINE IfReal<Self> sqrt(Self a) {
  return Self(sqrt(a.v));
}
template <class Self>
FUSEDRNN_INLINE IfReal<Self> abs(Self a) {
  return Self(abs(a.v));
}
template <class Self>
FUSEDRNN_INLINE IfReal<Self> softplus(Self a) {
  return Self(softplus(a.v));
}
template <class Self>
FUSEDRNN_INLINE IfReal<Self> maximum(Self a, Self b) {
  return Self(maximum(a.v, b.v));
}
template <class Self>
FUSEDRNN_INLINE IfReal<Self> minimum(Self a, Self b) {
  return Self(minimum(a.v, b.v));
}
template <class Self>
FUSEDRNN_INLINE IfReal<Self> where(bool condition, Self a, Self b) {
  return condition ? a : b;
}

}  // namespace fusedrnn
